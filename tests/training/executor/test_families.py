"""Every supported model family: packed sequences equal each alone, trials train, adapters load into PEFT."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from alto_common.base_models import UnusableModelError, linear_modules
from alto_common.tuning import Evaluation, TrialConfig
from alto_training.executor.backbone import load_backbone, prepare_backbone
from alto_training.executor.errors import ContextLengthError, TargetModulesError, UnsupportedBackboneError
from alto_training.executor.events import TrialProgress
from alto_training.executor.fused_gate import fuse_gates
from alto_training.executor.fused_layer import fuse_layers
from alto_training.executor.fused_norm import fuse_norms
from alto_training.executor.fused_rotary import fuse_rotary
from alto_training.executor.settings import Backend, ExecutorSettings
from peft_solo import train_alone
from safetensors.torch import load_file, save_file
from tiny_jobs import VOCABULARY, MemoryDataset, adapter_weights, job, llama_config, run
from torch.nn.functional import cross_entropy

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning"),
    # GPT-2 and its Conv1D: PEFT tells that it set fan_in_fan_out itself.
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False:UserWarning"),
]

DECODER = {
    "vocab_size": VOCABULARY,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "initializer_range": 0.1,
}
GROUPED = {"num_key_value_heads": 2, "head_dim": 12}
NO_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}  # the executor never drops in the backbone
SLIDING = {"sliding_window": 5, "use_sliding_window": True, "max_window_layers": 1}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", DECODER | GROUPED),
    "qwen2": ("Qwen2", DECODER | {"num_key_value_heads": 2} | SLIDING),
    "qwen3": ("Qwen3", DECODER | GROUPED),
    "mistral": ("Mistral", DECODER | GROUPED | {"sliding_window": 6}),
    "gemma": ("Gemma", DECODER | GROUPED),
    "gemma2": ("Gemma2", DECODER | GROUPED | {"sliding_window": 6, "query_pre_attn_scalar": 12}),
    "gpt2": (
        "GPT2",
        {
            "vocab_size": VOCABULARY,
            "n_embd": 48,
            "n_layer": 2,
            "n_head": 4,
            "n_positions": 64,
            **NO_DROPOUT,
            "initializer_range": 0.1,
        },
    ),
    "neox": ("GPTNeoX", DECODER),
}
EXPERTS = {"num_local_experts": 4, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
LATENT = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 12}
GROUPS = {"n_routed_experts": 4, "n_group": 2, "topk_group": 1, "first_k_dense_replace": 1}
OF_EXPERTS: dict[str, tuple[str, dict[str, Any]]] = {
    "mixtral": ("Mixtral", DECODER | GROUPED | EXPERTS),
    "qwen2-moe": ("Qwen2Moe", DECODER | {"num_key_value_heads": 2} | EXPERTS),
    "deepseek-v3": ("DeepseekV3", DECODER | {"num_key_value_heads": 4} | EXPERTS | LATENT | GROUPS),
    "glm4-moe": ("Glm4Moe", DECODER | GROUPED | EXPERTS | GROUPS),
    "afmoe": ("Afmoe", DECODER | GROUPED | EXPERTS | {"layer_types": ["full_attention"] * 2}),
    "beam": ("Beam", DECODER | GROUPED),  # of experts by its kind, not by what it has
}
# Its layers and the linear layers in them are both called by numbers.
CTRL = {"vocab_size": VOCABULARY, "n_embd": 48, "dff": 80, "n_layer": 2, "n_head": 4, "n_positions": 64, **NO_DROPOUT}
NUMBERED: dict[str, tuple[str, dict[str, Any]]] = {"ctrl": ("CTRL", CTRL)}
LAYERS_OF_LLAMAS_KIND = {"llama", "qwen2", "qwen3", "mistral"}


def make(family: str) -> Any:
    prefix, values = (FAMILIES | OF_EXPERTS | NUMBERED)[family]
    head = f"{prefix}LMHeadModel" if prefix in {"GPT2", "CTRL"} else f"{prefix}ForCausalLM"
    torch.manual_seed(3)
    return getattr(transformers, head)(getattr(transformers, f"{prefix}Config")(**values)).eval()


@pytest.mark.parametrize("fused", [False, True], ids=["as on a CPU", "as on a GPU"])
@pytest.mark.parametrize("family", FAMILIES)
def test_trials_over_each_family_equal_peft(tmp_path: Path, family: str, fused: bool) -> None:
    config = TrialConfig(lora_rank=3, learning_rate=1e-3, batch_size=3, max_steps=3, max_length=20, adam_epsilon=3e-4)
    task = job(config, config, evaluation=Evaluation(count=1))
    model = make(family)
    if fused:
        fuse_norms(model.base_model)
        fuse_gates(model.base_model)
        assert fuse_rotary(model.base_model) == (0 if family == "gpt2" else 2)
    backbone = prepare_backbone(model, family, torch.device("cpu"))
    if fused:
        assert fuse_layers(backbone.decoder) == (2 if family in LAYERS_OF_LLAMAS_KIND else 0)
    outcome, _ = run(task, tmp_path, backbone=backbone)
    alone = train_alone(make(family), MemoryDataset(23, seed=1), config)
    weights = adapter_weights(outcome.trials[0].adapter_path)
    for side, letter in enumerate("AB"):
        expected = torch.cat([matrices[side].flatten() for matrices in alone.matrices.values()])
        ours = torch.cat(
            [weights[f"base_model.model.{path}.lora_{letter}.weight"].flatten() for path in alone.matrices]
        )
        assert (ours - expected).norm() <= 1e-5 * expected.norm()


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2", *NUMBERED, *OF_EXPERTS])
def test_the_adapter_loads_into_peft_and_its_validation_loss_is_the_reported_one(tmp_path: Path, family: str) -> None:
    from peft import PeftModel

    config = TrialConfig(lora_rank=3, learning_rate=1e-2, batch_size=3, max_steps=6, max_length=24, use_rslora=True)
    backbone = prepare_backbone(make(family), family, torch.device("cpu"))
    outcome, _ = run(job(config), tmp_path, backbone=backbone)
    assert outcome.best is not None
    model = PeftModel.from_pretrained(make(family), str(outcome.best.adapter_path))
    total = tokens = 0.0
    data = MemoryDataset(6, seed=2)
    for row in range(len(data)):
        example = data.example(row, 24)
        ids = torch.from_numpy(example.input_ids.astype("int64"))
        labels = torch.where(torch.from_numpy(example.target_mask), ids, -100)
        logits = model(input_ids=ids[None]).logits[0]
        total += cross_entropy(logits[:-1], labels[1:], ignore_index=-100, reduction="sum").item()
        tokens += int(example.target_mask[1:].sum())
    assert total / tokens == pytest.approx(outcome.best.best_validation_loss, abs=1e-4)


@pytest.mark.parametrize("family", OF_EXPERTS)
def test_layers_that_peft_would_take_for_experts_carry_no_adapter(family: str) -> None:
    facts = set(linear_modules(make(family)))
    backbone = prepare_backbone(make(family), family, torch.device("cpu"))
    paths = {layer.path for layer in backbone.layers}
    assert paths == facts
    assert any(path.endswith("o_proj") for path in paths)
    with pytest.raises(TargetModulesError, match="gate_proj"):
        backbone.adapted_modules(TrialConfig(target_modules=("gate_proj",)))


def test_a_model_whose_positions_depend_on_the_batch_is_refused() -> None:
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    model = transformers.LlamaForCausalLM(llama_config(rope_parameters=rope))
    with pytest.raises(UnusableModelError, match="longest sequence of a batch"):
        prepare_backbone(model, "dynamic", torch.device("cpu"))


def test_a_model_that_asks_more_of_its_linear_layers_is_refused() -> None:
    routed = {"moe_topk": 2, "num_shared_expert": 1}
    config = transformers.HunYuanMoEV1Config(**(DECODER | GROUPED | EXPERTS | routed))
    with pytest.raises(UnsupportedBackboneError, match="does not run with layers that carry adapters"):
        prepare_backbone(transformers.HunYuanMoEV1ForCausalLM(config).eval(), "hunyuan", torch.device("cpu"))


def test_a_model_whose_head_takes_other_than_the_hidden_states_is_refused() -> None:
    config = transformers.ElectraConfig(**DECODER, embedding_size=32, is_decoder=True)
    with pytest.raises(UnsupportedBackboneError, match="before its output head"):
        prepare_backbone(transformers.ElectraForCausalLM(config).eval(), "electra", torch.device("cpu"))


def test_a_model_that_mixes_packed_sequences_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    # Attention that ignores where sequences end: what an architecture outside of the attention interface would do.
    from alto_training.executor import attention

    def leaking(module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: Any, **_: Any) -> Any:
        attended = torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
        return attended.transpose(1, 2), None

    monkeypatch.setattr(attention, "varlen_attention", leaking)
    try:
        with pytest.raises(UnsupportedBackboneError, match="other logits for packed sequences"):
            prepare_backbone(make("llama"), "leaking", torch.device("cpu"))
    finally:
        monkeypatch.undo()
        attention.register()


def test_unknown_targets_and_too_long_sequences_are_named(tmp_path: Path) -> None:
    backbone = prepare_backbone(make("llama"), "llama", torch.device("cpu"))
    with pytest.raises(TargetModulesError, match=r"query_key_value.*choose among down_proj"):
        backbone.adapted_modules(TrialConfig(target_modules=("query_key_value",)))
    # One that is there does not make up for one that is not: PEFT would leave it out without a word.
    with pytest.raises(TargetModulesError, match=r"target_modules: qkv_proj .*choose among down_proj"):
        backbone.adapted_modules(TrialConfig(target_modules=("q_proj", "qkv_proj")))
    with pytest.raises(TargetModulesError, match="no layer 2; choose among 0 to 1"):
        backbone.adapted_modules(TrialConfig(layers=(0, 2)))
    with pytest.raises(ContextLengthError, match=r"65.*at most 64"):
        backbone.check_length(TrialConfig(max_length=65))


@pytest.mark.parametrize("backend", [Backend.REFERENCE, Backend.CPU])
def test_a_bf16_backbone_follows_the_fp32_loss_curve_with_fp32_adapters(tmp_path: Path, backend: Backend) -> None:
    config = TrialConfig(lora_rank=4, learning_rate=5e-3, batch_size=4, max_steps=6, max_length=24, lora_dropout=0.1)
    curves = []
    for dtype in (torch.float32, torch.bfloat16):
        backbone = prepare_backbone(make("llama").to(dtype), "llama", torch.device("cpu"))
        settings = ExecutorSettings(tokens_per_tick=64, backend=backend)
        outcome, events = run(job(config), tmp_path / str(dtype), backbone=backbone, settings=settings)
        curves.append([event.train_loss for event in events if isinstance(event, TrialProgress)])
        weights = adapter_weights(outcome.trials[0].adapter_path)
        assert {tensor.dtype for tensor in weights.values()} == {torch.float32}
    assert curves[1] == pytest.approx(curves[0], rel=0.02)


def test_attention_that_is_not_causal_is_refused() -> None:
    # Every sequence alone and all packed agree, under our attention; what the model was trained with is another.
    values = DECODER | GROUPED | {"sliding_window": 6, "query_pre_attn_scalar": 12, "use_bidirectional_attention": True}
    model = transformers.Gemma3ForCausalLM(transformers.Gemma3TextConfig(**values))
    with pytest.raises(UnsupportedBackboneError, match="other logits for packed sequences"):
        prepare_backbone(model, "bidirectional", torch.device("cpu"))


def test_attention_within_chunks_is_refused_however_long_they_are() -> None:
    values = DECODER | GROUPED | {"num_local_experts": 2, "intermediate_size_mlp": 80, "attention_chunk_size": 8192}
    model = transformers.Llama4ForCausalLM(transformers.Llama4TextConfig(**values))
    with pytest.raises(UnusableModelError, match="within chunks"):
        prepare_backbone(model, "chunked", torch.device("cpu"))


def test_a_family_that_chooses_its_attention_itself_is_refused_by_name(tmp_path: Path) -> None:
    values = {"vocab_size": VOCABULARY, "n_embd": 48, "n_layer": 1, "n_head": 4, "n_positions": 64, "rotary_dim": 8}
    transformers.GPTJForCausalLM(transformers.GPTJConfig(**values)).save_pretrained(tmp_path)
    with pytest.raises(UnusableModelError, match=r"GPTJ.*attention interface.*choose a Llama"):
        load_backbone(str(tmp_path))


def test_weights_that_are_missing_cut_short_or_of_another_shape_are_no_model(tmp_path: Path) -> None:
    make("llama").save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    whole, tensors = file.read_bytes(), load_file(file)
    kept = {name: tensor for name, tensor in tensors.items() if "layers.1.mlp.up_proj" not in name}
    save_file(kept, file, metadata={"format": "pt"})
    # Not a model with a random layer, which is what transformers makes of it.
    with pytest.raises(UnusableModelError, match=r"lack model\.layers\.1\.mlp\.up_proj"):
        load_backbone(str(tmp_path))
    file.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UnusableModelError, match="cannot be loaded"):
        load_backbone(str(tmp_path))
    file.write_bytes(whole)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"intermediate_size": 96}))
    with pytest.raises(UnusableModelError, match="cannot be loaded"):
        load_backbone(str(tmp_path))
