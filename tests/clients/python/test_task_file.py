"""Task files: what becomes of one, and every mistake with its line and its cure."""

from pathlib import Path

import pytest
from alto.v1 import tuning_pb2
from alto_client import TaskFileError, load_task_file
from alto_client.task_spec import task_spec

WHOLE = """\
name: gsm8k-small
base_model: smollm2-135m-instruct
dataset: train.jsonl
validation: validation.jsonl
objective: {kind: sft, loss_scope: completion}
search:
  base: {epochs: 1, batch_size: 4, schedule: {kind: cosine, warmup_fraction: 0.1}}
  grid: {learning_rate: [1e-4, 5.0e-4], lora_rank: [8, 16], target_modules: [all-linear, [q_proj, v_proj]]}
early_exit: {policy: paper, warmup_fraction: 0.25}
evaluation: {count: 8}
resources: {gpus: 1}
labels: {team: maths}
output: ./out
"""
MINIMAL = "base_model: m\ndataset: train.jsonl\nsearch: {grid: {lora_rank: [8]}}\n"


@pytest.fixture
def load(tmp_path):
    for name in ("train.jsonl", "validation.jsonl"):
        (tmp_path / name).write_text("{}\n")

    def load(text):
        (tmp_path / "task.yaml").write_text(text)
        return load_task_file(tmp_path / "task.yaml")

    return load


def problems(load, text):
    with pytest.raises(TaskFileError) as caught:
        load(text)
    return [(problem.line, str(problem)) for problem in caught.value.problems]


def test_a_whole_file_becomes_a_spec(load, tmp_path):
    task_file = load(WHOLE)
    assert task_file.dataset == tmp_path / "train.jsonl"
    assert task_file.output == tmp_path / "out"
    spec = task_spec(task_file, "d1", "d2")
    assert (spec.display_name, spec.dataset_id, spec.validation_dataset_id) == ("gsm8k-small", "d1", "d2")
    assert spec.objective.loss_scope == tuning_pb2.LOSS_SCOPE_COMPLETION
    assert spec.search_space.base.schedule.kind == tuning_pb2.SCHEDULE_KIND_COSINE
    assert not spec.search_space.base.HasField("lora_rank")
    rates, ranks, modules = spec.search_space.grid.dimensions
    assert [value.number_value for value in rates.values.values] == [1e-4, 5e-4]
    assert [value.number_value for value in ranks.values.values] == [8, 16]
    assert modules.values.values[0].string_value == "all-linear"
    assert [value.string_value for value in modules.values.values[1].list_value.values] == ["q_proj", "v_proj"]
    assert spec.early_exit.warmup_fraction == 0.25
    assert not spec.early_exit.HasField("patience")
    assert spec.labels == {"team": "maths"}


def test_a_minimal_file_takes_every_default(load):
    task_file = load(MINIMAL)
    assert task_file.name == "task"
    assert task_file.output == task_file.dataset.parent / "alto-output" / "task"
    spec = task_spec(task_file, "d")
    assert not spec.HasField("validation_fraction")
    assert spec.early_exit.policy == ""


def test_the_task_file_of_the_documentation_is_one(load):
    text = (Path(__file__).parents[3] / "docs" / "task-file.md").read_text()
    task_file = load(text.split("```yaml\n")[1].split("```")[0])
    left_out = {"validation_fraction"}
    assert set(type(task_file).model_fields) - left_out == task_file.model_fields_set


def test_shorthands(load):
    text = MINIMAL + "objective: dpo\nearly_exit: none\n"
    text = text.replace("grid:", "base: {schedule: linear, target_modules: q_proj}, grid:")
    spec = task_spec(load(text), "d")
    assert spec.objective.kind == tuning_pb2.OBJECTIVE_KIND_DPO
    assert spec.early_exit.policy == "none"
    assert spec.search_space.base.schedule.kind == tuning_pb2.SCHEDULE_KIND_LINEAR
    assert list(spec.search_space.base.target_modules.names) == ["q_proj"]


def test_random_draws(load):
    search = "{random: {trials: 8, seed: 3, learning_rate: {log_uniform: [1e-5, 1e-3]}, lora_rank: [8, 16]}}"
    space = task_spec(load(MINIMAL.replace("{grid: {lora_rank: [8]}}", search)), "d").search_space
    assert (space.random.trials, space.random.seed) == (8, 3)
    assert space.random.dimensions[0].log_uniform.low == 1e-5
    assert len(space.random.dimensions[1].values.values) == 2


def test_a_written_list(load):
    search = "{list: [{learning_rate: 1e-4}, {learning_rate: 2e-4, layers: [0, 1]}]}"
    space = task_spec(load(MINIMAL.replace("{grid: {lora_rank: [8]}}", search)), "d").search_space
    assert [config.learning_rate for config in space.explicit.configs] == [1e-4, 2e-4]
    assert list(space.explicit.configs[1].layers.indices) == [0, 1]


@pytest.mark.parametrize(
    ("text", "line", "sentence"),
    [
        ("dataset: train.jsonl\nsearch: {grid: {lora_rank: [8]}}\n", 1, "base_model: it is missing"),
        (MINIMAL + "early_exits: paper\n", 4, "early_exits: there is no such key; did you mean 'early_exit'?"),
        (MINIMAL.replace("lora_rank", "lora_rnak"), 3, "did you mean 'lora_rank'?"),
        (MINIMAL.replace("[8]", "[8, 0]"), 3, "search.grid.lora_rank[1] = 0: give a number of at least 1"),
        (MINIMAL.replace("[8]", "[300]"), 3, "lora_rank[0] = 300: must be"),
        (MINIMAL.replace("[8]", "8"), 3, "search.grid.lora_rank = 8: give a list with at least one value"),
        (MINIMAL.replace("[8]", "[]"), 3, "give a list with at least one value"),
        (MINIMAL.replace("[8]", "[eight]"), 3, "lora_rank[0] = 'eight': give a whole number"),
        (MINIMAL.replace("lora_rank: [8]", "schedule: [cosine]"), 3, "vary its parts one by one"),
        (MINIMAL.replace("lora_rank: [8]", "schedule.kind: [sine]"), 3, "give 'constant', 'linear' or 'cosine'"),
        (MINIMAL.replace("grid:", "base: {learning_rate: -1.0}, grid:"), 3, "search.base.learning_rate = -1.0: must"),
        (MINIMAL.replace("{grid: {lora_rank: [8]}}", "{}"), 3, "give exactly one of grid, random and list"),
        (MINIMAL.replace("}}", "}, list: [{lora_rank: 4}]}"), 3, "given: grid and list"),
        (
            MINIMAL.replace("grid: {lora_rank: [8]}", "random: {trials: 2, learning_rate: {log_uniform: [0, 1]}}"),
            3,
            "a logarithmic range needs numbers above 0",
        ),
        (
            MINIMAL.replace("grid: {lora_rank: [8]}", "random: {trials: 2, learning_rate: {normal: [0, 1]}}"),
            3,
            "give a list of values, {uniform: [low, high]}",
        ),
        (MINIMAL.replace("train.jsonl", "nothing.jsonl"), 2, "there is no such file"),
        (MINIMAL + "validation: validation.jsonl\nvalidation_fraction: 0.1\n", 5, "not both"),
        (MINIMAL + "early_exit: {keep_fraction: 1.5}\n", 4, "early_exit.keep_fraction = 1.5"),
        (MINIMAL + "validation_fraction: 1.5\n", 4, "validation_fraction = 1.5: must"),
        (MINIMAL + "validation_fraction: 0\n", 4, "validation_fraction = 0.0: must"),
        (MINIMAL + f"labels: {{{70 * 'k'}: x}}\n", 4, "must be at most 63 characters"),
        (MINIMAL + "resources: {gpus: many}\n", 4, "resources.gpus = 'many': give a whole number"),
        (MINIMAL + "objective: ppo\n", 4, "objective.kind = 'ppo': give 'sft' or 'dpo'"),
        (MINIMAL + "dataset: other.jsonl\n", 4, "the key 'dataset' is given twice"),
        (MINIMAL + "output:\n", 4, "output has no value"),
        (MINIMAL + "labels: {a: [1\n", 5, "it is not YAML here"),
        ("- a\n- b\n", 1, "give a mapping of keys to values"),
        ("", 1, "it is empty"),
    ],
)
def test_a_mistake_is_named_with_its_line_and_its_cure(load, text, line, sentence):
    found = problems(load, text)
    assert any(at == line and sentence in text for at, text in found), found


def test_all_mistakes_are_told_at_once_in_the_order_of_the_file(load):
    found = problems(load, "base_model: 3\ndataset: train.jsonl\nsearch: {grid: {lora_rank: [8]}}\npriority: 1000\n")
    assert [line for line, _ in found] == [1, 4]


def test_a_file_that_cannot_be_read_is_named(tmp_path):
    with pytest.raises(TaskFileError, match="No such file"):
        load_task_file(tmp_path / "nothing.yaml")
    (tmp_path / "latin.yaml").write_bytes(b"name: \xe9\n")
    with pytest.raises(TaskFileError, match="save it as UTF-8"):
        load_task_file(tmp_path / "latin.yaml")


def test_a_file_nested_too_deep_is_refused(load):
    assert problems(load, "a: " + "[" * 3000) == [(1, "it is nested too deep")]
