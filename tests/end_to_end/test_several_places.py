"""A task that asks for two places of a node is trained by two processes, and comes to what one comes to."""

import json

import torch
from alto_client import load_task_file
from house import House
from safetensors.torch import load_file

# AdamW divides what is nearly zero by itself: a large epsilon keeps a rounding from becoming a step.
SEARCH = {
    "base": {"batch_size": 4, "max_steps": 16, "max_length": 64, "adam_epsilon": 1e-3},
    "grid": {"learning_rate": [3.0e-3, 1.0e-2], "lora_rank": [4, 8]},
}


def test_alto_tune_trains_on_as_many_places_as_are_asked_for(models_root, task_file, tmp_path):
    house = House(tmp_path / "home", models_root)
    house.environment["ALTO_NODE_GPUS"] = "2"
    house.start()
    try:
        weights = {}
        for places in (2, 1):
            path = task_file(
                search=SEARCH,
                early_exit={"policy": "none"},
                resources={"gpus": places},
                output=str(tmp_path / f"on-{places}"),
            )
            with house.client() as client:
                result = client.tune(load_task_file(path))
                assert result.succeeded
                for trial in result.trials:
                    folder = tmp_path / f"{places}-{trial.trial_id}"
                    client.download_adapter(result.task.task_id, folder, trial.trial_id)
                    key = trial.config.lora_rank, trial.config.learning_rate
                    weights[places, key] = load_file(folder / "adapter_model.safetensors")
        records = json.loads((tmp_path / "home" / "work" / "strategies.json").read_text())
        assert [name.rpartition(" ")[2] for name in records] == ["x2"]
    finally:
        house.stop()
    assert len(weights) == 8
    for (places, key), ours in weights.items():
        for name, weight in ours.items():
            error = torch.linalg.vector_norm(weight - weights[1, key][name])
            assert error <= 1e-5 * torch.linalg.vector_norm(weights[1, key][name]), (places, key, name)
