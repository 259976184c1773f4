"""Keeping what the training libraries print for themselves off the screen, where it would tear a table apart."""

from __future__ import annotations

import logging
import os


def quiet_libraries(accelerator: str) -> None:
    """Silence progress bars and notices of transformers, DeepSpeed and tokenizers; call before the trainer is imported.

    `accelerator` ("cpu" or "cuda") is what DeepSpeed would otherwise look for, and comment on.
    """
    os.environ.setdefault("DS_ACCELERATOR", accelerator)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    # Retries of a hub that cannot be reached; what came of them is told by the error in the end. Its import, which
    # transformers has done by now, sets a level of its own.
    logging.getLogger("huggingface_hub").setLevel(logging.CRITICAL)
