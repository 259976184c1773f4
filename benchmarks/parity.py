"""Are many adapters trained together what each would be alone? Ours against PEFT + torch AdamW on the same batches.

    make bench NAME=parity
    make bench NAME=parity ARGS="--trials 12 --scenario all"
    make bench NAME=parity ARGS="--device cuda --dtype bfloat16 --trials 8 --output benchmarks/results/parity-h100.json"

A small random Llama in fp32 on the CPU. `max_rel_weight_err` is the largest, over all trials and all A and B matrices,
of |ours - alone| / |alone| (Frobenius norms) of the final weights; `max_loss_err` the largest difference of a train
loss. `bitwise` says whether our own final weights are equal to the last bit to those of a second run: an uninterrupted
one (resume_after_kill), one whose neighbour was stopped in good health at the same tick (nan_neighbour), else a
repetition. With --dtype bfloat16 loss curves are compared instead, see parity_curves.py.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import signal
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import alto_kernels
import torch
import transformers

sys.path.insert(0, str(Path(__file__).parent))

from alto_common.tuning import Trial, TuningJob
from alto_training.executor.backbone import prepare_backbone
from alto_training.executor.control import ControlQueue, StopTrial
from alto_training.executor.events import Event, TrialFinished, TrialProgress
from alto_training.executor.executor import Executor
from alto_training.executor.settings import Backend
from parity_curves import measure_curves
from parity_scenarios import SCENARIOS, Scenario, make_model, open_random, scenario
from peft_solo import train_alone
from safetensors.torch import load_file

Key = tuple[str, str]  # task and trial
Weights = dict[str, torch.Tensor]


@dataclass
class Together:
    """What the executor made of each trial: the weights it wrote, and its train losses by step."""

    weights: dict[Key, Weights] = field(default_factory=dict)
    losses: dict[Key, dict[int, float]] = field(default_factory=dict)

    def take(self, event: Event) -> None:
        if isinstance(event, TrialProgress):
            self.losses.setdefault((event.task_id, event.trial_id), {})[event.step] = event.train_loss
        if isinstance(event, TrialFinished) and event.adapter_path is not None:
            tensors = load_file(Path(event.adapter_path) / "adapter_model.safetensors")
            self.weights[event.task_id, event.trial_id] = tensors


def run_together(case: Scenario, workdir: Path, on_event: Callable[[Event], None], control: ControlQueue) -> None:
    """Run the executor once over a fresh backbone."""
    backbone = prepare_backbone(make_model(), "small-llama", torch.device("cpu"))
    Executor(
        case.jobs[0],
        workdir,
        on_event,
        case.settings,
        control,
        companions=case.jobs[1:],
        backbone=backbone,
        open_data=open_random,
    ).run_all()


def train(case: Scenario) -> Together:
    """Train a scenario from its start to its end, without interruption."""
    together = Together()
    with tempfile.TemporaryDirectory() as workdir:
        run_together(case, Path(workdir), together.take, ControlQueue())
    return together


def train_with_kills(case: Scenario) -> Together:
    """Train a scenario in processes that die by SIGKILL after ever more events, until one is let come to the end."""
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as workdir:
        kills = 0
        for kill_after in (17, 33, 49, None):
            process = context.Process(target=_run_and_die, args=(case, Path(workdir), kill_after))
            process.start()
            process.join()
            if process.exitcode == 0:
                break
            if process.exitcode != -signal.SIGKILL:
                raise RuntimeError(f"the executor's process ended with {process.exitcode}")
            kills += 1
        if kills < 2:
            raise RuntimeError(f"the executor was killed {kills} times only: give it more trials")
        together = Together()
        for job in case.jobs:
            for trial in job.trials:
                folder = Path(workdir) / "adapters" / trial.trial_id
                together.weights[job.task_id, trial.trial_id] = load_file(folder / "adapter_model.safetensors")
    return together


def _run_and_die(case: Scenario, workdir: Path, kill_after: int | None) -> None:
    torch.set_num_threads(1)
    seen = 0

    def count(event: Event) -> None:
        nonlocal seen
        seen += 1
        if seen == kill_after:
            os.kill(os.getpid(), signal.SIGKILL)

    run_together(case, workdir, count, ControlQueue())


def train_with_healthy_neighbour(case: Scenario, ended: int) -> Together:
    """Train a scenario whose poisoned trial is in good health, and stopped after step `ended`, as the poison did."""
    job = case.jobs[0]
    healthy = [
        replace(trial, config=replace(trial.config, learning_rate=1e-3)) if trial.trial_id == case.poisoned else trial
        for trial in job.trials
    ]
    case = replace(case, jobs=(replace(job, trials=tuple(healthy)),))
    together, control = Together(), ControlQueue()

    def watch(event: Event) -> None:
        together.take(event)
        if isinstance(event, TrialProgress) and event.trial_id == case.poisoned and event.step == ended:
            control.put(StopTrial(event.trial_id))

    with tempfile.TemporaryDirectory() as workdir:
        run_together(case, Path(workdir), watch, control)
    return together


def compare_with_peft(case: Scenario, together: Together) -> tuple[float, float, int]:
    """Return the largest relative error of a weight matrix and of a loss over all trials, and their steps."""
    weight_error = loss_error = 0.0
    steps = 0
    for job in case.jobs:
        for trial in job.trials:
            key = (job.task_id, trial.trial_id)
            if trial.trial_id == case.poisoned:
                continue
            alone = _alone(job, trial)
            for path, (a_RK, b_NR) in alone.matrices.items():
                for letter, expected in (("A", a_RK), ("B", b_NR)):
                    ours = together.weights[key][f"base_model.model.{path}.lora_{letter}.weight"]
                    weight_error = max(weight_error, float((ours - expected).norm() / expected.norm()))
            for step, loss in together.losses.get(key, {}).items():
                loss_error = max(loss_error, abs(loss - alone.losses[step - 1]))
            steps += len(alone.losses)
    return weight_error, loss_error, steps


def _alone(job: TuningJob, trial: Trial) -> Any:
    return train_alone(make_model(), open_random(job, Path())[0], trial.config, job.objective)


def peft_floor(case: Scenario) -> float:
    """Return how far PEFT is from itself when it cuts the same effective batches into single sequences."""
    worst = 0.0
    for job in case.jobs:
        for trial in job.trials:
            config = trial.config
            cut = replace(config, batch_size=1, gradient_accumulation_steps=config.effective_batch_size)
            whole, pieces = _alone(job, trial), _alone(job, replace(trial, config=cut))
            for path, matrices in whole.matrices.items():
                for expected, other in zip(matrices, pieces.matrices[path], strict=True):
                    worst = max(worst, float((other - expected).norm() / expected.norm()))
    return worst


def same_bits(first: Together, second: Together, but: str | None = None) -> bool:
    """Return whether two runs gave the same final weights to the last bit, but for one trial."""
    keys = {key for key in first.weights if key[1] != but}
    if keys != {key for key in second.weights if key[1] != but}:
        return False
    return all(
        torch.equal(tensor, second.weights[key][name]) for key in keys for name, tensor in first.weights[key].items()
    )


def measure(case: Scenario) -> dict[str, Any]:
    """Run one scenario, compare it, and return its figures."""
    uninterrupted = train(case)
    if case.killed:
        together = train_with_kills(case)
        second = uninterrupted
    elif case.poisoned is not None:
        together = uninterrupted
        steps = together.losses[case.jobs[0].task_id, case.poisoned]
        second = train_with_healthy_neighbour(case, max(steps) + 1)
    else:
        together, second = uninterrupted, train(case)
    weight_error, loss_error, steps_compared = compare_with_peft(case, together)
    return {
        "scenario": case.name,
        "trials": sum(len(job.trials) for job in case.jobs),
        "steps": steps_compared,
        "max_rel_weight_err": weight_error,
        "max_loss_err": loss_error,
        "backend": case.settings.backend,
        "bitwise": same_bits(together, second, but=case.poisoned),
    }


def compare_curves(arguments: argparse.Namespace) -> int:
    """Hold the loss curves of the kernels against the spread of other ways to the same."""
    kernels = alto_kernels.cuda_kernels() if arguments.device == "cuda" else ("cpu",)
    if not kernels:
        raise SystemExit("benchmarks/parity.py: needs the CUDA build and a GPU that it has kernels for")
    result = measure_curves(arguments.trials, arguments.device, torch.bfloat16, kernels)
    result |= {"torch": torch.__version__, "transformers": transformers.__version__}
    print(json.dumps(result))
    if arguments.output is not None:
        arguments.output.write_text(json.dumps(result, indent=1) + "\n")
    return 0 if all(each["within_spread"] for each in result["ours"].values()) else 1


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=6)
    parser.add_argument("--scenario", default="mix", help=f"mix, all, or one of {', '.join(SCENARIOS)}")
    parser.add_argument("--adam-epsilon", type=float, help="instead of the mix's own; see parity_scenarios.trial_mix")
    parser.add_argument("--backend", default="reference", help="reference or cpu; or auto, which goes by rule")
    parser.add_argument("--floor", action="store_true", help="also measure how far PEFT is from itself")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--output", type=Path, help="write the JSON object there too (with --dtype bfloat16)")
    arguments = parser.parse_args()
    if arguments.dtype == "bfloat16":
        return compare_curves(arguments)
    changes = {} if arguments.adam_epsilon is None else {"adam_epsilon": arguments.adam_epsilon}
    torch.set_num_threads(1)
    names = SCENARIOS if arguments.scenario == "all" else (arguments.scenario,)
    results = []
    for name in names:
        case = scenario(name, arguments.trials, **changes)
        case = replace(case, settings=replace(case.settings, backend=Backend(arguments.backend)))
        results.append(measure(case))
        if arguments.floor:
            results[-1]["peft_rel_weight_err"] = peft_floor(case)
        print(json.dumps(results[-1]), flush=True)
    worst = max(result["max_rel_weight_err"] for result in results)
    if len(results) > 1:
        summary = {
            "scenarios": len(results),
            "trials": arguments.trials,
            "steps": sum(result["steps"] for result in results),
            "max_rel_weight_err": worst,
            "max_loss_err": max(result["max_loss_err"] for result in results),
            "bitwise": all(result["bitwise"] for result in results),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        }
        print(json.dumps(summary))
    return 0 if worst <= 1e-5 and all(result["bitwise"] for result in results) else 1


if __name__ == "__main__":
    sys.exit(main())
