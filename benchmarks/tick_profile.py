"""What the host does in a tick of the executor, and how busy that keeps the device.

    make bench NAME=tick_profile                   # on a CPU: 32 layers, so narrow that nearly all is the host's own
    python benchmarks/tick_profile.py --device cuda --shape 8b --cell 4x2x256 --text tick-profile.txt

One process trains TRIALSxBATCHxLENGTH (random weights, lora_rank 16 on all seven projections); `--ragged` has rows of a
quarter of LENGTH to all of it, so that no tick is laid out as another. After ticks that warm up
come TICKS plain ones (`tick_ms`, and `processor_ms` of all threads: medians), TICKS under cProfile (`function_calls`,
backward included), and 5 under torch's profiler on a GPU (`device_busy_share`: the union of its kernels' and copies'
times over the time from the first to the last; `launches`) or with every operator counted on a CPU (`operators`).
Numbers are of one tick. `--text` receives both profiles' tables. The last line is JSON.
"""

from __future__ import annotations

import argparse
import cProfile
import datetime
import io
import json
import os
import platform
import pstats
import random
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

sys.path.insert(0, str(Path(__file__).parent))

import multi_gpu_ours as ours
from alto_common.tuning import Evaluation, TrialConfig
from alto_training.executor.events import Event, TrialProgress
from alto_training.executor.settings import Backend
from multi_gpu_shapes import LORA_RANK, SHAPES, TARGETS

WARM_TICKS = 4
COUNTED_TICKS = 5
TOP = 40


class CountedOperators(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch has no types for it
    """Counts operators that go through torch's dispatcher below autograd."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # nor for this
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Count, then carry on."""
        self.calls[str(func)] += 1
        return func(*args, **(kwargs or {}))


class Phases:
    """Listens to the executor and, at the end of each tick, starts and stops what is measured."""

    def __init__(self, trials: int, ticks: int, device: torch.device) -> None:
        self.found: dict[str, Any] = {}
        self.text = ""
        self._trials = trials
        self._ticks = ticks
        self._device = device
        self._steps = 0
        self._moments: list[tuple[float, float]] = []
        self._python = cProfile.Profile()
        self._operators = CountedOperators()
        self._torch: Any = None

    def listen(self, event: Event) -> None:
        """Take note of an event; the last trial's step ends a tick."""
        if not isinstance(event, TrialProgress):
            return
        self._steps += 1
        if self._steps % self._trials:
            return
        tick = self._steps // self._trials - WARM_TICKS
        if 0 <= tick <= self._ticks:
            self._moments.append((time.perf_counter(), time.process_time()))
        if tick == self._ticks:
            self._end_of_plain_ticks()
            # Backward on this thread: cProfile sees no other.
            torch.autograd.set_multithreading_enabled(False)
            self._python.enable()
        elif tick == 2 * self._ticks:
            self._python.disable()
            torch.autograd.set_multithreading_enabled(True)
            self._end_of_python()
            self._begin_counting()
        elif tick == 2 * self._ticks + COUNTED_TICKS:
            self._end_of_counting()
            raise ours.EnoughError

    def _end_of_plain_ticks(self) -> None:
        wall, processor = zip(*self._moments, strict=True)
        self.found["tick_ms"] = _median_step_ms(wall)
        self.found["processor_ms"] = _median_step_ms(processor)

    def _end_of_python(self) -> None:
        written = io.StringIO()
        statistic = pstats.Stats(self._python, stream=written).sort_stats("tottime")
        statistic.print_stats(TOP)
        self.text += written.getvalue()
        self.found["function_calls"] = round(statistic.total_calls / self._ticks)  # type: ignore[attr-defined]  # typeshed lacks it

    def _begin_counting(self) -> None:
        if self._device.type == "cpu":
            self._operators.__enter__()
            return
        self._torch = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA])
        self._torch.start()

    def _end_of_counting(self) -> None:
        if self._device.type == "cpu":
            self._operators.__exit__(None, None, None)
            calls = self._operators.calls
            self.found["operators"] = round(sum(calls.values()) / COUNTED_TICKS)
            self.text += "\n".join(f"{count / COUNTED_TICKS:9.1f} {name}" for name, count in calls.most_common(TOP))
            return
        torch.cuda.synchronize()
        self._torch.stop()
        on_device = [event for event in self._torch.events() if event.device_type == torch.autograd.DeviceType.CUDA]
        spans = sorted((event.time_range.start, event.time_range.end) for event in on_device)
        busy_us = union_length(spans)
        self.found["device_busy_share"] = round(busy_us / (max(end for _, end in spans) - spans[0][0]), 4)
        self.found["device_ms"] = round(busy_us / COUNTED_TICKS / 1e3, 2)
        self.found["launches"] = round(len(spans) / COUNTED_TICKS)
        by_name: Counter[str] = Counter()
        times: Counter[str] = Counter()
        for event in on_device:
            by_name[event.name] += 1
            times[event.name] += event.time_range.end - event.time_range.start
        lines = [
            f"{total / COUNTED_TICKS / 1e3:9.3f} ms {by_name[name] / COUNTED_TICKS:8.1f} x  {name[:150]}"
            for name, total in times.most_common(TOP)
        ]
        self.text += "Device time of a tick by kernel, and launches of it:\n" + "\n".join(lines)


def union_length(spans: Sequence[tuple[float, float]]) -> float:
    """Return the length of the union of (start, end) spans that are sorted by their starts.

    >>> union_length([(0, 2), (1, 3), (5, 6)])
    4.0
    """
    total, reached = 0.0, float("-inf")
    for start, end in spans:
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total


def _median_step_ms(moments: Sequence[float]) -> float:
    steps = [after - before for before, after in pairwise(moments)]
    return round(statistics.median(steps) * 1e3, 2)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cpu")
    parser.add_argument("--shape", choices=SHAPES, default="narrow")
    parser.add_argument("--cell", default="4x2x16", help="TRIALSxBATCHxLENGTH, all on one tick")
    parser.add_argument("--ragged", action="store_true")
    parser.add_argument("--backend", choices=list(Backend), default=Backend.AUTO)
    parser.add_argument("--ticks", type=int, default=10)
    parser.add_argument("--text", type=Path, help="write the profiles' tables there")
    parser.add_argument("--output", type=Path, help="write the JSON object there too")
    asked = parser.parse_args()
    trials, batch, length = (int(number) for number in asked.cell.split("x"))
    device = torch.device(asked.device, 0) if asked.device == "cuda" else torch.device("cpu")
    if device.type == "cpu":
        torch.set_num_threads(1)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    world = ours.alone(device)
    backbone = ours.load(asked.shape, "single", "", world, dtype, 1)
    config = TrialConfig(
        lora_rank=LORA_RANK, target_modules=TARGETS, batch_size=batch, max_steps=10_000, max_length=length
    )
    vocabulary = ours.vocabulary_of(backbone)
    lengths = tuple(random.Random(0).choices(range(length // 4, length + 1), k=256)) if asked.ragged else (length,)
    rows = ours.RandomRows(256, lengths, vocabulary), ours.RandomRows(1, (length,), vocabulary)
    phases = Phases(trials, asked.ticks, device)
    sizes = {"slots": trials, "tokens_per_tick": trials * batch * length}
    with suppress(ours.EnoughError), tempfile.TemporaryDirectory() as folder:
        job = ours.make_job([config] * trials, Evaluation(count=1))
        where, backend = Path(folder), Backend(asked.backend)
        ours.run(world, backbone, job, rows, where, phases.listen, backend=backend, checkpoint_interval_s=1e9, **sizes)
    result = {
        "benchmark": "tick_profile",
        "date": datetime.date.today().isoformat(),
        "command": "python " + " ".join(sys.argv),
        "device": torch.cuda.get_device_name() if device.type == "cuda" else f"cpu x{os.cpu_count()}",
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "shape": asked.shape,
        "cell": asked.cell,
        "ragged": asked.ragged,
        **phases.found,
    }
    if asked.text:
        asked.text.write_text(phases.text + "\n")
    print(json.dumps(result))
    if asked.output:
        asked.output.write_text(json.dumps(result, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
