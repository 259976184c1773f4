"""What a tick of the executor costs on one GPU: tokens/s over a Llama of 8B's widths, by back end and adapters.

    python benchmarks/executor_gpu.py --output benchmarks/results/executor-h100.json

A few layers of random bf16 weights, 8192 tokens a tick in sequences of 256 shared out evenly among the adapters, ranks
8 to 64 on all linear layers. A tick is what `passes.train_tick` does: laying out tokens, forward, loss, backward.
`frozen` is the same pass without any adapter, gradients of the activations included. `plan_ms` is the time the host
takes to plan a tick and renew the kernels' copies of the weights, which is within the tick's. The last line is JSON.
"""

from __future__ import annotations

import argparse
import datetime
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import alto_kernels
import numpy as np
import torch
from alto_common.tuning import TrialConfig
from alto_training.executor import passes
from alto_training.executor.adapter import Adapter
from alto_training.executor.backbone import Backbone, prepare_backbone
from alto_training.executor.backends import choose_backend
from alto_training.executor.kernel_backend import KernelBackend
from alto_training.executor.lora_backend import AdaptedLayer, LoraBackend
from alto_training.executor.tick import Item, PackedSequence, Share, Tick, build_tick

RANKS = (8, 16, 32, 64)
SEQUENCE_TOKENS = 256


class FrozenOnly:
    """The backbone alone, its backward pass included."""

    name = "frozen"

    def prepare(self, tick: Tick) -> None:
        pass

    def begin(self, tick: Tick) -> None:
        pass

    def forward(
        self, x_TK: torch.Tensor, layers: Sequence[AdaptedLayer], tick: Tick
    ) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        return [layer.frozen.product(x_TK) for layer in layers], []

    def backward(
        self,
        dys_TN: Sequence[torch.Tensor],
        x_TK: torch.Tensor,
        kept: Sequence[torch.Tensor],
        layers: Sequence[AdaptedLayer],
        tick: Tick,
        needs_dx: bool,
    ) -> torch.Tensor | None:
        dx_TK = None
        for dy_TN, layer in zip(dys_TN, layers, strict=True):
            dx_TK = layer.frozen.input_gradient(dy_TN, dx_TK) if needs_dx else None
        return dx_TK


def load(layers: int, device: torch.device) -> Backbone:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=32_000,
        hidden_size=4096,
        intermediate_size=14_336,
        num_hidden_layers=layers,
        num_attention_heads=32,
        num_key_value_heads=8,
        max_position_embeddings=4096,
    )
    torch.manual_seed(0)
    with torch.device(device):
        model = LlamaForCausalLM(config).to(torch.bfloat16)
    return prepare_backbone(model, "llama-8b-widths", device)


def shares_of(backbone: Backbone, adapters: int, tokens: int) -> list[Share]:
    draws = np.random.default_rng(0)
    shares = []
    for number in range(adapters):
        config = TrialConfig(lora_rank=RANKS[number % len(RANKS)], learning_rate=1e-4)
        adapter = Adapter(backbone.adapted_modules(config), config.lora_rank, config.scaling)
        adapter.initialise(number, backbone.device)
        items = []
        for _ in range(tokens // adapters // SEQUENCE_TOKENS):
            ids = draws.integers(0, 32_000, SEQUENCE_TOKENS).astype(np.int32)
            items.append(Item((PackedSequence(ids, ids >= 0),), denominator=SEQUENCE_TOKENS))
        shares.append(Share(adapter, items, batch_denominator=float(SEQUENCE_TOKENS * len(items))))
    return shares


def milliseconds(step: Callable[[], object], repeats: int) -> float:
    """Return the median wall time of a step, the device's work included."""
    times = []
    for _ in range(repeats + 2):
        torch.cuda.synchronize()
        started = time.perf_counter()
        step()
        torch.cuda.synchronize()
        times.append((time.perf_counter() - started) * 1e3)
    return statistics.median(times[2:])


def measure(backbone: Backbone, shares: list[Share], name: str, repeats: int) -> dict[str, Any]:
    backend: LoraBackend
    if name == FrozenOnly.name:
        backend = FrozenOnly()
    else:
        backend = choose_backend(name, backbone.layers, len(shares), backbone.device, backbone.dtype)
    backbone.use_backend(backend)
    torch.cuda.reset_peak_memory_stats()
    tick_ms = milliseconds(lambda: passes.train_tick(backbone, passes.lay_out(backbone, shares)).tolist(), repeats)
    tokens = sum(item.tokens for share in shares for item in share.items)
    found = {
        "backend": name,
        "adapters": len(shares),
        "tick_ms": round(tick_ms, 2),
        "tokens_per_second": round(tokens / tick_ms * 1e3),
        "peak_gib": round(torch.cuda.max_memory_allocated() / 2**30, 2),
    }
    if isinstance(backend, KernelBackend):
        tick = build_tick(shares, training=True, device=backbone.device)
        found["plan_ms"] = round(milliseconds(lambda: backend.make_plan(tick), repeats), 2)
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--output", type=Path, help="write the JSON object there too")
    options = parser.parse_args()
    if not alto_kernels.cuda_available():
        print("benchmarks/executor_gpu.py: needs the CUDA build and a GPU that it has kernels for", file=sys.stderr)
        return 1
    backbone = load(options.layers, torch.device("cuda"))
    rows = []
    for adapters in (8, 32):
        shares = shares_of(backbone, adapters, options.tokens)
        for name in ("frozen", "cutlass", "reference", "frozen"):
            rows.append(measure(backbone, shares, name, options.repeats))
            print(rows[-1], flush=True)
    result = {
        "benchmark": "executor_gpu",
        "date": datetime.date.today().isoformat(),
        "command": "python " + " ".join(sys.argv),
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "kernels": alto_kernels.cuda_kernels()[0].value,
        "layers": options.layers,
        "tokens": options.tokens,
        "rows": rows,
    }
    print(json.dumps(result))
    if options.output:
        options.output.write_text(json.dumps(result, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
