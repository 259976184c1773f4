"""One of two ranks: passes over a sharded backbone must give what an unsharded one gives, to the last bit.

    python passes_in_lock_step.py FOLDER RANK WORLD

FOLDER holds models `model` and `tied`. Rank 1 has more tokens than rank 0, adapts fewer layers, and has no work at all
in the second pass. Prints one JSON line with what it measured.
"""

import json
import os
import sys
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from alto_common.tuning import TrialConfig
from alto_training.executor import passes
from alto_training.executor.adapter import Adapter
from alto_training.executor.backbone import Backbone, load_backbone
from alto_training.executor.tick import Item, PackedSequence, Share
from alto_training.sharding.loading import make_engine
from alto_training.sharding.sharded_backbone import ShardedWeights, load_sharded_backbone
from alto_training.sharding.strategy import EngineName
from alto_training.sharding.traffic import TrafficMeter
from tiny_task import room_for
from transformers import AutoConfig

CPU = torch.device("cpu")
CONFIGS = (
    TrialConfig(lora_rank=4, lora_dropout=0.1),
    TrialConfig(lora_rank=3, layers=(1,), target_modules=("q_proj",)),
)


def make_share(backbone: Backbone, rank: int, items: int) -> Share:
    config = CONFIGS[rank % 2]
    adapter = Adapter(backbone.adapted_modules(config), config.lora_rank, 2.0)
    adapter.initialise(rank)
    adapter.param.add_(0.01)
    draws = np.random.default_rng(rank)
    sequences = [draws.integers(2, 92, draws.integers(5, 40)).astype(np.int32) for _ in range(items)]
    packed = [
        Item((PackedSequence(ids, np.arange(len(ids)) >= 3, number),), len(ids) - 3)
        for number, ids in enumerate(sequences)
    ]
    return Share(adapter, packed, batch_denominator=50.0, dropout=config.lora_dropout, seed=rank)


def compare(sharded: Backbone, whole: Backbone, rank: int) -> dict[str, object]:
    """Run passes with and without work on both; return whether anything differed, and the bytes that were sent."""
    assert isinstance(sharded.weights, ShardedWeights)
    order = sharded.weights.order
    meter = TrafficMeter()
    same = sharded.fingerprint == whole.fingerprint and sharded.parameters == whole.parameters
    for number in range(3):
        idle = number == 1 and rank == 1
        share = make_share(sharded, rank, 3 + 4 * rank)
        with meter:
            losses = passes.train_tick(sharded, passes.lay_out(sharded, [] if idle else [share])).tolist()
            counts = passes.item_losses(sharded, [share] if rank == 0 else [], 1000, most=lambda count: 1)
        if idle:
            continue
        alone = make_share(whole, rank, 3 + 4 * rank)
        same = same and losses == passes.train_tick(whole, passes.lay_out(whole, [alone])).tolist()
        same = same and torch.equal(share.adapter.grad, alone.adapter.grad)
        if rank == 0:
            same = same and counts == passes.item_losses(whole, [alone], 1000)
    return {
        "same": same,
        "sent": dict(meter.bytes),
        "expected": 3 * (order.gathered_bytes(training=True) + order.gathered_bytes(training=False)),
        "shard_bytes": order.shard_bytes,
    }


def main() -> None:
    folder, rank, world = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    os.environ["LOCAL_RANK"] = str(rank)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world)
    answers = {}
    for engine_name in (EngineName.DEEPSPEED, EngineName.FSDP2):
        engine = make_engine(engine_name, dist.group.WORLD, CPU)
        for model in ("model", "tied"):
            for recompute, kept in ((False, 0), (True, 0), (False, 1)):
                sharded = load_sharded_backbone(
                    str(folder / model),
                    engine,
                    torch.float32,
                    CPU,
                    prefetch=1 + recompute,
                    room_bytes=room_for(AutoConfig.from_pretrained(folder / model), kept),
                )
                whole = load_backbone(str(folder / model))
                if recompute:
                    sharded.recompute_activations()
                    whole.recompute_activations()
                answers[f"{engine_name}-{model}-{recompute}-{kept}"] = compare(sharded, whole, rank)
    print(json.dumps(answers))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
