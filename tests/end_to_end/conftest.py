"""The whole house as a user has it: `alto up` with its three processes, a tiny Llama on disk, and the SDK."""

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from house import House


@pytest.fixture(scope="session")
def models_root(tmp_path_factory, save_tiny_llama):
    """A models root with `tiny`: a random Llama of two layers and a tokenizer of bytes."""
    root = tmp_path_factory.mktemp("models")
    save_tiny_llama(root / "tiny", hidden_size=64, intermediate_size=96, max_position_embeddings=128)
    return root


@pytest.fixture(scope="session")
def house(tmp_path_factory, models_root):
    """The services, running."""
    opened = House(tmp_path_factory.mktemp("home"), models_root)
    opened.start()
    yield opened
    opened.stop()


@pytest.fixture
def client(house):
    with house.client() as opened:
        yield opened


@pytest.fixture(scope="session")
def data_folder(tmp_path_factory):
    """A small dataset that a byte model can learn: a word and its letters, spelled."""
    folder = tmp_path_factory.mktemp("data")
    words = [f"{a}{b}{c}" for a in "bcdfgh" for b in "aeiou" for c in "lmnr"]
    rows = [{"prompt": f"Spell {word}: ", "completion": "-".join(word.upper())} for word in words]
    for name, part in (("train", rows[24:]), ("validation", rows[:24])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    return folder


@pytest.fixture
def task_file(data_folder, tmp_path):
    """Write a task file: `task_file(search={...}, ...)` gives its path; what is named replaces the default."""
    import yaml

    def write(**changes):
        content = {
            "name": "spelling",
            "base_model": "tiny",
            "dataset": str(data_folder / "train.jsonl"),
            "validation": str(data_folder / "validation.jsonl"),
            "search": {
                "base": {"batch_size": 4, "max_steps": 24, "max_length": 64},
                "grid": {"learning_rate": [1.0e-4, 3.0e-3, 1.0e-2], "lora_rank": [4, 8]},
            },
            "early_exit": {"policy": "paper", "warmup_fraction": 0.25, "keep_fraction": 0.34},
            "evaluation": {"count": 8},
            "output": str(tmp_path / "adapter"),
            **changes,
        }
        path = tmp_path / "task.yaml"
        path.write_text(yaml.safe_dump(content))
        return path

    return write
