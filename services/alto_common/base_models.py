"""Base models: which ones there are, what they are made of, and whether a configuration fits one.

A base model is named in one of three ways: a folder below the models root ("smollm2-135m-instruct"), an absolute folder
inside a root that the operator allowed, or, where the operator allows it, a Hugging Face hub id ("org/name"). Nothing
here ever runs code that comes with a checkpoint. Importable without torch and transformers: only `inspect`, on a model
it has not seen, and `linear_modules` need them.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import os
import re
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from alto_common.tuning import ALL_LINEAR, TrialConfig
from alto_common.violations import Violation

if TYPE_CHECKING:
    from torch import nn

_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_LAYER_INDEX = re.compile(r"(?:^|\.)(\d+)\.")
# What the facts below depend on; a change of any of these files makes them be gathered again.
DESCRIBING_FILES = ("config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
_CACHE_VERSION = 4
_HUB_TIMEOUT_S = 10.0
SUPPORTED_MODELS = "choose a Llama, Qwen, Mistral, Gemma, GPT-2 or GPT-NeoX model"  # the cure for one that is not
# What experts' projections and routers were called before transformers kept all experts of a layer in one tensor.
_EXPERT_NAMES = frozenset({"gate", "gate_proj", "up_proj", "down_proj", "w1", "w2", "w3"})


class BaseModelError(ValueError):
    """A base model that cannot be used. `name` is what was asked for, `cure` what would be accepted."""

    def __init__(self, name: str, problem: str, cure: str) -> None:
        self.name = name
        self.problem = problem
        self.cure = cure
        super().__init__(f"base model {name!r} {problem}: {cure}")

    def violation(self, field: str) -> Violation:
        """Return the violation to answer a request with."""
        return Violation(field, self.name, self.cure)


class UnknownModelError(BaseModelError):
    """No base model of this name; `close_matches` are names that exist and resemble it."""

    def __init__(self, name: str, problem: str, cure: str, close_matches: Sequence[str] = ()) -> None:
        super().__init__(name, problem, cure)
        self.close_matches = tuple(close_matches)


class UnusableModelError(BaseModelError):
    """The model exists, but its configuration or tokenizer is missing, damaged or needs code of its own."""


@dataclass(frozen=True)
class ResolvedModel:
    """A base model that exists: `location` is an absolute folder without symbolic links, or a hub id."""

    name: str
    location: str


@dataclass(frozen=True)
class ModelFacts:
    """What a base model is made of.

    `parameters` counts tied weights once; `bytes` is what they take in the checkpoint's own data type.
    `linear_modules` maps the full path of each nn.Linear (and GPT-2's Conv1D) except the output head to
    (in_features, out_features). Token ids are None where the tokenizer has no such token.
    """

    architecture: str
    hidden_size: int
    layers: int
    vocabulary: int
    context_length: int
    parameters: int
    bytes: int
    linear_modules: dict[str, tuple[int, int]]
    has_chat_template: bool
    tokenizer_vocabulary: int
    bos_token_id: int | None
    eos_token_id: int | None
    pad_token_id: int | None


def default_models_root() -> Path:
    """Return the folder that holds base models: $ALTO_MODELS, or ~/.cache/alto/models."""
    return Path(os.environ.get("ALTO_MODELS") or "~/.cache/alto/models").expanduser()


def list_models(models_root: Path | None = None) -> list[str]:
    """Return the names of the models below the root ("name" or "org/name"), sorted; none if there is no root."""
    root = models_root or default_models_root()
    configs = [*root.glob("*/config.json"), *root.glob("*/*/config.json")]
    names = (str(config.parent.relative_to(root)) for config in configs)
    return sorted(name for name in names if _NAME.fullmatch(name))


def resolve(
    name: str, models_root: Path | None = None, allowed_folders: Sequence[Path] = (), allow_hub: bool = False
) -> ResolvedModel:
    """Return where the base model called `name` is; raise `UnknownModelError` if there is none.

    A folder counts only when its real path lies below the models root or an allowed folder: neither ".." nor a
    symbolic link leads out. A hub id is taken at its word: `inspect` finds out whether it exists.
    """
    root = models_root or default_models_root()
    absolute = Path(name).is_absolute()
    if absolute or _NAME.fullmatch(name):
        folder = Path(os.path.realpath(name if absolute else root / name))
        allowed = [Path(os.path.realpath(one)) for one in (root, *allowed_folders)]
        inside = any(folder.is_relative_to(one) and folder != one for one in allowed)
        if inside and os.path.isfile(folder / "config.json"):
            return ResolvedModel(name, str(folder))
        if absolute and not inside:
            raise UnknownModelError(
                name,
                "lies outside the folders for models",
                "name a folder below one of them, or have its parent allowed",
            )
        if not absolute and allow_hub:
            return ResolvedModel(name, name)
    there = list_models(root)
    close = difflib.get_close_matches(name, there, n=3, cutoff=0.6)
    listed = ", ".join(close or there[:20]) or "there are none yet"
    hub = "" if allow_hub else " (models of the hub are not allowed here)"
    cure = f"{'did you mean' if close else 'give one of'}: {listed}{hub}"
    raise UnknownModelError(name, "is not known", cure, close)


def inspect(location: str, cache_folder: Path | None = None) -> ModelFacts:
    """Return the facts of the model at `location` (from `resolve`) without loading its weights.

    The model is built on torch's meta device from its configuration: seconds the first time, a file read afterwards
    (cached by the hash of its configuration and tokenizer, by default beside the models root). Raises
    `UnusableModelError`.
    """
    cache_folder = cache_folder or default_models_root().parent / "model-facts"
    cached = cache_folder / f"{_fingerprint(location)}.json"
    try:
        raw = json.loads(cached.read_text())
    except (OSError, ValueError):
        facts = _gather(location)
        _write_aside(cached, json.dumps(asdict(facts)))
        return facts
    raw["linear_modules"] = {name: (shape[0], shape[1]) for name, shape in raw["linear_modules"].items()}
    return ModelFacts(**raw)


def load_tokenizer(location: str) -> Any:
    """Return the transformers tokenizer of the model at `location`; raise `UnusableModelError` if it has none."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(location, trust_remote_code=False)
    except Exception as error:  # as for a configuration: no contract says what it may be
        cure = "put its tokenizer files beside config.json"
        raise UnusableModelError(
            _name_of(location), f"has no usable tokenizer ({_first_line(error, location)})", cure
        ) from error


def text_vocabulary(location: str) -> int:
    """Return how many tokens the model at `location` has embeddings for; raises `UnusableModelError`."""
    vocabulary: int = _config(location).get_text_config().vocab_size
    return vocabulary


def context_length(location: str) -> int:
    """Return the most tokens that the model at `location` takes; raises `UnusableModelError`."""
    return _context_length(_config(location), location)


def _context_length(config: Any, location: str) -> int:
    found: int | None = getattr(config.get_text_config(), "max_position_embeddings", None)
    if not found:
        cure = "give a causal language model whose config.json has max_position_embeddings"
        raise UnusableModelError(_name_of(location), "has no length of context", cure)
    return found


@contextmanager
def weights_being_read(location: str) -> Iterator[None]:
    """Tell what goes wrong inside, while the weights of a model are read, as an `UnusableModelError` with the cure."""
    try:
        yield
    except (BaseModelError, MemoryError):
        raise
    except Exception as error:  # again: no contract says what it may be
        if "out of memory" in str(error) or "allocate memory" in str(error):
            raise
        cure = "put its weights, whole and of its config.json, into the folder again"
        raise UnusableModelError(
            _name_of(location), f"cannot be loaded ({_first_line(error, location)})", cure
        ) from error


def linear_modules(model: nn.Module) -> dict[str, tuple[int, int]]:
    """Return the modules of a loaded model that may carry an adapter, in its order, with (in_features, out_features).

    These are all nn.Linear and GPT-2's Conv1D (their subclasses too: quantised layers) but the output head and what
    `read_as_experts` names.
    """
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    experts = read_as_experts(model)
    get_head = getattr(model, "get_output_embeddings", None)
    head = get_head() if get_head else None
    found: dict[str, tuple[int, int]] = {}
    for name, module in model.named_modules():
        if module is head or name.rsplit(".", 1)[-1] in experts:
            continue
        if isinstance(module, nn.Linear):
            found[name] = (module.in_features, module.out_features)
        elif isinstance(module, Conv1D):
            found[name] = (module.weight.shape[0], module.weight.shape[1])
    return found


def require_trainable(model: Any, location: str) -> None:
    """Raise `UnusableModelError` for an architecture that needs more than to be told where packed sequences end.

    `model` is a transformers PreTrainedModel; its weights are not looked at.
    """
    config, kind, cure = model.config.get_text_config(), type(model).__name__, SUPPORTED_MODELS
    rope_type = (getattr(config, "rope_parameters", None) or {}).get("rope_type")
    if not getattr(model, "_supports_attention_backend", False):
        problem = f"is a {kind}, which does not go through transformers' attention interface"
    elif "chunked_attention" in (getattr(config, "layer_types", None) or ()):
        problem = f"is a {kind} that attends within chunks"
    elif any(name.endswith(".sinks") for name, _ in model.named_parameters()):
        problem = f"is a {kind} with attention sinks"
    elif rope_type in {"dynamic", "longrope"}:
        problem = f"has rope_type {rope_type}, by which positions depend on the longest sequence of a batch"
        cure = "choose a model with another rope_type"
    else:
        return
    raise UnusableModelError(_name_of(location), problem, cure)


def read_as_experts(model: nn.Module) -> frozenset[str]:
    """Return the last names of modules that PEFT takes for experts' projections; none for most kinds of model.

    Where transformers keeps all experts of a layer in one tensor, PEFT reads "gate_proj" in an adapter's target modules
    as a part of that, in other layers too: an adapter of a dense layer or a shared expert would be lost when loaded.
    """
    from transformers.conversion_mapping import get_checkpoint_conversion_mapping

    changes = get_checkpoint_conversion_mapping(getattr(model.config, "model_type", None)) or ()
    patterns = [pattern for change in changes for pattern in getattr(change, "target_patterns", ())]
    return _EXPERT_NAMES if any("experts.gate_up_proj" in pattern for pattern in patterns) else frozenset()


def select_modules(
    modules: ModelFacts | Iterable[str], target_modules: Sequence[str], layers: Sequence[int] | None = None
) -> list[str]:
    """Return which of `modules` (facts, or the names that `linear_modules` gives) a configuration targets, in order.

    PEFT's rules: a target is the end of a module's path at a dot ("q_proj", "self_attn.q_proj"), the whole path, or
    "all-linear". With `layers`, only modules whose path carries one of these layer indices stay, except those named
    by their whole path. (PEFT ignores `layers` beside "all-linear"; here it holds there too.)
    """
    names = modules.linear_modules if isinstance(modules, ModelFacts) else modules
    chosen = []
    for name in names:
        by_end = any(target == ALL_LINEAR or name.endswith(f".{target}") for target in target_modules)
        index = _LAYER_INDEX.search(name)
        in_layers = layers is None or (index is not None and int(index[1]) in layers)
        if name in target_modules or (by_end and in_layers):
            chosen.append(name)
    return chosen


def check_targets(facts: ModelFacts, config: TrialConfig, field_prefix: str = "") -> list[Violation]:
    """Return what in `config` this model cannot serve, with the cure; empty when it fits."""
    found: list[Violation] = []
    unknown = [target for target in config.target_modules if not select_modules(facts, (target,))]
    if unknown:
        there = sorted({name.rsplit(".", 1)[-1] for name in facts.linear_modules})
        cure = f'this model has {", ".join(there)}, or give "{ALL_LINEAR}"'
        found.extend(Violation(field_prefix + "target_modules", target, cure) for target in unknown)
    outside = [layer for layer in config.layers or () if not 0 <= layer < facts.layers]
    if outside:
        cure = f"this model has layers 0 to {facts.layers - 1}"
        found.append(Violation(field_prefix + "layers", outside, cure))
    selected = select_modules(facts, config.target_modules, config.layers)
    if not selected and not found:
        cure = "the target modules do not occur in these layers: choose others"
        found.append(Violation(field_prefix + "layers", config.layers, cure))
    if selected:
        # Of grouped-query attention the keys' side is narrow: a rank up to the wider side is what ranks up to 256 need.
        narrowest = min(selected, key=lambda name: max(facts.linear_modules[name]))
        width = max(facts.linear_modules[narrowest])
        if config.lora_rank > width:
            cure = f"give at most {width}: {narrowest} is no wider on either side"
            found.append(Violation(field_prefix + "lora_rank", config.lora_rank, cure))
    if config.max_length > facts.context_length:
        cure = f"give at most {facts.context_length} tokens, the context of this model"
        found.append(Violation(field_prefix + "max_length", config.max_length, cure))
    return found


def _fingerprint(location: str) -> str:
    """Return a hash of all that the facts of a model depend on."""
    digest = hashlib.sha256(f"{_CACHE_VERSION}".encode())
    folder = Path(location)
    if not folder.is_absolute():
        # A hub id: its files may change on the hub, so what this machine would load decides.
        digest.update(f"{location}\n{_config(location).to_json_string()}".encode())
        return digest.hexdigest()
    for name in DESCRIBING_FILES:
        file = folder / name
        digest.update(f"\n{name}\n".encode())
        if file.is_file():
            digest.update(hashlib.sha256(file.read_bytes()).digest())
    return digest.hexdigest()


def _hub_has(name: str) -> bool:
    """Return whether the hub has the model, False when it cannot be reached. Raises `UnknownModelError` if it says no.

    Asked once and briefly: loading from a hub that does not answer retries for most of a minute.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import RepositoryNotFoundError

    try:
        HfApi().model_info(name, timeout=_HUB_TIMEOUT_S)
    except RepositoryNotFoundError as error:
        raise _unknown(name, "is neither among the models here nor on the Hugging Face hub") from error
    except Exception:  # no network, a proxy's answer, a hub that is down: whatever the client raises for it
        return False
    return True


def _unknown(name: str, problem: str) -> UnknownModelError:
    there = list_models(default_models_root())
    return UnknownModelError(name, problem, f"give one of: {', '.join(there[:20]) or 'there are none yet'}")


def _config(location: str) -> Any:
    from transformers import AutoConfig

    offline = not Path(location).is_absolute() and not _hub_has(location)
    try:
        return AutoConfig.from_pretrained(location, trust_remote_code=False, local_files_only=offline)
    except Exception as error:  # what transformers raises for a damaged configuration is not bounded by a contract
        if offline:
            raise _unknown(location, "is not among the models here, and the hub cannot be reached") from error
        raise UnusableModelError(
            _name_of(location),
            f"has no usable configuration ({_first_line(error, location)})",
            "give a causal language model whose architecture the installed transformers knows; code that comes with a "
            "checkpoint is never run",
        ) from error


def _gather(location: str) -> ModelFacts:
    """Build the model on the meta device and count it."""
    import torch
    from transformers import AutoModelForCausalLM

    config = _config(location)
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    except Exception as error:
        raise UnusableModelError(
            _name_of(location),
            f"cannot be built ({_first_line(error, location)})",
            "give a causal language model that the installed transformers can build from its config.json",
        ) from error
    require_trainable(model, location)
    tokenizer = load_tokenizer(location)
    text = config.get_text_config()
    parameters = sum(parameter.numel() for parameter in model.parameters())
    width = (config.dtype or torch.float32).itemsize
    return ModelFacts(
        architecture=type(model).__name__,
        hidden_size=text.hidden_size,
        layers=text.num_hidden_layers,
        vocabulary=text.vocab_size,
        context_length=_context_length(config, location),
        parameters=parameters,
        bytes=parameters * width,
        linear_modules=linear_modules(model),
        has_chat_template=bool(tokenizer.chat_template),
        tokenizer_vocabulary=len(tokenizer),
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def _name_of(location: str) -> str:
    """Return how to call a model in a message: whoever asks need not learn where it lies."""
    return Path(location).name if Path(location).is_absolute() else location


def _first_line(error: Exception, location: str) -> str:
    text = str(error).replace(location, _name_of(location)).strip()
    return (text.splitlines() or [type(error).__name__])[0][:160]


def _write_aside(path: Path, text: str) -> None:
    """Write `text` to `path` so that a reader sees all of it or nothing; a cache that cannot be written is no error."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, suffix=".tmp", delete=False) as file:
            file.write(text)
        os.replace(file.name, path)
    except OSError:
        return
