"""Where the tests of this room find their helpers, and what their processes share."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the tiny model and its datasets."""
    from tiny_task import make_job, mixed_configs

    folder = tmp_path_factory.mktemp("tiny")
    make_job(folder, *mixed_configs())
    return folder
