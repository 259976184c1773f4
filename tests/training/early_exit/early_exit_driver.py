"""A stand-in for the executor: feeds recorded curves to a policy and keeps to the caller's side of its contract."""

import json
from collections import deque
from dataclasses import dataclass, field

from alto_common.tuning import EarlyExit
from alto_training.early_exit import Decision, Observation, StoppingPolicy, Verdict, make_policy


@dataclass
class Run:
    """What became of the trials."""

    decisions: list[Decision] = field(default_factory=list)
    stopped: dict[str, str] = field(default_factory=dict)
    completed: list[str] = field(default_factory=list)
    evaluations: int = 0


def names(count: int) -> list[str]:
    return [f"trial-{index:03d}" for index in range(1, count + 1)]


def drive(
    settings: EarlyExit,
    curves: dict[str, list[Observation]],
    slots: int | None = None,
    obey_pause: bool = True,
    reload: bool = False,
) -> Run:
    """Run every trial, round robin over the slots, until all have ended; with `reload`, from a saved state always."""
    policy = make_policy(settings, list(curves))
    run = Run()
    queue = deque(curves)
    running: deque[str] = deque()
    parked: set[str] = set()
    position = dict.fromkeys(curves, 0)

    def reloaded() -> StoppingPolicy:
        state = json.loads(json.dumps(policy.state_dict(), allow_nan=False))
        fresh = make_policy(settings, list(curves))
        fresh.load_state_dict(state)
        assert fresh.state_dict() == policy.state_dict()
        return fresh

    def act(decisions: list[Decision]) -> None:
        for decision in decisions:
            run.decisions.append(decision)
            one = decision.trial_id
            assert one not in run.stopped, f"{one} was judged after it had been stopped"
            json.dumps(dict(decision.evidence), allow_nan=False)
            assert decision.reason.endswith(".")
            if decision.verdict is Verdict.STOP:
                run.stopped[one] = decision.rule
                # A ladder may keep a trial at one rung and cut it at the next, all in one answer.
                for place in (running, queue):
                    if one in place:
                        place.remove(one)
                parked.discard(one)
            elif decision.verdict is Verdict.PAUSE and obey_pause:
                assert one in running or one in parked
                if one in running:
                    running.remove(one)
                parked.add(one)
            elif decision.verdict is Verdict.KEEP and one in parked:
                parked.remove(one)
                queue.append(one)

    while True:
        while queue and (slots is None or len(running) < slots):
            running.append(queue.popleft())
        if not running:
            assert not parked, f"deadlock: {sorted(parked)} wait for nobody"
            return run
        if reload:
            policy = reloaded()
        trial_id = running[0]
        running.rotate(-1)
        observation = curves[trial_id][position[trial_id]]
        position[trial_id] += 1
        run.evaluations += 1
        act(policy.observe(trial_id, observation))
        if trial_id in run.stopped:
            act(policy.trial_ended(trial_id))
        elif position[trial_id] == len(curves[trial_id]):
            parked.discard(trial_id)
            if trial_id in running:
                running.remove(trial_id)
            run.completed.append(trial_id)
            act(policy.trial_ended(trial_id))
            act(policy.trial_ended(trial_id))


def curve(validation: list[float], train: list[float] | None = None, total: int | None = None) -> list[Observation]:
    """Return a curve evaluated at equal fractions; train loss is the validation loss unless given."""
    count = len(validation)
    total = total or count
    train = train or validation
    return [
        Observation(-(-(index + 1) * total // count), total, train[index], validation[index]) for index in range(count)
    ]
