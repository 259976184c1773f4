"""`alto train-local` over a tiny random Llama: the executor without any service."""

import json
import re

import pytest
from alto_cli.app import app
from typer.testing import CliRunner

WORDS = tuple("abcdefgh")
TASK_FILE = """\
name: tiny
base_model: {model}
dataset: rows.jsonl
validation_fraction: 0.25
search:
  base: {{max_steps: 4, max_length: 32, batch_size: 2, lora_rank: 4}}
  grid: {{learning_rate: [1e-3, 1e-2]}}
early_exit: none
evaluation: {{count: 2}}
output: out
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("model")
    vocabulary = {word: index for index, word in enumerate(["<unk>", "<eos>", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="<eos>").save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=64,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture
def task_file(model, tmp_path):
    rows = [{"prompt": f"{WORDS[n % 8]} ", "completion": " ".join(WORDS[n % 5 : n % 5 + 3])} for n in range(24)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "task.yaml").write_text(TASK_FILE.format(model=model))
    return tmp_path / "task.yaml"


def train(task_file, *options):
    return CliRunner().invoke(app, ["train-local", str(task_file), *options])


def test_a_search_without_services_ends_with_a_leaderboard_and_an_adapter(task_file):
    result = train(task_file)
    assert result.exit_code == 0, result.stderr
    assert re.search(r"trial-00\d finished, best validation loss", result.stdout)
    assert re.search(r"1 +trial-00\d +\S+ +\d\.\d{4}", result.stdout)
    out = task_file.parent / "out"
    assert (out / "adapter_config.json").exists()
    assert (out / "adapter_model.safetensors").exists()

    # The same command again: the search has ended already, and is told again without training.
    again = train(task_file, "--json")
    assert again.exit_code == 0, again.stderr
    told = json.loads(again.stdout.splitlines()[-1])["result"]
    assert {trial["state"] for trial in told["trials"]} == {"SUCCEEDED"}
    assert told["adapter_folder"] == str(out)


def test_what_cannot_be_trained_is_said_before_training(task_file):
    text = task_file.read_text()
    task_file.write_text(text + "objective: dpo\n")
    result = train(task_file)
    assert result.exit_code == 2
    assert "DPO objective needs rows of {prompt, chosen, rejected}" in result.stderr
    task_file.write_text(text.replace("lora_rank: 4", "lora_rank: 4, target_modules: [nothing_proj]"))
    result = train(task_file)
    assert result.exit_code == 1
    assert "nothing_proj" in result.stdout + result.stderr
