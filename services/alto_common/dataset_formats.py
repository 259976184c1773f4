"""The formats a dataset row may have, as typed values, and what is wrong with a row that has none of them.

    text                {"text"}                              plain text, loss on all of it
    prompt_completion   {"prompt", "completion"}              the prompt may be empty, the completion not
    messages            {"messages": [{"role", "content"}]}   a conversation, rendered by the model's chat template
    alpaca              {"instruction", "input", "output"}    input may be left out
    preference          {"prompt", "chosen", "rejected"}      for DPO

Other fields of a row (an id, a source) are ignored. `alto_common.dataset_rows` reads files of such rows.
"""

from __future__ import annotations

import enum
import reprlib
from dataclasses import dataclass
from typing import Any

from alto_common.tuning import Objective, ObjectiveKind
from alto_common.violations import Violation

ROLES = ("system", "user", "assistant", "tool")
# Fields that change what a row means and that no format here can honour: refused, since ignoring them would train on
# something else than what was sent.
UNSUPPORTED_FIELDS = ("tools", "images")
SHOWN_CHARACTERS = 60
_TYPES_IN_WORDS = {
    type(None): "null",
    bool: "true or false",
    int: "a number",
    float: "a number",
    list: "a list",
    dict: "an object",
}


class RowFormat(enum.StrEnum):
    """The format that all rows of one dataset share."""

    TEXT = "text"
    PROMPT_COMPLETION = "prompt_completion"
    MESSAGES = "messages"
    ALPACA = "alpaca"
    PREFERENCE = "preference"


REQUIRED_FIELDS: dict[RowFormat, tuple[str, ...]] = {
    RowFormat.TEXT: ("text",),
    RowFormat.PROMPT_COMPLETION: ("prompt", "completion"),
    RowFormat.MESSAGES: ("messages",),
    RowFormat.ALPACA: ("instruction", "output"),
    RowFormat.PREFERENCE: ("prompt", "chosen", "rejected"),
}
FORMATS_IN_WORDS = " or ".join("{" + ", ".join(fields) + "}" for fields in REQUIRED_FIELDS.values())


@dataclass(frozen=True)
class TextRow:
    """Plain text."""

    text: str


@dataclass(frozen=True)
class PromptCompletionRow:
    """A prompt (possibly empty) and what should follow it."""

    prompt: str
    completion: str


@dataclass(frozen=True)
class Message:
    """One turn of a conversation; `role` is one of `ROLES`."""

    role: str
    content: str


@dataclass(frozen=True)
class MessagesRow:
    """A conversation with at least one assistant turn."""

    messages: tuple[Message, ...]


@dataclass(frozen=True)
class AlpacaRow:
    """An instruction, its input (possibly empty) and the output."""

    instruction: str
    input: str
    output: str

    def as_prompt_completion(self) -> PromptCompletionRow:
        """Return the row under the prompt template that the Stanford Alpaca project published."""
        if self.input:
            prompt = (
                "Below is an instruction that describes a task, paired with an input that provides further context. "
                "Write a response that appropriately completes the request.\n\n"
                f"### Instruction:\n{self.instruction}\n\n### Input:\n{self.input}\n\n### Response:\n"
            )
        else:
            prompt = (
                "Below is an instruction that describes a task. Write a response that appropriately completes the "
                f"request.\n\n### Instruction:\n{self.instruction}\n\n### Response:\n"
            )
        return PromptCompletionRow(prompt, self.output)


@dataclass(frozen=True)
class PreferenceRow:
    """A prompt with a preferred and a rejected answer."""

    prompt: str
    chosen: str
    rejected: str


Row = TextRow | PromptCompletionRow | MessagesRow | AlpacaRow | PreferenceRow


_FORMAT_OF = {
    TextRow: RowFormat.TEXT,
    PromptCompletionRow: RowFormat.PROMPT_COMPLETION,
    MessagesRow: RowFormat.MESSAGES,
    AlpacaRow: RowFormat.ALPACA,
    PreferenceRow: RowFormat.PREFERENCE,
}


def row_format(row: Row) -> RowFormat:
    """Return the format that a row has."""
    return _FORMAT_OF[type(row)]


def check_objective(found: RowFormat, objective: Objective, field: str = "dataset") -> list[Violation]:
    """Return a violation when rows of this format cannot serve the objective: DPO takes preferences, SFT all else."""
    has_preferences = found is RowFormat.PREFERENCE
    if objective.kind is ObjectiveKind.DPO and not has_preferences:
        return [Violation(field, str(found), "the DPO objective needs rows of {prompt, chosen, rejected}")]
    if objective.kind is ObjectiveKind.SFT and has_preferences:
        cure = "preference rows need the DPO objective: `objective: dpo`, or `--objective dpo`"
        return [Violation(field, str(found), cure)]
    return []


def check_chat_template(found: RowFormat, has_chat_template: bool, field: str) -> list[Violation]:
    """Return a violation when rows of this format need a chat template, and the base model has none."""
    if found is RowFormat.MESSAGES and not has_chat_template:
        cure = "this model has no chat template: give rows of {prompt, completion}, or choose a chat model"
        return [Violation(field, str(found), cure)]
    return []


def detect(where: str, value: dict[str, Any]) -> RowFormat | list[Violation]:
    """Return the one format whose fields are all there."""
    for name in UNSUPPORTED_FIELDS:
        if value.get(name):
            return [Violation(f"{where}.{name}", shown(value[name]), "remove it: no row format here can use it")]
    found = [row_format for row_format, fields in REQUIRED_FIELDS.items() if value.keys() >= set(fields)]
    if len(found) == 1:
        return found[0]
    if found:
        cure = "keep the fields of one format only: these are " + " and ".join(str(one) for one in found)
        return [Violation(where, shown(sorted(value)), cure)]
    # Of the formats that are not complete, the one that misses least is most likely what was meant.
    missing = [[name for name in fields if name not in value] for fields in REQUIRED_FIELDS.values()]
    started = [
        names for names, fields in zip(missing, REQUIRED_FIELDS.values(), strict=True) if len(names) < len(fields)
    ]
    if started:
        nearest = min(started, key=len)
        return [Violation(f"{where}.{nearest[0]}", None, f"add the missing field; a row is {FORMATS_IN_WORDS}")]
    return [Violation(where, shown(sorted(value)), f"give a row as {FORMATS_IN_WORDS}")]


def typed(where: str, row_format: RowFormat, value: dict[str, Any]) -> Row | list[Violation]:
    """Return the row of this format, or what is wrong with its fields."""
    found: list[Violation] = []

    def text(name: str, *, may_be_empty: bool = False) -> str:
        return _text(found, f"{where}.{name}", value.get(name, "" if may_be_empty else None), may_be_empty)

    row: Row
    match row_format:
        case RowFormat.TEXT:
            row = TextRow(text("text"))
        case RowFormat.PROMPT_COMPLETION:
            row = PromptCompletionRow(text("prompt", may_be_empty=True), text("completion"))
        case RowFormat.ALPACA:
            row = AlpacaRow(text("instruction"), text("input", may_be_empty=True), text("output"))
        case RowFormat.PREFERENCE:
            row = PreferenceRow(text("prompt", may_be_empty=True), text("chosen"), text("rejected"))
        case RowFormat.MESSAGES:
            row = MessagesRow(_messages(found, f"{where}.messages", value["messages"]))
    return found or row


def _messages(found: list[Violation], where: str, value: object) -> tuple[Message, ...]:
    if not isinstance(value, list) or not value:
        found.append(Violation(where, shown(value), 'give a list of {"role", "content"} objects'))
        return ()
    messages = []
    for index, item in enumerate(value):
        place = f"{where}[{index}]"
        if not isinstance(item, dict):
            found.append(Violation(place, shown(item), 'give an object {"role", "content"}'))
            continue
        for name in sorted(name for name in item.keys() - {"role", "content"} if item[name] is not None):
            cure = "a message has a role and a content: write what else it says into its content, or remove it"
            found.append(Violation(f"{place}.{name}", shown(item[name]), cure))
        role = item.get("role")
        if role not in ROLES:
            found.append(Violation(f"{place}.role", shown(role), "give one of " + ", ".join(ROLES)))
            continue
        content = _text(found, f"{place}.content", item.get("content"), may_be_empty=role != "assistant")
        messages.append(Message(role, content))
    if not any(message.role == "assistant" for message in messages) and not found:
        found.append(Violation(where, shown(value), "add an assistant message: it is what the loss is taken over"))
    return tuple(messages)


def _text(found: list[Violation], where: str, value: object, may_be_empty: bool) -> str:
    """Return `value` if it is a usable string; otherwise note why not and return an empty one."""
    if not isinstance(value, str):
        given = _TYPES_IN_WORDS.get(type(value), "another type")
        found.append(Violation(where, shown(value), f"give a string, not {given}"))
    elif not may_be_empty and not value.strip():
        found.append(Violation(where, shown(value), "give text that is not empty, or remove the row"))
    elif not _is_encodable(value):
        found.append(Violation(where, shown(value), r"remove the lone surrogate (an unpaired \ud800 to \udfff)"))
    else:
        return value
    return ""


def _is_encodable(text: str) -> bool:
    r"""Return whether UTF-8 can hold `text`: JSON lets a lone \ud800 through, no tokenizer does."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def shown(value: object) -> str:
    """Return `value` short enough for a message, free of characters that a response could not carry."""
    text = value if isinstance(value, str) else reprlib.repr(value)
    text = text.encode("utf-8", "backslashreplace").decode()
    return text if len(text) <= SHOWN_CHARACTERS else f"{text[:SHOWN_CHARACTERS]}... ({len(text):,} characters)"
