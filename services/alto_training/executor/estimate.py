"""What a job will take on this machine, before it is run: time, and peak memory."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from alto_common.base_models import ModelFacts, inspect
from alto_common.cost_model import CostModel, enough_tokens
from alto_common.search_load import Machine, Row, SearchLoad, search_load
from alto_common.tuning import ObjectiveKind, TuningJob

from alto_training.executor.backends import choose_backend
from alto_training.executor.budget import backbone_facts, choose_budget, known_costs, prior_costs
from alto_training.executor.calibration import PROFILE_SEATS, calibrate
from alto_training.executor.data import TokenisedDataset
from alto_training.executor.loading import load_job_backbone, locate_base_model, open_job_data
from alto_training.executor.settings import ExecutorSettings


@dataclass(frozen=True)
class Estimate:
    """The time from the start of the process to its end, and the peak memory of it (of the accelerator, if any)."""

    load: SearchLoad
    machine: Machine
    measured: bool
    expected_seconds: float
    upper_seconds: float
    peak_memory_bytes: float


def estimate_job(job: TuningJob, settings: ExecutorSettings, cache_dir: Path) -> Estimate:
    """Return what the job takes with these settings, by the cost model that was measured here, else by the prior."""
    facts = inspect(locate_base_model(job.base_model))
    known = known_costs(settings, facts)
    costs = known or prior_costs(settings, facts)
    machine = _machine(job, settings, facts, costs)
    train, validation = open_job_data(job, cache_dir)
    assert isinstance(train, TokenisedDataset)
    assert isinstance(validation, TokenisedDataset)
    load = search_load(
        facts,
        job.trials,
        [Row(*size) for size in train.sequence_sizes()],
        len(train),
        [Row(*size) for size in validation.sequence_sizes()],
        len(validation),
        job.evaluation,
        job.early_exit,
        machine,
        sequences_per_row=2 if job.objective.kind is ObjectiveKind.DPO else 1,
    )
    return Estimate(
        load,
        machine,
        measured=known is not None,
        expected_seconds=load.expected_seconds(costs),
        upper_seconds=load.upper_seconds(costs),
        peak_memory_bytes=load.peak_bytes(costs),
    )


def measure_costs(
    job: TuningJob,
    settings: ExecutorSettings,
    folder: Path,
    clock: Callable[[], float],
    since_start: Callable[[], float],
) -> CostModel:
    """Load the job's backbone, measure what ticks over it cost, and keep that in `folder` for every later estimate.

    `since_start` gives the seconds since this process began, by the same clock.
    """
    backbone = load_job_backbone(job.base_model, settings)
    if settings.recompute:
        backbone.recompute_activations()
    start_seconds = since_start()
    device = torch.device(settings.device)
    backbone.use_backend(choose_backend(settings.backend, backbone.layers, PROFILE_SEATS, device, backbone.dtype))
    most_tokens = enough_tokens(device.type == "cpu", backbone_facts(backbone).hidden_size)
    return calibrate(settings, backbone, most_tokens, folder, clock, start_seconds)


def _machine(job: TuningJob, settings: ExecutorSettings, facts: ModelFacts, costs: CostModel) -> Machine:
    configs = [trial.config for trial in job.trials]
    budget = choose_budget(settings, facts, costs, configs, backbone_loaded=False)
    evaluation_tokens = settings.evaluation_tokens_per_tick or budget.tokens_per_tick
    on_host = torch.device(settings.device).type == "cpu"
    return Machine(budget.slots, budget.tokens_per_tick, evaluation_tokens, parked_beside=on_host)
