"""The picture that is kept from snapshot to snapshot shows what one made anew would, whatever happens."""

import random
from contextlib import suppress
from dataclasses import replace

import pytest
from alto_common.errors import DomainError
from alto_placement import lifecycle, planner
from alto_placement.durations import Measured
from alto_placement.engine import PlacementEngine
from alto_placement.forecasts import Forecasts
from alto_placement.lifecycle import Reported
from alto_placement.moves import Moves
from alto_placement.policy import ObjectiveWeights, ReservedGpus
from alto_placement.settings import PlacementSettings
from alto_placement.snapshot import ClusterPicture, snapshot_of
from alto_placement.state import FailureCause, Moment, NodeSpec, Outcome, Progress, TaskRow, WorkSize
from placement_events import GIB, NoStore

KINDS = ("h100", "h100", "a100", "cpu")
MODELS = {"small": 1_000_000_000, "large": 8_000_000_000}


class Stream:
    """The engine under random events. Times are multiples of 1/64 s: sums of them are exact."""

    def __init__(self, seed, tolerance=0.0, most_renewed=None):
        self.draw = random.Random(seed)
        self.moment = Moment(0.0, 1e9)
        settings = PlacementSettings(
            service_token="none",
            plan_budget_s=0,
            decision_budget_s=0,
            lease_s=64,
            max_failures=5,
            sharing="all",
            objective=ObjectiveWeights(wait_patience=1.25),
            reservations=[
                ReservedGpus(
                    reservation_id="r",
                    node_id="n1",
                    gpu_indices=(0, 1),
                    start_time="2001-09-09T03:00:00Z",
                    end_time="2001-09-09T04:00:00Z",
                )
            ],
        )
        self.engine = PlacementEngine(NoStore(), settings, lambda: self.moment)
        self.forecasts = self.engine._learning.forecasts = Forecasts(tolerance)
        self.picture = self.engine._picture = ClusterPicture(self.forecasts, settings.policy, most_renewed)
        self.memory = planner.Memory()
        self.policy = settings.policy
        self.names = 0
        self.links = {}

    def pick(self, rows):
        rows = list(rows)
        return self.draw.choice(rows) if rows else None

    def pass_time(self, mono_s, wall_s=None):
        wall_s = mono_s if wall_s is None else wall_s
        self.moment = Moment(self.moment.monotonic_s + mono_s, self.moment.wall_s + wall_s)

    async def enqueue(self):
        self.names += 1
        model = self.draw.choice(list(MODELS))
        steps = self.draw.randrange(20, 2000)
        size = WorkSize(
            train_tokens=steps * 4096,
            steps=steps,
            total_lora_rank=16,
            base_parameters=MODELS[model],
            expected_share=self.draw.choice((1.0, 0.7)),
            trials=2,
            longest_steps=steps,
            shape=self.draw.choice(("halving", "grid")),
            least_memory_bytes=self.draw.choice((0, 10 * GIB)),
            adapter_memory_bytes=self.draw.choice((0, GIB)),
        )
        ahead_s = self.draw.choice((0.0, 0.0, 0.0, 30.0))
        tenant = self.draw.choice(("ada", "bob", "cy"))
        kind = self.draw.choice(("", "", "h100"))
        await self.engine.enqueue(
            TaskRow(
                f"t{self.names}",
                tenant,
                b"",
                model,
                self.draw.choice((1, 1, 1, 2, 4)),
                kind,
                size,
                self.moment.wall_s + ahead_s,
                self.draw.choice((0, 0, 0, 1)),
            )
        )

    async def update(self):
        task = self.pick(self.engine.state.tasks.values())
        if task is not None:
            held, priority = self.draw.choice(((True, None), (False, None), (None, 1), (None, 0)))
            await self.engine.update(task.task_id, held, priority, ["x"] if self.draw.random() < 0.2 else [])

    async def dequeue(self):
        task = self.pick(self.engine.state.tasks.values())
        if task is not None:
            await self.engine.dequeue(task.task_id)

    async def register(self):
        number = self.draw.randrange(4)
        node_id = f"n{number}"
        known = self.engine.state.nodes.get(node_id)
        again = known is not None and self.draw.random() < 0.7
        incarnation = known.incarnation if again else f"start-{self.names}-{self.moment.monotonic_s}"
        spec = NodeSpec(node_id, KINDS[number], self.draw.choice((4, 4, 4, 2)), 80 * GIB)
        with suppress(DomainError):
            await self.engine.register(spec, incarnation)
            self.links[node_id] = self.engine.open_link(node_id, incarnation)

    async def cordon(self):
        node = self.pick(self.engine.state.nodes)
        if node is not None:
            await self.engine.cordon(node, self.draw.random() < 0.4)

    async def drain(self):
        node = self.pick(self.engine.state.nodes)
        if node is not None and self.draw.random() < 0.3:
            await self.engine.drain(node)

    def reported(self, row):
        size = self.engine.state.tasks[row.task_id].size
        before = self.engine.state.progress.get(row.assignment_id)
        fraction = min(1.0, (before.fraction_done if before else 0.0) + self.draw.choice((0.0, 0.1, 0.3)))
        ticks = float(round(fraction * size.steps))
        pace = self.draw.choice((0.1, 0.2))
        measured = Measured(ticks, ticks * 4096, ticks * 8, ticks * pace, ticks, ticks / 64, 1, 0.5)
        free = self.draw.choice((0, 10 * GIB))
        left = round((1.0 - fraction) * size.longest_steps)
        progress = Progress(fraction, self.moment.monotonic_s, measured, fraction, left, free)
        return Reported(row.assignment_id, row.epoch, progress)

    async def heartbeat(self):
        link = self.pick(self.links.values())
        if link is not None:
            rows = list(self.engine.state.on_node(link.node_id))
            with suppress(DomainError):
                await self.engine.heartbeat(link, [self.reported(row) for row in rows])

    async def end(self):
        row = self.pick(self.engine.state.assignments.values())
        if row is None:
            return
        link = self.links[row.node_id]
        outcome = self.draw.choice(
            (Outcome.COMPLETED, Outcome.COMPLETED, Outcome.STOPPED, Outcome.FAILED_RETRIABLE, Outcome.UNSHARED)
        )
        cause = FailureCause("EXECUTION_FAILED", "it broke") if outcome is Outcome.FAILED_RETRIABLE else None
        last = self.reported(row) if self.draw.random() < 0.5 else None
        with suppress(DomainError):
            await self.engine.assignment_ended(link, row.assignment_id, row.epoch, outcome, cause, last)

    async def lose(self):
        """A node's lease runs out."""
        node_id = self.pick(self.engine.state.lease_end_s)
        if node_id is not None:
            self.engine.state.lease_end_s[node_id] = self.moment.monotonic_s
            await self.engine._commit(lambda draft, at: lifecycle.expire(draft, at, self.engine._rules))

    async def leave(self):
        """A node's process ends in order, some with what they have still on them."""
        link = self.pick(self.links.values())
        if link is not None:
            rows = [row for row in self.engine.state.on_node(link.node_id) if self.draw.random() < 0.3]
            with suppress(DomainError):
                await self.engine.heartbeat(link, [self.reported(row) for row in rows], leaving=True)

    async def forget(self):
        """All nodes that are lost have been so for long."""
        rules = replace(self.engine._rules, keep_lost_s=-1e9)
        for node_id in await self.engine._commit(lambda draft, at: lifecycle.forget_lost(draft, at, rules)):
            self.links.pop(node_id, None)

    async def wait(self):
        self.pass_time(self.draw.choice((1 / 64, 0.5, 4.0, 60.0, 900.0)))
        if self.draw.random() < 0.1:
            self.engine._forget_ended(self.moment)

    async def step_clock(self):
        self.pass_time(1.0, self.draw.choice((-50.0, 0.0, 100.0)))

    async def restart(self):
        """All is read again after a failed write."""
        self.engine.state = self.engine.state.copy()

    async def replan(self):
        await self.engine._replan()

    async def act(self):
        kinds = {
            self.enqueue: 14,
            self.update: 4,
            self.dequeue: 1,
            self.register: 3,
            self.cordon: 2,
            self.drain: 1,
            self.heartbeat: 14,
            self.end: 6,
            self.lose: 1,
            self.leave: 1,
            self.forget: 1,
            self.wait: 10,
            self.step_clock: 1,
            self.restart: 0.5,
            self.replan: 14,
        }
        await self.draw.choices(list(kinds), list(kinds.values()))[0]()

    def both(self):
        """Return the kept snapshot and one made anew, each with the ends of what runs."""
        state, now = self.engine.state, self.moment
        kept = self.picture.snapshot(state, {"ada": 5.0}, now, 1)
        return kept, snapshot_of(state, self.forecasts, self.policy, {"ada": 5.0}, now, 1)

    def check(self):
        (kept, kept_ends), (anew, anew_ends) = self.both()
        assert kept == anew
        assert list(kept_ends.items()) == list(anew_ends.items())
        here, there = planner.plan(kept, memory=self.memory), planner.plan(anew)
        assert tuple(here.placements) == tuple(there.placements)
        assert here.preemptions == there.preemptions
        assert dict(here.places) == {row.task_id: row for row in there.placements}


async def run(seed, steps=250, **settings):
    stream = Stream(seed, **settings)
    for _ in range(3):
        await stream.register()
    for _ in range(steps):
        await stream.act()
        stream.check()
    return stream


@pytest.mark.parametrize("seed", range(24))
async def test_a_kept_picture_shows_what_one_made_anew_would(seed):
    stream = await run(seed)
    tasks = stream.engine.state.tasks.values()
    assert any(task.attempts for task in tasks)


def forget_nodes(monkeypatch):
    real = ClusterPicture._moved_nodes
    monkeypatch.setattr(ClusterPicture, "_moved_nodes", lambda self, state: list(real(self, state))[:0])


def forget_models(monkeypatch):
    monkeypatch.setattr(Moves, "touch", lambda self, *bases: None)


def forget_time(monkeypatch):
    real = ClusterPicture._run
    monkeypatch.setattr(ClusterPicture, "_run", lambda *rest: replace(real(*rest), until_s=float("inf")))


def forget_delays(monkeypatch):
    real = ClusterPicture._renew

    def renew(self, *rest):
        real(self, *rest)
        self._at_every_snapshot.clear()

    monkeypatch.setattr(ClusterPicture, "_renew", renew)


def forget_tenants_without_history(monkeypatch):
    real = Moves.touch
    monkeypatch.setattr(Moves, "touch", lambda self, *bases: real(self, *(one for one in bases if None not in one)))


@pytest.mark.parametrize(
    "forget",
    [forget_nodes, forget_models, forget_time, forget_delays, forget_tenants_without_history],
)
async def test_a_picture_that_forgets_something_is_noticed(monkeypatch, forget):
    forget(monkeypatch)
    for seed in range(12):
        try:
            await run(seed)
        except AssertionError:
            return
    raise AssertionError("nobody noticed")


async def test_what_a_model_that_moves_costs_a_snapshot_is_bounded_and_all_catch_up():
    stream = Stream(0, tolerance=0.01, most_renewed=5)
    for _ in range(3):
        await stream.register()
    for _ in range(60):
        await stream.enqueue()
    stream.pass_time(60.0)
    await stream.replan()
    (before, _), _ = stream.both()
    rows = list(stream.engine.state.assignments.values())
    stream.pass_time(60.0)
    for row in rows:
        link = stream.links[row.node_id]
        await stream.engine.heartbeat(link, [replace(stream.reported(row), progress=measured_slow(stream))])
    renewed, snapshots = 0, 0
    while True:
        (kept, _), (anew, _) = stream.both()
        known = {id(row) for row in before.waiting}
        fresh = sum(id(row) not in known for row in kept.waiting)
        assert fresh <= 5
        renewed, snapshots, before = renewed + fresh, snapshots + 1, kept
        if not stream.picture.is_behind:
            break
        assert snapshots < 100
    assert renewed > 5
    assert kept == anew


def measured_slow(stream):
    done = Measured(100.0, 100.0 * 4096, 800.0, 500.0)
    return Progress(0.1, stream.moment.monotonic_s, done, 0.1, 100)


@pytest.mark.parametrize("seed", range(4))
async def test_what_is_kept_within_the_tolerance_is_near_the_truth(seed):
    stream = Stream(seed, tolerance=0.01)
    for _ in range(3):
        await stream.register()
    for _ in range(250):
        await stream.act()
        (kept, _), (anew, _) = stream.both()
        assert [row.task_id for row in kept.waiting] == [row.task_id for row in anew.waiting]
        for here, there in zip(kept.waiting, anew.waiting, strict=True):
            for mine, true in zip(here.choices, there.choices, strict=True):
                assert mine.duration.expected_s == pytest.approx(true.duration.expected_s, rel=0.05)
