"""A small task that joins the executor of a long one, against the same task waiting for the long one's end.

    make bench NAME=colocation
    make bench NAME=colocation ARGS="--width 576 --layers 30 --length 128"

A random Llama in fp32; host and guest have one trial each, of one sequence a step. Seconds are of this process's
processors (`--wall` for the clock's), starts left out on both sides: that a guest needs none is to its credit beside.
`host_slowdown` and `guest_slowdown` are times shared over times alone while both were trained, `mean_completion_ratio`
the mean end of both, shared over one after the other. `worst_weight_distance` is the largest relative distance of the
guest's final weights to those it has alone.
"""

from __future__ import annotations

import argparse
import json
import platform
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from alto_common.tuning import EarlyExit, Evaluation, Trial, TrialConfig, TuningJob
from alto_training.executor.backbone import prepare_backbone
from alto_training.executor.control import Command, ControlQueue, Join
from alto_training.executor.events import Event, TaskLeft, TaskStarted, TrialFinished, TrialProgress
from alto_training.executor.executor import Executor
from alto_training.executor.settings import ExecutorSettings
from cpu_throughput import SyntheticDataset
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

JOIN_STEP = 5


def make_job(task_id: str, steps: int, length: int) -> TuningJob:
    config = TrialConfig(lora_rank=8, batch_size=1, max_steps=steps, max_length=length, adam_epsilon=1e-3, seed=1)
    return TuningJob(
        task_id, "random", "", "", (Trial("trial", config),), early_exit=EarlyExit("none"), evaluation=Evaluation(1, 1)
    )


class Run:
    """One executor, and when what happened in it."""

    def __init__(self, arguments: argparse.Namespace, host: TuningJob, folder: Path, guest: TuningJob | None = None):
        self.started: dict[str, float] = {}
        self.ended: dict[str, float] = {}
        self.steps: dict[str, list[float]] = {}
        self.adapters: dict[str, str] = {}
        self.backend = ""
        self._seconds: Callable[[], float] = time.perf_counter if arguments.wall else time.process_time
        self._control = ControlQueue()
        self._joins: list[Command] = [] if guest is None else [Join(guest, folder / "guest")]
        torch.manual_seed(0)
        width = arguments.width
        shape = {"hidden_size": width, "intermediate_size": 8 * width // 3, "num_hidden_layers": arguments.layers}
        heads = {"num_attention_heads": width // 64, "num_key_value_heads": width // 64}
        model: Any = LlamaForCausalLM(LlamaConfig(vocab_size=49152, tie_word_embeddings=True, **shape, **heads))
        Executor(
            host,
            folder / "host",
            self._note,
            ExecutorSettings(threads=arguments.threads, checkpoint_interval_s=1e9),
            self._control,
            backbone=prepare_backbone(model, "random", torch.device("cpu")),
            open_data=lambda job, cache: (SyntheticDataset(), SyntheticDataset(2)),
        ).run()

    def _note(self, event: Event) -> None:
        now = self._seconds()
        if isinstance(event, TaskStarted):
            self.started[event.task_id], self.backend = now, event.backend
        elif isinstance(event, TaskLeft):
            self.ended[event.task_id] = now
        elif isinstance(event, TrialFinished) and event.adapter_path:
            self.adapters[event.task_id] = event.adapter_path
        elif isinstance(event, TrialProgress):
            self.steps.setdefault(event.task_id, []).append(now)
            if event.task_id == "host" and event.step == JOIN_STEP and self._joins:
                self._control.put(self._joins.pop())

    def took(self, task_id: str) -> float:
        return self.ended[task_id] - self.started[task_id]

    def step_s(self, task_id: str, since: float, until: float) -> float:
        """The seconds of one step of a task within a span."""
        within = [at for at in self.steps[task_id] if since <= at <= until]
        return (within[-1] - within[0]) / (len(within) - 1)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--length", type=int, default=64)
    parser.add_argument("--host-steps", type=int, default=120)
    parser.add_argument("--guest-steps", type=int, default=40)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--wall", action="store_true")
    arguments = parser.parse_args()
    host = make_job("host", arguments.host_steps, arguments.length)
    guest = make_job("guest", arguments.guest_steps, arguments.length)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        host_alone = Run(arguments, host, folder / "host-alone")
        guest_alone = Run(arguments, guest, folder / "guest-alone")
        both = Run(arguments, host, folder / "both", guest)
        ours, alone = (load_file(f"{run.adapters['guest']}/adapter_model.safetensors") for run in (both, guest_alone))
        distances = [float((ours[key] - alone[key]).norm() / alone[key].norm()) for key in alone]
    began, span = both.started["host"], (both.started["guest"], both.ended["guest"])
    alone_host = host_alone.step_s("host", 0.0, float("inf"))
    alone_guest = guest_alone.step_s("guest", 0.0, float("inf"))
    shared_ends = [both.ended["host"] - began, both.ended["guest"] - began]
    waiting_ends = [host_alone.took("host"), host_alone.took("host") + guest_alone.took("guest")]
    result = {
        "host_alone_s": host_alone.took("host"),
        "guest_alone_s": guest_alone.took("guest"),
        "host_end_shared_s": shared_ends[0],
        "guest_end_shared_s": shared_ends[1],
        "guest_end_waiting_s": waiting_ends[1],
        "host_slowdown": both.step_s("host", *span) / alone_host,
        "guest_slowdown": both.step_s("guest", *span) / alone_guest,
        "mean_completion_ratio": sum(shared_ends) / sum(waiting_ends),
        "makespan_ratio": max(shared_ends) / max(waiting_ends),
        "worst_weight_distance": max(distances),
        **{key: getattr(arguments, key) for key in ("width", "layers", "length", "host_steps", "guest_steps")},
        "threads": arguments.threads,
        "seconds": "wall" if arguments.wall else "processor",
        "backend": both.backend,
        "machine": platform.machine(),
        "torch": torch.__version__,
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
