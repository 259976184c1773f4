"""Eight trials together against PEFT one after another, on the same batches of the same trials, in one run.

    make bench NAME=cpu_throughput
    make bench NAME=cpu_throughput ARGS="--steps 6 --threads 2"

SmolLM2-135M in fp32 over rows of GSM8K, early exit off, no evaluation in the timing. `ratio` is tokens per second ours
over PEFT's, `peak_rss_ratio` our peak memory with all trials over PEFT's with one (its optimiser state is in it). Each
side runs in a process of its own. `--synthetic` takes random weights and random tokens of the same shape and lengths,
for machines that have not got the model.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import multiprocessing
import os
import platform
import resource
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from alto_common.tuning import EarlyExit, Evaluation, Trial, TrialConfig, TuningJob

MODEL = "smollm2-135m-instruct"
EXAMPLES = Path(__file__).parents[1] / "examples" / "gsm8k-small"
RANKS = (8, 16, 8, 16, 8, 16, 8, 16)


@dataclass(frozen=True)
class SyntheticExample:
    input_ids: npt.NDArray[np.int32]
    target_mask: npt.NDArray[np.bool_]


class SyntheticDataset:
    """Random tokens in lengths like GSM8K's (half above 175, a tenth above 283); the last 55 % are targets."""

    def __init__(self, rows: int = 256) -> None:
        draws = np.random.default_rng(5)
        lengths = np.clip(np.exp(draws.normal(np.log(175), 0.375, rows)), 60, 500).astype(int)
        self._rows = [draws.integers(0, 49152, length).astype(np.int32) for length in lengths]
        self.fingerprint = hashlib.sha256(b"".join(row.tobytes() for row in self._rows)).hexdigest()

    def __len__(self) -> int:
        return len(self._rows)

    def example(self, index: int, max_length: int) -> SyntheticExample:
        ids = self._rows[index][:max_length]
        return SyntheticExample(ids, np.arange(len(ids)) >= int(0.45 * len(ids)))

    def preference(self, index: int, max_length: int) -> tuple[SyntheticExample, SyntheticExample]:
        raise TypeError("these rows hold no preferences: the benchmark trains on completions")


def make_job(steps: int, batch_size: int) -> TuningJob:
    trials = [
        TrialConfig(
            lora_rank=rank,
            lora_alpha=2.0 * rank,
            learning_rate=1e-4 * (1 + number),
            batch_size=batch_size,
            max_steps=steps,
            max_length=512,
            seed=number,
        )
        for number, rank in enumerate(RANKS)
    ]
    return TuningJob(
        "throughput",
        MODEL,
        str(EXAMPLES / "train.jsonl"),
        str(EXAMPLES / "validation.jsonl"),
        tuple(Trial(f"trial-{number}", config) for number, config in enumerate(trials)),
        early_exit=EarlyExit("none"),
        evaluation=Evaluation(count=1, max_examples=1),
    )


def load_model(synthetic: bool) -> Any:
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

    if not synthetic:
        from alto_training.executor.loading import locate_base_model

        return AutoModelForCausalLM.from_pretrained(locate_base_model(MODEL), dtype=torch.float32)
    shape = {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9}
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(vocab_size=49152, num_key_value_heads=3, tie_word_embeddings=True, **shape))


def open_data(job: TuningJob, cache_dir: Path, synthetic: bool) -> Any:
    from alto_training.executor.loading import open_job_data

    return (SyntheticDataset(), SyntheticDataset(2)) if synthetic else open_job_data(job, cache_dir)


def together(connection: Connection, job: TuningJob, arguments: argparse.Namespace) -> None:
    """Train all trials in one executor; answer tokens per second of training and the peak memory in bytes."""
    import torch
    from alto_training.executor.backbone import prepare_backbone
    from alto_training.executor.events import Event, TaskProgress, TaskStarted
    from alto_training.executor.executor import Executor
    from alto_training.executor.settings import Backend, ExecutorSettings

    torch.set_num_threads(arguments.threads)
    backbone = prepare_backbone(load_model(arguments.synthetic), MODEL, torch.device("cpu"))
    facts: dict[str, Any] = {}

    def note(event: Event) -> None:
        if isinstance(event, TaskStarted):
            facts["backend"] = event.backend
        if isinstance(event, TaskProgress):
            facts["tokens_per_s"] = event.tokens_per_s

    settings = ExecutorSettings(
        backend=Backend(arguments.backend),
        tokens_per_tick=arguments.tokens_per_tick,
        checkpoint_interval_s=1e9,
        threads=arguments.threads,
    )
    with tempfile.TemporaryDirectory() as workdir:
        Executor(
            job,
            Path(workdir),
            note,
            settings,
            backbone=backbone,
            clock=clock(arguments),
            open_data=lambda job, cache: open_data(job, cache, arguments.synthetic),
        ).run()
    connection.send({**facts, "peak_bytes": peak_bytes()})


def one_after_another(connection: Connection, job: TuningJob, arguments: argparse.Namespace) -> None:
    """Train each trial alone with PEFT; answer tokens per second and the peak memory after the first, in bytes."""
    import torch

    sys.path.insert(0, str(Path(__file__).parent))
    from peft_solo import train_alone

    torch.set_num_threads(arguments.threads)
    now = clock(arguments)
    with tempfile.TemporaryDirectory() as cache:
        data, _ = open_data(job, Path(cache), arguments.synthetic)
        model = load_model(arguments.synthetic)
        tokens, seconds, peak = 0, 0.0, 0
        for trial in job.trials:
            started = now()
            tokens += train_alone(model, data, trial.config).tokens
            seconds += now() - started
            peak = peak or peak_bytes()
            model = load_model(arguments.synthetic)
    connection.send({"tokens_per_s": tokens / seconds, "peak_bytes": peak})


def clock(arguments: argparse.Namespace) -> Callable[[], float]:
    return time.process_time if arguments.cpu_time else time.perf_counter


def peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def in_process(target: Callable[..., None], *arguments: Any) -> dict[str, Any]:
    """Run `target` in a fresh process, and return what it sends."""
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=target, args=(sender, *arguments))
    process.start()
    sender.close()
    try:
        answer: dict[str, Any] = receiver.recv()
    finally:
        process.join()
    return answer


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--threads", type=int, default=min(2, os.cpu_count() or 1))
    parser.add_argument("--tokens-per-tick", type=int, default=None)
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--synthetic", action="store_true")
    parser.add_argument("--cpu-time", action="store_true", help="count processor seconds: for a machine that is busy")
    arguments = parser.parse_args()

    import torch
    import transformers

    job = make_job(arguments.steps, arguments.batch_size)
    ours = in_process(together, job, arguments)
    peft = in_process(one_after_another, job, arguments)
    result = {
        "tokens_per_s": ours["tokens_per_s"],
        "peft_tokens_per_s": peft["tokens_per_s"],
        "ratio": ours["tokens_per_s"] / peft["tokens_per_s"],
        "peak_rss_ratio": ours["peak_bytes"] / peft["peak_bytes"],
        "peak_bytes": ours["peak_bytes"],
        "peft_peak_bytes": peft["peak_bytes"],
        "backend": ours["backend"],
        "trials": len(job.trials),
        "steps": arguments.steps,
        "batch_size": arguments.batch_size,
        "threads": arguments.threads,
        "synthetic": arguments.synthetic,
        "seconds": "processor" if arguments.cpu_time else "wall",
        "machine": platform.processor() or platform.machine(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
