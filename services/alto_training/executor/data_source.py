"""What the executor asks of a tokenised dataset; `executor.data.TokenisedDataset` provides it."""

from __future__ import annotations

from typing import Protocol

import numpy as np
import numpy.typing as npt


class Example(Protocol):
    """One tokenised row: `input_ids` int32 [L], and `target_mask` bool [L], true where a token counts in the loss."""

    @property
    def input_ids(self) -> npt.NDArray[np.int32]:
        """Token ids, [L]."""
        ...

    @property
    def target_mask(self) -> npt.NDArray[np.bool_]:
        """Whether token t is a loss target, predicted from token t - 1, [L]."""
        ...


class DataSource(Protocol):
    """Random access to rows, shared by all trials of a task."""

    @property
    def fingerprint(self) -> str:
        """The sha256 of the content, in hex."""
        ...

    def __len__(self) -> int: ...

    def example(self, index: int, max_length: int) -> Example:
        """Return row `index` cut to `max_length` tokens."""
        ...

    def preference(self, index: int, max_length: int) -> tuple[Example, Example]:
        """Return the chosen and the rejected sequence of row `index` (DPO)."""
        ...
