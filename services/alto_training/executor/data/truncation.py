"""Cutting sequences to a length: the completion loses its end first, then the prompt its beginning.

The completion keeps at least half of `max_length` (or all it has), so that every cut row still teaches; what precedes
the prompt by the tokenizer's own rule (BOS) stays. Both answers of a preference keep the same part of their prompt.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Indices = npt.NDArray[np.int64]


def prompt_kept(prompt: int, completion: int, max_length: int) -> int:
    """Return how many of `prompt` tokens stay when `completion` tokens (those from the first target on) follow."""
    completion_kept = min(completion, max(max_length // 2, max_length - prompt))
    return min(prompt, max_length - completion_kept)


def kept_indices(length: int, prompt: int, kept_prompt: int, prefix: int, max_length: int) -> Indices:
    """Return which of `length` tokens stay, at most `max_length`; the first `prompt` of them are the prompt."""
    dropped = prompt - kept_prompt
    # The prefix stays only while a token of the prompt itself does.
    begin = min(prefix, max(kept_prompt - 1, 0)) if dropped else 0
    front = np.arange(begin)
    back = np.arange(begin + dropped, min(length, max_length + dropped))
    return np.concatenate([front, back])
