"""From dataset rows to tokens with a loss mask: one sequence a row, two (chosen, rejected) for preferences."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence

from alto_common.dataset_rows import (
    AlpacaRow,
    DatasetError,
    MessagesRow,
    PreferenceRow,
    PromptCompletionRow,
    Row,
    TextRow,
)
from alto_common.tuning import LossScope, Objective
from alto_common.violations import Violation

from alto_training.executor.data.chat import ChatTemplateError, render
from alto_training.executor.data.segments import Encoded, Segment, SegmentEncoder, Tokenizer

Numbered = tuple[int, Row]


class RowEncoder:
    """Encodes the rows of one dataset, all of one format, for one objective.

    Prompts and completions are joined as they are, with no chat template and no separator. Text and completions are
    followed by the end-of-sequence token; a conversation ends as its template says.
    """

    def __init__(self, tokenizer: Tokenizer, objective: Objective) -> None:
        self._tokenizer = tokenizer
        self._encoder = SegmentEncoder(tokenizer)
        self._learn_all = objective.loss_scope is LossScope.ALL

    @property
    def prefix_length(self) -> int:
        """Tokens that the tokenizer puts before every text (not counted in conversations: their template does it)."""
        return len(self._encoder.prefix)

    def encode(self, rows: Sequence[Numbered]) -> list[tuple[Encoded, ...]]:
        """Return the sequences of each row; raise `DatasetError` for rows that cannot be rendered or teach nothing."""
        if rows and isinstance(rows[0][1], MessagesRow):
            texts, ends = self._conversations(rows)
            add_prefix = False
        else:
            texts = [segments for _, row in rows for segments in self._segments(row)]
            ends = [True] * len(texts)
            add_prefix = True
        encoded = self._encoder.encode(texts, add_prefix=add_prefix, end=ends)
        per_row = len(encoded) // len(rows) if rows else 1
        grouped = [tuple(encoded[at : at + per_row]) for at in range(0, len(encoded), per_row)]
        hollow = [
            Violation(f"line[{line}]", "no token to learn", "give text that the tokenizer does not reduce to nothing")
            for (line, _), sequences in zip(rows, grouped, strict=True)
            if not all(sequence.target_mask.any() for sequence in sequences)
        ]
        if hollow:
            raise DatasetError(hollow[:20])
        return grouped

    def _segments(self, row: Row) -> list[list[Segment]]:
        if isinstance(row, AlpacaRow):
            row = row.as_prompt_completion()
        if isinstance(row, TextRow):
            return [[Segment(row.text, True)]]
        if isinstance(row, PromptCompletionRow):
            return [[Segment(row.prompt, self._learn_all), Segment(row.completion, True)]]
        if isinstance(row, PreferenceRow):
            # Whatever the scope of an SFT loss: a preference is about answers, its prompt is never learnt.
            prompt = Segment(row.prompt, False)
            return [[prompt, Segment(row.chosen, True)], [prompt, Segment(row.rejected, True)]]
        raise TypeError(f"rows of one dataset have one format, but here is a {type(row).__name__} among others")

    def _conversations(self, rows: Sequence[Numbered]) -> tuple[list[list[Segment]], list[bool]]:
        if not self._tokenizer.chat_template:
            cure = "this model has no chat template: give rows of {prompt, completion}, or choose a chat model"
            raise DatasetError([Violation("dataset", "messages", cure)])
        texts, ends = [], []
        violations = []
        for line, row in rows:
            if not isinstance(row, MessagesRow):
                raise TypeError(f"rows of one dataset have one format, but here is a {type(row).__name__} among others")
            try:
                segments, needs_end = render(self._tokenizer, row.messages, learn_all=self._learn_all)
            except ChatTemplateError as error:
                shown = " ".join(message.role for message in row.messages)
                violations.append(Violation(f"line[{line}].messages", shown[:60], str(error)))
                continue
            texts.append(segments)
            ends.append(needs_end)
        if violations:
            raise DatasetError(violations[:20])
        return texts, ends


def tokenizer_sha256(tokenizer: Tokenizer) -> str:
    """Return a hash of all of a tokenizer that decides what a row becomes: vocabulary, rules, ends, chat template."""
    digest = hashlib.sha256()
    if tokenizer.is_fast:
        rules = json.loads(tokenizer.backend_tokenizer.to_str())
        # Left behind by whoever used the tokenizer last; they do not touch what is encoded here.
        rules["truncation"] = rules["padding"] = None
    else:
        rules = sorted(tokenizer.get_vocab().items())
    for part in (type(tokenizer).__name__, rules, tokenizer(" a").input_ids, tokenizer.eos_token_id):
        digest.update(f"{part}\n".encode())
    digest.update(f"{tokenizer.all_special_tokens}\n{tokenizer.chat_template}".encode())
    return digest.hexdigest()
