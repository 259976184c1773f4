"""`alto train-local` over a tiny random Llama: the executor without any service."""

import json
import re
import subprocess
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

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


def test_the_adapter_names_the_base_model_as_the_task_file_does(task_file, model, monkeypatch):
    def named(output):
        assert train(task_file, "--output", str(output)).exit_code == 0
        return json.loads((output / "adapter_config.json").read_text())["base_model_name_or_path"]

    assert named(task_file.parent / "by-folder") == str(model)
    monkeypatch.setenv("ALTO_MODELS", str(model.parent))
    task_file.write_text(task_file.read_text().replace(str(model), model.name))
    assert named(task_file.parent / "by-name") == model.name


def test_what_cannot_be_trained_is_said_before_training(task_file):
    text = task_file.read_text()
    task_file.write_text(text + "objective: dpo\n")
    result = train(task_file)
    assert result.exit_code == 2
    assert "DPO objective needs rows of {prompt, chosen, rejected}" in result.stderr
    task_file.write_text(re.sub("early_exit: .*", "early_exit: papr", text))
    result = train(task_file)
    assert result.exit_code == 2
    assert "'papr': give one of" in result.stderr


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ("target_modules: [nothing_proj]", "search.base.target_modules = 'nothing_proj': this model has"),
        ("lora_rank: 200", "search.base.lora_rank = 200: give at most 16"),
        ("layers: [7]", "search.base.layers = [7]: this model has layers 0 to 0"),
        ("max_length: 64000", "search.base.max_length = 64000: give at most 64 tokens"),
        ("epochs: 1e300", "search.base.epochs = 1e+300: give fewer"),
    ],
)
def test_what_admission_would_refuse_is_refused_in_its_words_before_any_weight_is_read(task_file, fields, said):
    text = task_file.read_text().replace("max_steps: 4, ", "") if "epochs" in fields else task_file.read_text()
    kept = text.replace("max_length: 32, ", "").replace("lora_rank: 4", "")
    task_file.write_text(kept.replace("batch_size: 2, ", f"batch_size: 2, {fields}"))
    for command in (["train-local"], ["estimate", "--local", "--device", "cpu"]):
        result = CliRunner().invoke(app, [command[0], str(task_file), *command[1:]])
        assert (result.exit_code, type(result.exception)) == (2, SystemExit), result.output
        assert result.stderr.startswith("error: the search cannot be run\n")
        assert result.stderr.count(said) == 1, result.stderr
        assert "measuring" not in result.stderr
    assert not (task_file.parent / "out.work" / "rows").exists()


def test_a_length_that_nobody_gave_is_no_longer_than_the_models_context(task_file):
    task_file.write_text(task_file.read_text().replace("max_length: 32, ", ""))
    assert train(task_file).exit_code == 0


def test_a_file_with_a_bad_line_is_named(task_file):
    (task_file.parent / "held-out.jsonl").write_text('{"prompt": "a", "completion": "b"}\n{"prompt": "a"}\n')
    text = task_file.read_text().replace("validation_fraction: 0.25", "validation: held-out.jsonl")
    task_file.write_text(text)
    result = train(task_file)
    assert result.exit_code == 2
    assert result.stderr.startswith(
        f"error: {task_file.parent / 'held-out.jsonl'} cannot be used\n  line[2].completion"
    )


def test_a_model_in_four_bits_and_a_number_format_that_there_is_not(task_file):
    result = train(task_file, "--dtype", "nf4")
    assert result.exit_code == 0, result.stderr
    assert (task_file.parent / "out" / "adapter_model.safetensors").exists()
    result = train(task_file, "--dtype", "int3")
    assert result.exit_code == 2 or result.exit_code == 1
    assert "float32, bfloat16, nf4" in result.stderr


def test_an_estimate_for_this_machine_measures_once_and_says_what_it_rests_on(task_file, tmp_path, monkeypatch):
    monkeypatch.setenv("ALTO_CALIBRATIONS", str(tmp_path / "calibrations"))
    monkeypatch.setenv("ALTO_MODELS", str(tmp_path / "models"))

    def estimate(*options):
        return CliRunner().invoke(app, ["estimate", str(task_file), "--local", "--device", "cpu", *options])

    first = estimate("--json")
    assert first.exit_code == 0, first.stderr
    assert "measuring" in first.stderr
    (kept,) = (tmp_path / "calibrations").glob("*.json")
    told = json.loads(first.stdout)
    # Two trials of 4 steps by 2 rows of 4 or 5 tokens, of which 18 rows are there to train on.
    assert told["trials"] == told["slots"] == 2
    assert 2 * 8 * 4 <= told["tokens"] <= 2 * 8 * 5
    assert told["expected_seconds"] == told["upper_seconds"] > 0
    assert told["peak_memory_bytes"] > 50 * 2**20

    second = estimate()
    assert "measuring" not in second.stderr
    assert re.search(r"^memory +\d", second.stdout, re.MULTILINE)
    assert "measured on this machine" in second.stdout
    # More trials take longer and more memory; what was measured is believed as it stands.
    costs = json.loads(kept.read_text())
    costs["model"]["fixed_bytes"] = 5e9
    kept.write_text(json.dumps(costs))
    assert json.loads(estimate("--json").stdout)["peak_memory_bytes"] > 5e9


def test_dataset_check_with_a_model_shows_three_rows_with_their_loss_mask(task_file, model):
    rows = task_file.parent / "rows.jsonl"
    command = ["dataset", "check", str(rows), "--model", str(model), "--max-length", "4"]
    shown = CliRunner().invoke(app, command)
    assert shown.exit_code == 0, shown.stderr
    assert shown.stdout.count("the loss is taken over") == 3
    assert re.findall(r"^line (\d+): ", shown.stdout, re.MULTILINE) == ["1", "13", "24"]
    assert shown.stdout.count("⟦") == shown.stdout.count("⟧") >= 6
    assert "100.0% of the rows lose some" in shown.stdout
    told = json.loads(CliRunner().invoke(app, [*command, "--json"]).stdout)
    assert (told["rows"], told["duplicates"], len(told["examples"])) == (24, 0, 3)
    assert sum(count for _, _, count in told["histogram"]) == 24


def test_a_device_that_is_not_there_is_said_with_those_that_are(task_file):
    result = CliRunner().invoke(app, ["estimate", str(task_file), "--local", "--device", "tpu"])
    assert result.exit_code == 2
    assert "--device tpu" in result.stderr
    assert "cpu" in result.stderr


def test_an_estimate_of_the_service_refuses_what_only_a_machine_of_ones_own_has(task_file):
    result = CliRunner().invoke(app, ["estimate", str(task_file), "--dtype", "nf4"])
    assert result.exit_code == 2
    assert "add --local" in result.stderr


def test_rows_that_this_model_cannot_learn_are_named_without_a_traceback(task_file):
    talk = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    (task_file.parent / "rows.jsonl").write_text((json.dumps(talk) + "\n") * 5)
    for command in (["train-local"], ["estimate", "--local"]):
        result = CliRunner().invoke(app, [command[0], str(task_file), *command[1:], "--device", "cpu"])
        assert (result.exit_code, type(result.exception)) == (2, SystemExit)
        assert "no chat template: give rows of {prompt, completion}" in result.stderr
    (task_file.parent / "rows.jsonl").write_text('{"text": "a b"}\n')
    result = train(task_file)
    assert (result.exit_code, type(result.exception)) == (2, SystemExit)
    assert "dataset = '1 row': give a dataset of at least two rows" in result.stderr


def test_a_base_model_that_there_is_not_is_named_once(task_file, model, tmp_path, monkeypatch):
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "tiny").symlink_to(model)
    monkeypatch.setenv("ALTO_MODELS", str(tmp_path / "models"))
    task_file.write_text(task_file.read_text().replace(str(model), "no such model"))
    said = "error: base model 'no such model' is not known: give one of: tiny\n  fetch a small one"
    assert train(task_file).stderr.startswith(said)
    rows = task_file.parent / "rows.jsonl"
    checked = CliRunner().invoke(app, ["dataset", "check", str(rows), "--model", "no such model"])
    assert checked.stderr.startswith(said)


def test_a_search_whose_every_trial_became_not_finite_has_failed(task_file):
    task_file.write_text(task_file.read_text().replace("[1e-3, 1e-2]", "[1e30, 1e31]").replace("count: 2", "count: 1"))
    result = train(task_file, "--json")
    assert result.exit_code == 1
    told = json.loads(result.stdout.splitlines()[-1])["result"]
    assert told["task"]["state"] == "FAILED"
    assert "A lower learning rate" in result.stdout


def test_a_work_folder_belongs_to_one_process_at_a_time(task_file):
    from alto_cli.local_folders import locked

    with locked(task_file.parent / "out.work"):
        result = train(task_file)
    assert (result.exit_code, type(result.exception)) == (4, SystemExit)
    assert "in use" in result.stderr
    assert train(task_file).exit_code == 0


def test_another_adapter_in_the_output_folder_is_kept_unless_forced(task_file):
    assert train(task_file).exit_code == 0
    weights = task_file.parent / "out" / "adapter_model.safetensors"
    first = weights.read_bytes()
    task_file.write_text(task_file.read_text().replace("max_steps: 4", "max_steps: 3"))
    elsewhere = ["--work", str(task_file.parent / "other")]
    result = train(task_file, *elsewhere)
    assert result.exit_code == 4
    assert "holds another adapter" in result.stderr
    assert weights.read_bytes() == first
    assert train(task_file, *elsewhere, "--force").exit_code == 0
    assert weights.read_bytes() != first


def test_an_output_that_cannot_be_a_folder_is_said_before_training(task_file):
    result = train(task_file, "--output", str(task_file / "inside"))
    assert result.exit_code == 2
    assert "task.yaml is a file" in result.stderr
    assert not (task_file.parent / "inside.work").exists()


def test_a_disk_without_room_is_said_and_what_was_whole_is_kept(task_file, monkeypatch):
    import errno
    import os

    def no_room(_descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", no_room)
        patched.setattr("alto_training.executor.data.cache._flush", lambda _path: None)
        result = train(task_file, "--work", str(task_file.parent / "half-way"))
    assert (result.exit_code, type(result.exception)) == (1, SystemExit)
    assert re.search(r"error: .*/half-way/\S+: No space left on device", result.stderr)
    assert "free some space" in result.stderr
    assert not list((task_file.parent / "half-way").glob("**/.*.partial"))
    assert train(task_file, "--work", str(task_file.parent / "half-way")).exit_code == 0


# What `train-local` and `estimate --local` import of ours, where some packages are not installed.
IMPORTS = """
import sys
sys.modules.update(dict.fromkeys(sys.argv[1:]))
import alto_admission.domain.search, alto_admission.search_wire
import alto_training.executor.estimate, alto_training.executor.executor
"""


def test_the_training_part_alone_is_enough():
    project = tomllib.loads((Path(__file__).parents[3] / "pyproject.toml").read_text())["project"]
    extras = {name: names_of(needs) for name, needs in project["optional-dependencies"].items()}
    # torch brings fsspec.
    absent = extras["server"] - extras["training"] - names_of(project["dependencies"]) - {"fsspec"}
    modules = [module for module, owners in packages_distributions().items() if absent & names_of(owners)]
    assert {"sqlalchemy", "grpc_health"} <= set(modules)
    subprocess.run([sys.executable, "-c", IMPORTS, *modules], check=True, timeout=120)


def names_of(requirements):
    return {re.match(r"[\w-]+", one).group().lower().replace("_", "-") for one in requirements}
