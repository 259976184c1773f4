"""Which strategy is chosen, and what passes between processes as JSON."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from alto_common.tuning import EarlyExit, Schedule, ScheduleKind, TrialConfig
from alto_training.executor.control import Cancel, Command, Pause, ReviveTrial, StopTrial
from alto_training.executor.events import Event, Outcome, TaskState, TrialDecided, TrialFinished, TrialState, Verdict
from alto_training.executor.settings import ExecutorSettings
from alto_training.sharding.errors import StrategyError
from alto_training.sharding.plain_json import decode, decode_named, encode, encode_named
from alto_training.sharding.rank_order import RankOrder
from alto_training.sharding.strategy import (
    EngineName,
    Strategy,
    StrategyRecords,
    backbone_bytes,
    choose_strategy,
    make_layout,
)
from tiny_task import make_job, mixed_configs

GIB = 2**30


@pytest.mark.parametrize(
    ("ranks", "per_host", "backbone", "measured", "chosen"),
    [
        (1, 1, 16, {}, Strategy.SINGLE),
        (4, 4, 16, {}, Strategy.REPLICATED),
        (4, 4, 64, {}, Strategy.SHARDED),
        (8, 4, 64, {}, Strategy.HYBRID),
        (8, 4, 300, {}, Strategy.SHARDED),
        (4, 4, 16, {Strategy.SHARDED: 9.0, Strategy.REPLICATED: 8.0}, Strategy.SHARDED),
        (4, 4, 64, {Strategy.REPLICATED: 8.0}, Strategy.SHARDED),
    ],
)
def test_what_fits_and_was_fastest_is_chosen(
    ranks: int, per_host: int, backbone: int, measured: dict[Strategy, float], chosen: Strategy
) -> None:
    assert choose_strategy(ranks, per_host, backbone * GIB, 80 * GIB, measured) is chosen


def test_a_backbone_that_fits_nowhere_is_refused_with_the_numbers() -> None:
    with pytest.raises(StrategyError, match=r"140\.0 GiB does not fit on 2 worker ranks of 80\.0 GiB"):
        choose_strategy(2, 2, 140 * GIB, 80 * GIB, {})


def test_layouts() -> None:
    assert list(make_layout(Strategy.HYBRID, 8, 4).group_of(5)) == [4, 5, 6, 7]
    assert list(make_layout(Strategy.REPLICATED, 4, 4).group_of(2)) == [2]
    assert list(make_layout(Strategy.SHARDED, 4, 2).group_of(2)) == [0, 1, 2, 3]
    with pytest.raises(StrategyError):
        make_layout(Strategy.HYBRID, 6, 4)
    with pytest.raises(StrategyError):
        make_layout(Strategy.SINGLE, 2, 2)


def test_records_are_kept_by_model_device_and_ranks(tmp_path: Path) -> None:
    records = StrategyRecords(tmp_path / "new" / "records.json")
    assert records.read("model", "h100", 4) == {}
    records.note("model", "h100", 4, Strategy.SHARDED, 10.0)
    records.note("model", "h100", 4, Strategy.REPLICATED, 12.0)
    records.note("model", "h100", 2, Strategy.SHARDED, 5.0)
    assert records.read("model", "h100", 4) == {Strategy.SHARDED: 10.0, Strategy.REPLICATED: 12.0}


def test_bytes_of_a_backbone_are_read_from_headers_alone(tiny_folder: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_folder / "model")
    assert backbone_bytes(tiny_folder / "model", 4) == 4 * sum(one.numel() for one in model.parameters())


@pytest.mark.parametrize("engine", [EngineName.FSDP2, None])
def test_an_order_survives_json(tmp_path: Path, engine: EngineName | None) -> None:
    configs = [*mixed_configs(), TrialConfig(schedule=Schedule(ScheduleKind.COSINE, 0.1), target_modules=("q_proj",))]
    order = RankOrder(
        jobs=(make_job(tmp_path, *configs, early_exit=EarlyExit("asha")),),
        workdir=tmp_path,
        settings=ExecutorSettings(cache_dir=tmp_path),
        strategy=Strategy.HYBRID,
        engine=engine,
        ranks=4,
        ranks_per_host=2,
        parent_process_id=1,
    )
    order.write(tmp_path)
    assert RankOrder.read(tmp_path) == order


def test_commands_events_and_outcomes_survive_json() -> None:
    for command in (Pause(), Cancel("enough"), StopTrial("a", "task"), ReviveTrial("b")):
        assert decode_named(Command, json.loads(json.dumps(encode_named(command)))) == command
    decided = TrialDecided("task", "a", 3, Verdict.STOP, "rule", "because", {"loss": 0.1}, None)
    assert decode_named(Event, json.loads(json.dumps(encode_named(decided)))) == decided
    finished = TrialFinished("task", "a", TrialState.FAILED, "no", 0, 9, None, None, None, None, 0, 18)
    outcome = Outcome("task", TaskState.FAILED, (finished,), None)
    assert decode(Outcome, json.loads(json.dumps(encode(outcome)))) == outcome


@pytest.mark.parametrize(
    "damage", [lambda text: "[]", lambda text: text[:9], lambda text: text.replace("sharded", "x")]
)
def test_records_that_cannot_be_understood_are_measured_again(tmp_path: Path, damage: Callable[[str], str]) -> None:
    path = tmp_path / "records.json"
    records = StrategyRecords(path)
    records.note("model", "h100", 4, Strategy.SHARDED, 10.0)
    path.write_text(damage(path.read_text()))
    assert records.read("model", "h100", 4) == {}
    records.note("model", "h100", 4, Strategy.REPLICATED, 12.0)
    assert records.read("model", "h100", 4) == {Strategy.REPLICATED: 12.0}
