"""Base models: names resolve only to what was allowed, facts are those of the loaded model, misfits are named."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from alto_common import base_models
from alto_common.base_models import (
    ModelFacts,
    UnknownModelError,
    UnusableModelError,
    check_targets,
    inspect,
    linear_modules,
    list_models,
    resolve,
    select_modules,
)
from alto_common.tuning import TrialConfig
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, PreTrainedTokenizerFast

TINY_LLAMA = LlamaConfig(
    vocab_size=64,
    hidden_size=48,
    intermediate_size=96,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=128,
    tie_word_embeddings=True,
)
TINY_GPT2 = GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=2, n_positions=64, bos_token_id=0, eos_token_id=0)


def save_tokenizer(folder: Path) -> None:
    words = Tokenizer(models.WordLevel({"</s>": 0, "a": 1, "b": 2}, unk_token="a"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="</s>").save_pretrained(folder)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Return a models root with a Llama and, one level deeper, a GPT-2; no weights are needed."""
    root = tmp_path / "models"
    for name, config in (("tiny-llama", TINY_LLAMA), ("org/tiny-gpt2", TINY_GPT2)):
        config.save_pretrained(root / name)
        save_tokenizer(root / name)
    return root


@pytest.fixture
def facts(root: Path, tmp_path: Path) -> ModelFacts:
    return inspect(str(root / "tiny-llama"), tmp_path / "cache")


def test_models_are_listed_and_found_by_name_and_by_absolute_folder(root: Path, tmp_path: Path) -> None:
    assert list_models(root) == ["org/tiny-gpt2", "tiny-llama"]
    assert list_models(tmp_path / "absent") == []
    assert resolve("org/tiny-gpt2", root).location == str(root / "org/tiny-gpt2")
    assert resolve(str(root / "tiny-llama"), root).location == str(root / "tiny-llama")
    elsewhere = tmp_path / "elsewhere" / "m"
    TINY_LLAMA.save_pretrained(elsewhere)
    assert resolve(str(elsewhere), root, [elsewhere.parent]).location == str(elsewhere)


def test_the_root_comes_from_the_environment(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ALTO_MODELS", str(root))
    assert resolve("tiny-llama").location == str(root / "tiny-llama")


@pytest.mark.parametrize(
    "name", ["", ".", "..", "../secret", "a/../../secret", "tiny-llama/../../secret", "~/x", "a\0b"]
)
def test_a_name_never_leads_out_of_the_root(root: Path, name: str) -> None:
    TINY_LLAMA.save_pretrained(root.parent / "secret")
    with pytest.raises(UnknownModelError):
        resolve(name, root, allow_hub=True)


def test_an_absolute_folder_outside_and_a_symbolic_link_leading_out_are_refused(root: Path) -> None:
    secret = root.parent / "secret"
    TINY_LLAMA.save_pretrained(secret)
    os.symlink(secret, root / "link")
    for name in (str(secret), str(root / "link"), str(root / "tiny-llama" / ".." / ".." / "secret"), str(root)):
        with pytest.raises(UnknownModelError):
            resolve(name, root)
    with pytest.raises(UnknownModelError):
        resolve("link", root)
    assert resolve("link", root, [secret.parent]).location == str(secret)


def test_an_unknown_name_lists_what_is_close_or_what_is_there(root: Path) -> None:
    with pytest.raises(UnknownModelError, match="did you mean: tiny-llama") as caught:
        resolve("tiny-lama", root)
    assert caught.value.close_matches == ("tiny-llama",)
    assert caught.value.violation("base_model").field == "base_model"
    with pytest.raises(UnknownModelError, match="org/tiny-gpt2, tiny-llama"):
        resolve("zzz", root)


def test_hub_ids_pass_only_where_they_are_allowed(root: Path) -> None:
    assert resolve("org/other", root, allow_hub=True).location == "org/other"
    with pytest.raises(UnknownModelError, match="not allowed"):
        resolve("org/other", root)


@pytest.mark.parametrize("name", ["tiny-llama", "org/tiny-gpt2"])
def test_facts_are_those_of_the_model_when_loaded(root: Path, tmp_path: Path, name: str) -> None:
    facts = inspect(str(root / name), tmp_path / "cache")
    config = TINY_LLAMA if name == "tiny-llama" else TINY_GPT2
    model = AutoModelForCausalLM.from_config(config)
    assert facts.parameters == sum(p.numel() for p in model.parameters())
    assert facts.bytes == 4 * facts.parameters
    assert facts.linear_modules == linear_modules(model)
    assert (facts.hidden_size, facts.layers) == (config.hidden_size, config.num_hidden_layers)
    assert (facts.vocabulary, facts.context_length) == (64, config.max_position_embeddings)
    assert (facts.eos_token_id, facts.bos_token_id, facts.has_chat_template) == (0, None, False)
    for path, (width_in, width_out) in facts.linear_modules.items():
        module = model.get_submodule(path)
        assert module(torch.zeros(1, width_in)).shape == (1, width_out)
    assert not any("lm_head" in path for path in facts.linear_modules)


def test_facts_are_cached_by_content(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    location, cache = str(root / "tiny-llama"), tmp_path / "cache"
    first = inspect(location, cache)
    monkeypatch.setattr(base_models, "_gather", lambda _: pytest.fail("built again"))
    assert inspect(location, cache) == first
    monkeypatch.undo()
    changed = json.loads((root / "tiny-llama/config.json").read_text()) | {"num_hidden_layers": 2}
    (root / "tiny-llama/config.json").write_text(json.dumps(changed))
    assert inspect(location, cache).layers == 2


def test_a_damaged_cache_entry_is_gathered_again(root: Path, tmp_path: Path, facts: ModelFacts) -> None:
    (entry,) = (tmp_path / "cache").iterdir()
    entry.write_text(entry.read_text()[:50])
    assert inspect(str(root / "tiny-llama"), tmp_path / "cache") == facts


def test_a_model_that_needs_its_own_code_or_lacks_a_tokenizer_is_unusable(root: Path, tmp_path: Path) -> None:
    folder = root / "custom"
    folder.mkdir()
    marker = tmp_path / "ran"
    (folder / "evil.py").write_text(f"open({str(marker)!r}, 'w')")
    config = {"model_type": "custom", "auto_map": {"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M"}}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UnusableModelError, match="never run"):
        inspect(str(folder), tmp_path / "cache")
    assert not marker.exists()
    for file in (root / "tiny-llama").glob("tokenizer*"):
        file.unlink()
    with pytest.raises(UnusableModelError, match="tokenizer"):
        inspect(str(root / "tiny-llama"), tmp_path / "cache")


@pytest.mark.parametrize(
    "damage",
    ["", "[1]", '{"model_type": null}', {"num_attention_heads": 0}, {"vocab_size": -1}, {"num_hidden_layers": "three"}],
)
def test_a_damaged_configuration_is_unusable_whatever_transformers_raises(
    root: Path, tmp_path: Path, damage: str | dict[str, object]
) -> None:
    file = root / "tiny-llama" / "config.json"
    file.write_text(damage if isinstance(damage, str) else json.dumps(json.loads(file.read_text()) | damage))
    with pytest.raises(UnusableModelError, match=r"^base model 'tiny-llama' ") as caught:
        inspect(str(root / "tiny-llama"), tmp_path / "cache")
    assert str(root) not in str(caught.value)


def test_selection_by_end_path_all_and_layers(facts: ModelFacts) -> None:
    assert len(select_modules(facts, ["q_proj"])) == 3
    assert select_modules(facts, ["self_attn.q_proj"], [1]) == ["model.layers.1.self_attn.q_proj"]
    assert select_modules(facts, ["model.layers.2.mlp.up_proj"], [0]) == ["model.layers.2.mlp.up_proj"]
    assert select_modules(facts, ["all-linear"]) == list(facts.linear_modules)
    assert len(select_modules(facts, ["all-linear"], [0, 2])) == 14
    assert select_modules(facts, ["proj", "_proj", "lm_head", ""]) == []
    assert select_modules(["x.q_proj", "x.1.q_proj"], ["q_proj"], [1]) == ["x.1.q_proj"]


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")
@pytest.mark.parametrize(
    ("targets", "layers"),
    [(["q_proj"], None), (["q_proj", "mlp.up_proj"], [0, 2]), (["model.layers.1.mlp.down_proj", "k_proj"], [0])],
)
def test_selection_is_that_of_peft(targets: list[str], layers: list[int] | None) -> None:
    import peft

    model = AutoModelForCausalLM.from_config(TINY_LLAMA)
    expected = select_modules(linear_modules(model), targets, layers)
    peft_model = peft.get_peft_model(model, peft.LoraConfig(target_modules=targets, layers_to_transform=layers))
    assert sorted(peft_model.targeted_module_names) == sorted(expected)


@pytest.mark.parametrize(
    ("change", "field", "cure"),
    [
        ({"target_modules": ("q_proj", "c_attn")}, "target_modules", "down_proj, gate_proj, k_proj"),
        ({"layers": (0, 3)}, "layers", "layers 0 to 2"),
        ({"lora_rank": 49, "target_modules": ("q_proj", "k_proj")}, "lora_rank", "at most 48"),
        ({"max_length": 129}, "max_length", "at most 128"),
    ],
)
def test_a_misfit_names_field_and_cure(facts: ModelFacts, change: dict[str, object], field: str, cure: str) -> None:
    sound = TrialConfig(lora_rank=24, max_length=128)
    assert check_targets(facts, sound) == []
    (violation,) = check_targets(facts, dataclasses.replace(sound, **change), "trials[3].")  # type: ignore[arg-type]
    assert violation.field == f"trials[3].{field}"
    assert cure in violation.cure


def test_targets_absent_from_the_chosen_layers_are_named(facts: ModelFacts) -> None:
    partial = dataclasses.replace(facts, linear_modules={"model.layers.1.mlp.up_proj": (48, 96)})
    config = TrialConfig(target_modules=("up_proj",), layers=(0,), max_length=64)
    assert [violation.field for violation in check_targets(partial, config)] == ["layers"]


def test_a_narrow_module_outside_the_targets_does_not_limit_the_rank(facts: ModelFacts) -> None:
    assert check_targets(facts, TrialConfig(lora_rank=48, target_modules=("q_proj",), max_length=64)) == []


@pytest.mark.parametrize(
    ("architecture", "changes", "problem"),
    [
        ("Bloom", {}, "attention interface"),
        ("Falcon", {}, "attention interface"),
        ("Mamba", {}, "attention interface"),
        ("Llama4Text", {"attention_chunk_size": 8192}, "within chunks"),
        ("GptOss", {"num_key_value_heads": 1}, "attention sinks"),
        ("Llama", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}}, "rope_type dynamic"),
    ],
)
def test_an_architecture_that_cannot_be_trained_is_unusable_at_once(
    root: Path, architecture: str, changes: dict[str, object], problem: str
) -> None:
    sizes = {"vocab_size": 3, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = getattr(transformers, f"{architecture}Config")(**sizes, bos_token_id=0, eos_token_id=0, **changes)
    config.save_pretrained(root / "other")
    save_tokenizer(root / "other")
    with pytest.raises(UnusableModelError, match=rf"'other' .*{problem}.*: choose a"):
        inspect(str(root / "other"), root / "cache")


def test_a_hub_id_that_cannot_be_had_is_unknown_at_once(root: Path) -> None:
    """In a process of its own: where the hub is, is read at import. Nothing listens on port 9."""
    program = "from alto_common.base_models import inspect; inspect('no-such/model')"
    environment = {**os.environ, "HF_ENDPOINT": "http://127.0.0.1:9", "ALTO_MODELS": str(root)}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=60)
    assert "UnknownModelError" in done.stderr
    assert "the hub cannot be reached: give one of: org/tiny-gpt2, tiny-llama" in done.stderr
    assert "Retrying" not in done.stderr
