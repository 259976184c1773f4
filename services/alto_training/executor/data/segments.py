"""Text in segments, some of them loss targets, and how they become tokens.

Segments are tokenised one by one and joined, so that what precedes a target is tokenised exactly as it will be when the
trained model is asked to go on from there. Tokenizers that would put a space of their own before each segment (the
older SentencePiece ones) are given the whole text instead, and a token belongs to the segment in which it starts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Tokenizer = Any
"""A transformers tokenizer. Any: transformers is not typed where it matters here."""

PROBE = "a"


class TokenizerError(ValueError):
    """A tokenizer that cannot serve training; the message names the cure."""


@dataclass(frozen=True)
class Segment:
    """A piece of text, and whether its tokens are loss targets."""

    text: str
    is_target: bool


@dataclass(frozen=True)
class Encoded:
    """Token ids, int32 [L], and which of them are loss targets, bool [L]; token 0 never is."""

    input_ids: npt.NDArray[np.int32]
    target_mask: npt.NDArray[np.bool_]

    @property
    def first_target(self) -> int:
        """The index of the first target: the length of the prompt."""
        return int(self.target_mask.argmax())


class SegmentEncoder:
    """Tokenises segmented texts with one tokenizer. `prefix` are the ids it begins every text with (BOS), if any."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        if tokenizer.eos_token_id is None:
            raise TokenizerError("the tokenizer has no end-of-sequence token: set eos_token in tokenizer_config.json")
        self._tokenizer = tokenizer
        self._eos: int = tokenizer.eos_token_id
        bare = self._ids([PROBE])[0]
        whole = list(tokenizer(PROBE).input_ids)
        begin = next((at for at in range(len(whole)) if whole[at : at + len(bare)] == bare), 0)
        self.prefix: list[int] = whole[:begin]
        self._joins_cleanly = tokenizer.decode(bare + bare) == PROBE + PROBE

    def encode(self, texts: Sequence[Sequence[Segment]], *, add_prefix: bool, end: Sequence[bool]) -> list[Encoded]:
        """Return the tokens of each text; where its `end` is true, EOS follows it, as a target."""
        ids_of = self._separately(texts) if self._joins_cleanly else self._jointly(texts)
        encoded = []
        for segments, pieces, ends in zip(texts, ids_of, end, strict=True):
            ids = list(self.prefix) if add_prefix else []
            mask = [False] * len(ids)
            for segment, piece in zip(segments, pieces, strict=True):
                ids += piece
                mask += [segment.is_target] * len(piece)
            if ends and (not ids or ids[-1] != self._eos):
                ids.append(self._eos)
                mask.append(True)
            if mask:
                mask[0] = False
            encoded.append(Encoded(np.array(ids, np.int32), np.array(mask, np.bool_)))
        return encoded

    def _ids(self, texts: list[str]) -> list[list[int]]:
        if not texts:
            return []
        found: list[list[int]] = self._tokenizer(texts, add_special_tokens=False, verbose=False).input_ids
        return found

    def _separately(self, texts: Sequence[Sequence[Segment]]) -> list[list[list[int]]]:
        flat = iter(self._ids([segment.text for segments in texts for segment in segments]))
        return [[next(flat) for _ in segments] for segments in texts]

    def _jointly(self, texts: Sequence[Sequence[Segment]]) -> list[list[list[int]]]:
        if not self._tokenizer.is_fast:
            raise TokenizerError("the tokenizer gives no character offsets: use its fast version (tokenizer.json)")
        found = []
        for segments in texts:
            text = "".join(segment.text for segment in segments)
            tokens = self._tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
            # The end of each segment, in characters: a token belongs to the first segment that ends after its start.
            ends = np.cumsum([len(segment.text) for segment in segments])
            pieces: list[list[int]] = [[] for _ in segments]
            for token, (start, _) in zip(tokens.input_ids, tokens.offset_mapping, strict=True):
                pieces[min(int(np.searchsorted(ends, start, side="right")), len(pieces) - 1)].append(token)
            found.append(pieces)
        return found
