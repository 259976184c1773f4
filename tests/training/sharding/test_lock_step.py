"""Passes over a backbone in shares, by two real processes, with either engine."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_task import write_model


@pytest.mark.slow
def test_a_backbone_in_shares_gives_the_same_bits_and_sends_its_own_weights_alone(tiny_folder: Path) -> None:
    write_model(tiny_folder / "tied", tie_word_embeddings=True)
    script = Path(__file__).parent / "passes_in_lock_step.py"
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "DS_ACCELERATOR": "cpu",
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    }
    ranks = [
        subprocess.Popen(
            [sys.executable, str(script), str(tiny_folder), str(rank), "2"], env=environment, stdout=subprocess.PIPE
        )
        for rank in range(2)
    ]
    said = [rank.communicate(timeout=240)[0].decode().splitlines() for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0]
    for lines in said:
        answers = json.loads(lines[-1])
        assert len(answers) == 12
        for name, answer in answers.items():
            assert answer["same"], name
            # All that torch.distributed sent are the gathers of the backbone: nothing of any adapter.
            assert answer["sent"] == {"_allgather_base_": answer["expected"]}, name
