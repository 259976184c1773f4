"""Fixtures of the executor's tests; the jobs and models they run are in tiny_jobs.py."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from alto_training.executor.backbone import Backbone

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Two cores are shared by several test processes: threads that wait for each other would take most of the time."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def backbone() -> Backbone:
    from tiny_jobs import tiny_backbone

    return tiny_backbone()
