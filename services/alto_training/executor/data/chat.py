"""Conversations: rendered by the model's own chat template, cut into segments where the assistant speaks.

Most templates do not mark what the assistant says, so a turn's place is found by rendering prefixes of the
conversation: the turn begins where the rendering of all before it, with the generation prompt, ends. What is learnt is
the turn with its end-of-turn token, not the white space that the template puts after it. transformers renders templates
in Jinja's sandbox.
"""

from __future__ import annotations

from collections.abc import Sequence

from alto_common.dataset_rows import Message

from alto_training.executor.data.segments import Segment, Tokenizer


class ChatTemplateError(ValueError):
    """A conversation that the template refuses, or renders so that its assistant turns cannot be told apart."""


def render(tokenizer: Tokenizer, messages: Sequence[Message], *, learn_all: bool) -> tuple[list[Segment], bool]:
    """Return the rendered conversation in segments, and whether an end-of-sequence token has still to follow.

    With `learn_all` everything is a target, otherwise what the assistant says.
    """
    text = _rendered(tokenizer, messages)
    turns = _assistant_turns(tokenizer, messages, text)
    added = (token.content for token in tokenizer.added_tokens_decoder.values() if token.special)
    end_tokens = (*tokenizer.all_special_tokens, *added)
    segments = []
    at = 0
    for start, end in turns:
        learnt = text[start:end].rstrip()
        if learnt.endswith(end_tokens):
            end = start + len(learnt)
        segments += [Segment(text[at:start], learn_all), Segment(text[start:end], True)]
        at = end
    segments.append(Segment(text[at:], learn_all))
    needs_end = messages[-1].role == "assistant" and not text.rstrip().endswith(end_tokens)
    return [segment for segment in segments if segment.text], needs_end


def _rendered(tokenizer: Tokenizer, messages: Sequence[Message], *, ask: bool = False) -> str:
    """Return the messages as text; with `ask`, up to where the assistant's next turn would begin."""
    import jinja2

    conversation = [{"role": message.role, "content": message.content} for message in messages]
    try:
        text: str = tokenizer.apply_chat_template(conversation, tokenize=False, add_generation_prompt=ask)
    except (jinja2.TemplateError, ValueError, TypeError) as error:
        raise ChatTemplateError(f"the model's chat template refuses it ({error}): change the conversation") from error
    return text


def _assistant_turns(tokenizer: Tokenizer, messages: Sequence[Message], text: str) -> list[tuple[int, int]]:
    """Return where in `text` each assistant turn starts and ends."""
    turns = []
    for index, message in enumerate(messages):
        if message.role != "assistant":
            continue
        if index:
            before = _rendered(tokenizer, messages[:index], ask=True)
            start = len(before) if text.startswith(before) else -1
        else:
            start = _start_of_opening_turn(tokenizer, messages[0], text)
        end = _end_of_turn(tokenizer, messages, index, text, start)
        if start < 0 or end < 0:
            raise ChatTemplateError(
                f"the model's chat template renders turn {index + 1} differently when others follow, so what the "
                "assistant says cannot be told: give rows of {prompt, completion}, or end the conversation there"
            )
        turns.append((start, end))
    return turns


def _start_of_opening_turn(tokenizer: Tokenizer, message: Message, text: str) -> int:
    """Return where the assistant's own words begin in a conversation that it opens; 0 where no header can be told.

    Nothing is before them to render, and templates refuse an empty conversation; the header is what they add to ask.
    """
    alone, asked = _rendered(tokenizer, [message]), _rendered(tokenizer, [message], ask=True)
    header = asked.removeprefix(alone) if asked != alone and asked.startswith(alone) else ""
    start = text.find(header) + len(header)
    return start if header in text and text[start:].lstrip().startswith(message.content.strip()) else 0


def _end_of_turn(tokenizer: Tokenizer, messages: Sequence[Message], index: int, text: str, start: int) -> int:
    through = _rendered(tokenizer, messages[: index + 1])
    if text.startswith(through):
        return len(through)
    # Some templates add to a turn only while it is the last one (Qwen3: an empty block of thoughts). Its content, and
    # what the template puts after it, are the same all the same.
    content = messages[index].content.strip()
    tail = through[through.rindex(content) + len(content) :] if content in through else ""
    found = text.find(content + tail, max(start, 0))
    return found + len(content) + len(tail) if tail and found >= 0 else -1
