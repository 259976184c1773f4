"""From a dataset file to token sequences: rendered, tokenised once into a memory-mapped cache, cut to any length.

`encoding` turns a row into tokens and a loss mask, `chat` a conversation into text, `cache` keeps the arrays,
`truncation` cuts, `dataset` puts these together, `report` shows a person what came out.
"""

from alto_training.executor.data.dataset import Example, TokenisedDataset, open_dataset
from alto_training.executor.data.report import DatasetReport, RenderedExample, describe

__all__ = ["DatasetReport", "Example", "RenderedExample", "TokenisedDataset", "describe", "open_dataset"]
