"""Throughput on several GPUs of one host: our strategies against plain data-parallel PEFT under FSDP2 and ZeRO-3.

    make bench NAME=multi_gpu ARGS="--gpus 2 --shape 8b --trials 8 --batch 1,2,4,8 --length 256"
    python benchmarks/multi_gpu.py --gpus 2 --shape tiny --device cpu --length 16      # a dry run without a GPU

Weights are random, of the shape named: nothing is fetched. A round is one optimiser step of every trial (lora_rank 16,
all seven projections). Ours share the trials out among the GPUs and pack them into ticks of `--tokens-per-tick`; the
others train one adapter at a time, its batch of `--batch` sequences on each GPU, and so count N times as many tokens a
step as the trial asked for: that favours them. Of each, warm-up rounds are not timed. `bytes_per_tick` is what the
collectives of one pass deliver to a rank; `adapter_bytes` what of it is not the backbone's.

Each result names its strategy; what cannot be run here is listed under "missing", with the reason. NVLink multicast
stays as the environment sets it.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

OURS = ("single", "replicated", "sharded", "hybrid")
OTHERS = ("fsdp_peft", "zero3_peft")
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
LORA_RANK = 16
SHAPES: dict[str, dict[str, Any]] = {
    "tiny": {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 256,
    },
    "8b": {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
    },
    "32b": {
        "hidden_size": 5120,
        "intermediate_size": 27648,
        "num_hidden_layers": 64,
        "num_attention_heads": 40,
        "num_key_value_heads": 8,
        "vocab_size": 152064,
    },
}


def make_config(shape: str) -> Any:
    from transformers import LlamaConfig

    return LlamaConfig(**SHAPES[shape], max_position_embeddings=8192, tie_word_embeddings=False)


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    dist.barrier()


def timed(rounds: int, device: torch.device, one_round: Callable[[], None]) -> float:
    """Return the seconds of a round, after one that warms up."""
    one_round()
    synchronize(device)
    started = time.perf_counter()
    for _ in range(rounds):
        one_round()
    synchronize(device)
    return (time.perf_counter() - started) / rounds


# Ours


def load_ours(asked: argparse.Namespace, strategy: str, device: torch.device, dtype: torch.dtype) -> Any:
    from alto_training.executor.backbone import prepare_backbone
    from alto_training.sharding.loading import make_engine
    from alto_training.sharding.sharded_backbone import empty_model, shard_model
    from alto_training.sharding.strategy import EngineName, Strategy, make_layout
    from alto_training.sharding.weight_files import RandomWeights, fill

    model = empty_model(make_config(asked.shape), dtype)
    layout = make_layout(Strategy(strategy), dist.get_world_size(), asked.ranks_per_host or dist.get_world_size())
    if layout.shard_ranks == 1:
        names = {parameter: name for name, parameter in model.named_parameters()}
        fill(model, names, RandomWeights(), device)
        return prepare_backbone(model, asked.shape, device)
    firsts = range(0, layout.ranks, layout.shard_ranks)
    groups = {first: dist.new_group(list(layout.group_of(first))) for first in firsts}
    engine = make_engine(EngineName(asked.engine), groups[layout.group_of(dist.get_rank()).start], device)
    return shard_model(model, asked.shape, RandomWeights(), engine, device, asked.prefetch)


class OurTrials:
    """The trials of this rank, and rounds over them."""

    def __init__(self, asked: argparse.Namespace, backbone: Any, trials: int, batch: int, length: int) -> None:
        from alto_common.tuning import TrialConfig
        from alto_training.executor.adapter import Adapter

        self._backbone = backbone
        self._config = TrialConfig(lora_rank=LORA_RANK, target_modules=tuple(TARGETS), batch_size=batch)
        rank, world = dist.get_rank(), dist.get_world_size()
        modules = backbone.adapted_modules(self._config)
        self._adapters = []
        for seed in range(rank, trials, world):
            adapter = Adapter(modules, LORA_RANK, 2.0)
            adapter.initialise(seed)
            adapter.move(backbone.device)
            self._adapters.append(adapter)
        self._step = 0
        pieces = [adapter for adapter in self._adapters for _ in range(batch)]
        at_once = max(1, asked.tokens_per_tick // length)
        # The fullest rank says how many ticks a round has; the others take empty ones.
        most = -(-(-(-trials // world) * batch) // at_once)
        self._ticks = [self._shares(pieces[start * at_once : (start + 1) * at_once], length) for start in range(most)]

    def _shares(self, pieces: list[Any], length: int) -> list[Any]:
        import numpy as np
        from alto_training.executor.tick import Item, PackedSequence, Share

        ids = np.arange(length, dtype=np.int32) % 251
        item = Item((PackedSequence(ids, ids >= 0),), denominator=length - 1)
        unique = list(dict.fromkeys(pieces))
        denominator = float(self._config.batch_size * (length - 1))
        return [Share(one, [item] * pieces.count(one), batch_denominator=denominator) for one in unique]

    def one_pass(self) -> None:
        from alto_training.executor import passes

        passes.train_tick(self._backbone, self._ticks[0])

    def one_round(self) -> None:
        from alto_training.executor import passes
        from alto_training.executor.optimizer import adamw_step, gradient_norm

        for tick in self._ticks:
            passes.train_tick(self._backbone, tick)
        for adapter in self._adapters:
            adamw_step(adapter, self._config, self._step, 1e-4, gradient_norm(adapter))
        self._step += 1


def run_ours(asked: argparse.Namespace, strategy: str, device: torch.device, dtype: torch.dtype) -> Any:
    from alto_training.executor.backends import choose_backend
    from alto_training.sharding.traffic import TrafficMeter

    backbone = load_ours(asked, strategy, device, dtype)
    name = asked.backend
    if name == "auto":
        import alto_kernels

        wanted = "cpu" if device.type == "cpu" else "cutlass"
        name = wanted if wanted in alto_kernels.backends(dtype) else "reference"
    order = getattr(backbone.weights, "order", None)
    for trials, batch, length in combinations(asked):
        seats = -(-trials // dist.get_world_size())
        backbone.use_backend(choose_backend(name, backbone.layers, seats, device, dtype))
        ours = OurTrials(asked, backbone, trials, batch, length)
        with TrafficMeter() as meter:
            ours.one_pass()
        seconds = timed(asked.rounds, device, ours.one_round)
        backbone_bytes = order.gathered_bytes(training=True) if order else 0
        yield {
            "trials": trials,
            "batch": batch,
            "length": length,
            "backend": name,
            "tokens_per_s": round(trials * batch * length / seconds, 1),
            "bytes_per_tick": sum(meter.bytes.values()),
            "adapter_bytes": sum(meter.bytes.values()) - backbone_bytes,
        }
        del ours


# The others: one adapter at a time, data-parallel


def peft_model(model: Any) -> Any:
    from peft import LoraConfig, get_peft_model

    return get_peft_model(model, LoraConfig(r=LORA_RANK, lora_alpha=2 * LORA_RANK, target_modules=TARGETS))


def fsdp_step(asked: argparse.Namespace, device: torch.device, dtype: torch.dtype) -> Callable[[Any], None]:
    """Return a step of PEFT under FSDP2: each decoder layer and the whole sharded, base and adapter alike."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from transformers import AutoModelForCausalLM

    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    with torch.device("meta"):
        model = peft_model(AutoModelForCausalLM.from_config(make_config(asked.shape), dtype=dtype))
    model.to(dtype)
    base = model.get_base_model()
    for layer in base.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    model.to_empty(device=device)
    for parameter in model.parameters():
        local = parameter.to_local()
        torch.nn.init.normal_(local, 0.0, 0.02)
    # Not parameters: what `to_empty` left of the rotary embedding's buffers is computed anew.
    fresh = type(base.model.rotary_emb)(config=base.config)
    for name, buffer in fresh.named_buffers():
        base.model.rotary_emb.get_buffer(name).copy_(buffer)
    optimizer = torch.optim.AdamW([one for one in model.parameters() if one.requires_grad], lr=1e-4)

    def step(ids: Any) -> None:
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def zero3_step(asked: argparse.Namespace, device: torch.device, dtype: torch.dtype) -> Callable[[Any], None]:
    """Return a step of PEFT under DeepSpeed's ZeRO-3, by its own engine."""
    import deepspeed
    import torch._dynamo  # before zero.Init replaces the constructors of tensors, which its import uses
    from transformers import AutoModelForCausalLM

    settings = {
        "train_micro_batch_size_per_gpu": 1,
        "bf16": {"enabled": dtype is torch.bfloat16},
        "zero_optimization": {"stage": 3, "overlap_comm": True, "contiguous_gradients": True},
    }
    deepspeed.init_distributed(dist_backend=dist.get_backend(), verbose=False)
    with deepspeed.zero.Init(config_dict_or_path=settings, dtype=dtype):
        model = AutoModelForCausalLM.from_config(make_config(asked.shape), dtype=dtype)
    model = peft_model(model)
    optimizer = torch.optim.AdamW([one for one in model.parameters() if one.requires_grad], lr=1e-4)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings)

    def step(ids: Any) -> None:
        engine.backward(engine(input_ids=ids, labels=ids, use_cache=False).loss)
        engine.step()

    return step


def run_others(asked: argparse.Namespace, strategy: str, device: torch.device, dtype: torch.dtype) -> Any:
    make = {"fsdp_peft": fsdp_step, "zero3_peft": zero3_step}[strategy]
    step = make(asked, device, dtype)
    done: dict[tuple[int, int], dict[str, Any]] = {}
    for trials, batch, length in combinations(asked):
        # One adapter after another: the number of trials changes nothing.
        if (batch, length) not in done:
            ids = (torch.arange(length, device=device) % 251).repeat(batch, 1)
            seconds = timed(asked.rounds, device, lambda ids=ids: step(ids))  # type: ignore[misc]
            tokens = dist.get_world_size() * batch * length
            done[batch, length] = {"batch": batch, "length": length, "tokens_per_s": round(tokens / seconds, 1)}
        yield {"trials": trials, **done[batch, length]}


# Processes


def combinations(asked: argparse.Namespace) -> list[tuple[int, int, int]]:
    """Return (trials, batch, length), those with fewer tokens first: memory runs out at the end, if it does."""
    every = [(trials, batch, length) for trials in asked.trials for batch in asked.batch for length in asked.length]
    return sorted(every, key=lambda one: (one[1] * one[2], one[0]))


def run_rank(asked: argparse.Namespace) -> None:
    """Be one rank: measure one strategy, and write results as JSON lines (rank 0)."""
    rank = int(os.environ["RANK"])
    device = torch.device(asked.device)
    if device.type == "cuda":
        device = torch.device("cuda", rank)
        torch.cuda.set_device(device)
    dist.init_process_group(
        "nccl" if device.type == "cuda" else "gloo",
        init_method=f"file://{asked.rendezvous}",
        rank=rank,
        world_size=int(os.environ["WORLD_SIZE"]),
    )
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    torch.manual_seed(0)
    run = run_ours if asked.rank_of in OURS else run_others
    with Path(asked.results).open("a") as results:
        for result in run(asked, asked.rank_of, device, dtype):
            if device.type == "cuda":
                result["peak_gb"] = round(torch.cuda.max_memory_allocated(device) / 1e9, 2)
                torch.cuda.reset_peak_memory_stats(device)
            if rank == 0:
                results.write(json.dumps({"strategy": asked.rank_of, **result}) + "\n")
                results.flush()
    sys.stdout.flush()
    # NCCL's own clean-up may wait for ranks that are gone.
    os._exit(0)


def launch(asked: argparse.Namespace, strategy: str, gpus: int, folder: Path) -> list[dict[str, Any]]:
    """Run one strategy on `gpus` processes; return its results, the last of which says how it failed if it did."""
    results, log = folder / f"{strategy}-{gpus}.jsonl", folder / f"{strategy}-{gpus}.log"
    results.touch()
    rendezvous = folder / f"rendezvous-{strategy}-{gpus}"
    command = [sys.executable, __file__, *sys.argv[1:], "--rank-of", strategy, "--results", str(results)]
    command += ["--rendezvous", str(rendezvous)]
    processes = []
    for rank in range(gpus):
        environment = {**os.environ, "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(gpus)}
        if asked.device == "cpu":
            environment |= {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
        with log.open("ab") as output:
            processes.append(subprocess.Popen(command, env=environment, stdout=output, stderr=output))
    deadline = time.monotonic() + asked.timeout_s
    while any(process.poll() is None for process in processes) and time.monotonic() < deadline:
        if any(process.poll() for process in processes):
            break
        time.sleep(0.2)
    failed = any(process.poll() != 0 for process in processes)
    for process in processes:
        if process.poll() is None:
            process.kill()
        process.wait()
    found = [{"gpus": gpus, **json.loads(line)} for line in results.read_text().splitlines()]
    if failed:
        text = log.read_text(errors="replace")
        why = "out of memory" if "OutOfMemoryError" in text or "TickTooLarge" in text else text[-1500:]
        found.append({"strategy": strategy, "gpus": gpus, "failed": why})
    return found


def missing(asked: argparse.Namespace) -> dict[str, str]:
    """Return what cannot be run here, and why."""
    found = {}
    if importlib.util.find_spec("peft") is None:
        found |= dict.fromkeys(OTHERS, "peft is not installed")
    if importlib.util.find_spec("deepspeed") is None:
        found["zero3_peft"] = "deepspeed is not installed here: carry its wheel (and hjson's), or leave it out"
        if asked.engine == "deepspeed":
            found |= dict.fromkeys(("sharded", "hybrid"), "deepspeed is not installed here: take --engine fsdp2")
    if asked.gpus < 4 or asked.ranks_per_host in (None, asked.gpus):
        found["hybrid"] = "needs 4 GPUs at the least and --ranks-per-host below their number"
    return found


def numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpus", type=int, default=2)
    parser.add_argument("--shape", choices=SHAPES, default="8b")
    parser.add_argument("--trials", type=numbers, default=[8, 32])
    parser.add_argument("--batch", type=numbers, default=[1, 2, 4, 8])
    parser.add_argument("--length", type=numbers, default=[256, 1024])
    parser.add_argument("--strategies", default="single,replicated,sharded,hybrid,fsdp_peft,zero3_peft")
    parser.add_argument("--engine", choices=["deepspeed", "fsdp2", "auto"], default="auto")
    parser.add_argument("--backend", default="auto", help="alto_kernels' back end")
    parser.add_argument("--ranks-per-host", type=int, help="for hybrid: share the backbone among so many")
    parser.add_argument("--tokens-per-tick", type=int, default=8192)
    parser.add_argument("--prefetch", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--timeout-s", type=float, default=400.0, help="of one strategy")
    parser.add_argument("--rank-of", help=argparse.SUPPRESS)
    parser.add_argument("--results", help=argparse.SUPPRESS)
    parser.add_argument("--rendezvous", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.engine == "auto":
        asked.engine = "deepspeed" if importlib.util.find_spec("deepspeed") else "fsdp2"
    if asked.rank_of:
        run_rank(asked)
    if asked.device == "cuda" and torch.cuda.device_count() < asked.gpus:
        print(f"there are {torch.cuda.device_count()} GPUs here, not {asked.gpus}: give --gpus, or --device cpu")
        return 2
    absent = missing(asked)
    results = []
    with tempfile.TemporaryDirectory() as folder:
        for strategy in asked.strategies.split(","):
            if strategy in absent:
                print(json.dumps({"strategy": strategy, "missing": absent[strategy]}), flush=True)
                continue
            for result in launch(asked, strategy, 1 if strategy == "single" else asked.gpus, Path(folder)):
                results.append(result)
                print(json.dumps(result), flush=True)
    device = torch.cuda.get_device_name(0) if asked.device == "cuda" else f"cpu x{os.cpu_count()}"
    summary = {
        "benchmark": "multi_gpu",
        "shape": asked.shape,
        "gpus": asked.gpus,
        "device": device,
        "engine": asked.engine,
        "torch": torch.__version__,
        "results": results,
        "missing": absent,
        "ratios": ratios(results, asked.gpus),
    }
    print(json.dumps(summary))
    return 1 if any("failed" in result and result["failed"] != "out of memory" for result in results) else 0


def ratios(results: list[dict[str, Any]], gpus: int) -> list[dict[str, Any]]:
    """Return what each combination gives: scaling over one GPU, and ours over the others."""
    speed = {
        (one["strategy"], one["trials"], one["batch"], one["length"]): one["tokens_per_s"]
        for one in results
        if "tokens_per_s" in one
    }
    found = []
    for trials, batch, length in sorted({key[1:] for key in speed}):
        here = {key[0]: value for key, value in speed.items() if key[1:] == (trials, batch, length)}
        row: dict[str, Any] = {"trials": trials, "batch": batch, "length": length}
        pairs = [("replicated", "single", gpus), ("sharded", "replicated", 1), ("sharded", "fsdp_peft", 1)]
        for ours, other, scale in [*pairs, ("sharded", "zero3_peft", 1), ("replicated", "fsdp_peft", 1)]:
            if ours in here and other in here:
                row[f"{ours}_over_{scale if scale > 1 else ''}{other}"] = round(here[ours] / here[other] / scale, 3)
        found.append(row)
    return found


if __name__ == "__main__":
    sys.exit(main())
