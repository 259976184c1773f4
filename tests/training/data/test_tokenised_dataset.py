"""From a file to tokens: what is a target, what a cut keeps, what the cache reuses and what it refuses."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from alto_common.dataset_rows import DatasetError
from alto_common.tuning import LossScope, Objective, ObjectiveKind
from alto_training.executor.data import Example, TokenisedDataset, dataset, describe, open_dataset
from alto_training.executor.data.segments import TokenizerError
from alto_training.executor.data.truncation import kept_indices, prompt_kept
from hypothesis import given
from hypothesis import strategies as st

from .tokenizers_for_tests import CHATML, MARKED, SHIFTING, STRICT, THINKING, byte_tokenizer, spacing_tokenizer

SFT = Objective()
ALL = Objective(loss_scope=LossScope.ALL)
DPO = Objective(ObjectiveKind.DPO)
CHAT = [
    {"role": "system", "content": "be brief"},
    {"role": "user", "content": "hi"},
    {"role": "assistant", "content": "ho"},
    {"role": "user", "content": "two?"},
    {"role": "assistant", "content": "yes two"},
]


def write(folder: Path, *rows: dict[str, Any]) -> Path:
    path = folder / "data.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def opened(folder: Path, tokenizer: Any, objective: Objective, *rows: dict[str, Any], **more: Any) -> TokenisedDataset:
    return open_dataset(write(folder, *rows), tokenizer, objective, folder / "cache", **more)


def marked(tokenizer: Any, example: Example) -> str:
    """Return the text of an example with its targets in brackets."""
    out, inside = "", False
    for token, is_target in zip(example.input_ids.tolist(), example.target_mask.tolist(), strict=True):
        out += ("[" if is_target else "]") if is_target != inside else ""
        out += tokenizer.decode([token])
        inside = is_target
    return out + ("]" if inside else "")


@pytest.mark.parametrize(
    ("row", "objective", "expected"),
    [
        ({"prompt": "2+2=", "completion": "4"}, SFT, "<s>2+2=[4</s>]"),
        ({"prompt": "2+2=", "completion": "4"}, ALL, "<s>[2+2=4</s>]"),
        ({"prompt": "", "completion": "abc"}, SFT, "<s>[abc</s>]"),
        ({"text": "abc"}, SFT, "<s>[abc</s>]"),
        ({"text": "abc</s>"}, SFT, "<s>[abc</s>]"),
    ],
)
def test_targets_of_plain_rows(tmp_path: Path, row: dict[str, str], objective: Objective, expected: str) -> None:
    tokenizer = byte_tokenizer(bos=True)
    example = opened(tmp_path, tokenizer, objective, row).example(0, 100)
    assert marked(tokenizer, example) == expected
    assert (example.input_ids.dtype, example.target_mask.dtype) == (np.int32, np.bool_)


def test_without_a_beginning_token_the_first_token_is_no_target(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer(CHATML)
    for row in ({"text": "abc"}, {"prompt": "", "completion": "abc"}):
        assert marked(tokenizer, opened(tmp_path, tokenizer, SFT, row).example(0, 100)) == "a[bc</s>]"


def test_alpaca_rows_are_learnt_from_their_output(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    example = opened(tmp_path, tokenizer, SFT, {"instruction": "add", "input": "1 2", "output": "3"}).example(0, 999)
    assert marked(tokenizer, example).endswith("### Input:\n1 2\n\n### Response:\n[3</s>]")


@pytest.mark.parametrize("template", [CHATML, MARKED])
def test_only_assistant_turns_with_their_end_are_targets(tmp_path: Path, template: str) -> None:
    tokenizer = byte_tokenizer(template, bos=True)
    example = opened(tmp_path, tokenizer, SFT, {"messages": CHAT}).example(0, 999)
    assert marked(tokenizer, example) == (
        "<|im_start|>system\nbe brief<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n"
        "<|im_start|>assistant\n[ho<|im_end|>]\n"
        "<|im_start|>user\ntwo?<|im_end|>\n<|im_start|>assistant\n[yes two<|im_end|>]\n"
    )
    whole = opened(tmp_path, tokenizer, ALL, {"messages": CHAT}).example(0, 999)
    assert whole.target_mask.tolist() == [False] + [True] * (len(whole.input_ids) - 1)


def test_masks_are_those_of_a_template_that_marks_what_is_generated(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer(MARKED)
    expected = tokenizer.apply_chat_template(CHAT, return_dict=True, return_assistant_tokens_mask=True)
    example = opened(tmp_path, tokenizer, SFT, {"messages": CHAT}).example(0, 999)
    assert example.input_ids.tolist() == expected["input_ids"]
    assert example.target_mask.astype(int).tolist() == expected["assistant_masks"]


def test_a_template_that_decorates_only_the_last_turn_is_followed(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer(THINKING)
    chat = [{**message, "content": f" {message['content']} "} for message in CHAT]
    example = opened(tmp_path, tokenizer, SFT, {"messages": chat}).example(0, 999)
    text = marked(tokenizer, example)
    assert "assistant\n[ho<|im_end|>]\n" in text
    assert text.endswith("assistant\n[<think>\n\n</think>\n\nyes two<|im_end|>]\n")


def test_a_template_without_an_end_of_turn_gets_the_end_of_sequence(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer(STRICT)
    assert marked(tokenizer, opened(tmp_path, tokenizer, SFT, {"messages": CHAT[1:3]}).example(0, 99)) == (
        "user: hi\nassistant: [ho</s>]"
    )


@pytest.mark.parametrize(
    ("template", "cure"),
    [(STRICT, "no system message here"), (SHIFTING, "rows of {prompt, completion}"), (None, "no chat template")],
)
def test_what_a_template_cannot_render_is_named(tmp_path: Path, template: str | None, cure: str) -> None:
    with pytest.raises(DatasetError, match=cure):
        opened(tmp_path, byte_tokenizer(template), SFT, {"messages": CHAT[1:3]}, {"messages": CHAT})


def test_a_template_cannot_reach_out_of_its_sandbox(tmp_path: Path) -> None:
    evil = "{{ messages.__class__.__mro__[1].__subclasses__() }}" + CHATML
    with pytest.raises(DatasetError, match="refuses"):
        opened(tmp_path, byte_tokenizer(evil), SFT, {"messages": CHAT})


def test_a_tokenizer_that_puts_spaces_before_texts_is_given_the_whole(tmp_path: Path) -> None:
    tokenizer = spacing_tokenizer()
    example = opened(tmp_path, tokenizer, SFT, {"prompt": "a b:", "completion": "12"}).example(0, 99)
    pieces = tokenizer.convert_ids_to_tokens(example.input_ids.tolist())
    assert "".join(pieces) == "▁a▁b:12</s>"
    assert example.target_mask.tolist() == [False] * 5 + [True] * 3


def test_preferences_share_their_prompt(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer(bos=True)
    row = {"prompt": "say: ", "chosen": "yes", "rejected": "no way at all"}
    for objective in (DPO, dataclasses.replace(DPO, loss_scope=LossScope.ALL)):
        data = opened(tmp_path, tokenizer, objective, row)
        chosen, rejected = data.preference(0, 99)
        assert marked(tokenizer, chosen) == "<s>say: [yes</s>]"
        assert marked(tokenizer, rejected) == "<s>say: [no way at all</s>]"
    # At 12 tokens the longer answer keeps 6, so the prompt keeps 6, in both.
    chosen, rejected = data.preference(0, 12)
    assert marked(tokenizer, rejected) == "<s>say: [no way]"
    assert marked(tokenizer, chosen) == "<s>say: [yes</s>]"
    chosen, rejected = data.preference(0, 10)
    assert marked(tokenizer, rejected) == "<s>ay: [no wa]", "the longer answer decides what the prompt loses"
    assert marked(tokenizer, chosen) == "<s>ay: [yes</s>]"
    chosen, rejected = data.preference(0, 8)
    assert marked(tokenizer, rejected) == "<s>y: [no w]"
    assert marked(tokenizer, chosen) == "<s>y: [yes</s>]"
    with pytest.raises(TypeError, match="preference"):
        data.example(0, 99)
    with pytest.raises(TypeError, match="example"):
        opened(tmp_path, tokenizer, SFT, {"text": "a"}).preference(0, 99)


def test_a_cut_takes_the_end_of_the_completion_then_the_start_of_the_prompt(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer(bos=True)
    data = opened(tmp_path, tokenizer, SFT, {"prompt": "abcdefg", "completion": "0123456789"})
    assert marked(tokenizer, data.example(0, 19)) == "<s>abcdefg[0123456789</s>]"
    assert marked(tokenizer, data.example(0, 18)) == "<s>abcdefg[0123456789]"
    assert marked(tokenizer, data.example(0, 16)) == "<s>abcdefg[01234567]"
    assert marked(tokenizer, data.example(0, 12)) == "<s>cdefg[012345]"
    assert marked(tokenizer, data.example(0, 3)) == "<s>g[0]"
    assert marked(tokenizer, data.example(0, 2)) == "g[0]"
    short = opened(tmp_path, tokenizer, SFT, {"prompt": "abcdefghijkl", "completion": "1"})
    assert marked(tokenizer, short.example(0, 10)) == "<s>fghijkl[1</s>]"
    assert short.truncated_share(10) == 1.0
    assert short.truncated_share(15) == 0.0


@given(
    prompt=st.integers(1, 40), completion=st.integers(1, 40), prefix=st.integers(0, 2), max_length=st.integers(2, 50)
)
def test_every_cut_keeps_a_target_and_a_token_before_it(
    prompt: int, completion: int, prefix: int, max_length: int
) -> None:
    kept_prompt = prompt_kept(prompt, completion, max_length)
    kept = kept_indices(prompt + completion, prompt, kept_prompt, min(prefix, prompt), max_length)
    assert len(kept) == min(max_length, prompt + completion)
    assert kept[0] < prompt
    assert prompt in kept, "the first target stays"
    assert sorted(set(kept.tolist())) == kept.tolist()
    completion_kept = len(kept) - kept_prompt
    assert completion_kept >= min(completion, max_length // 2)


def test_the_cap_cuts_what_is_kept(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    data = opened(tmp_path, tokenizer, SFT, {"prompt": "abc", "completion": "0123456789"}, max_length_cap=6)
    assert data.lengths().tolist() == [6]
    assert marked(tokenizer, data.example(0, 99)) == "abc[012]"


def test_arrays_belong_to_the_caller_and_are_the_same_every_time(tmp_path: Path) -> None:
    data = opened(tmp_path, byte_tokenizer(), SFT, {"text": "abc"}, {"text": "defg"})
    example = data.example(1, 99)
    example.input_ids[:] = 0
    assert data.example(1, 99).input_ids.any()
    assert len(data) == 2
    assert data.lengths().tolist() == [4, 5]
    assert data.lengths(4).tolist() == [4, 4]
    for index in (-1, 2):
        with pytest.raises(IndexError):
            data.example(index, 99)
    with pytest.raises(ValueError, match="at least 2"):
        data.example(0, 1)


def test_the_header_of_a_turn_that_opens_the_conversation_is_no_target(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer(CHATML)
    chat = [{"role": "assistant", "content": "Hi"}, {"role": "user", "content": "?"}]
    example = opened(tmp_path, tokenizer, SFT, {"messages": chat}).example(0, 999)
    assert marked(tokenizer, example).startswith("<|im_start|>assistant\n[Hi<|im_end|>]")


@pytest.mark.parametrize("name", ["tokens.bin", "targets.bin", "offsets.bin", "lines.bin"])
def test_a_bit_of_the_cache_that_flipped_is_never_trained_on(tmp_path: Path, name: str) -> None:
    rows = [{"prompt": "one", "completion": "two"}, {"prompt": "three", "completion": "four"}]
    before = opened(tmp_path, byte_tokenizer(), SFT, *rows)
    file = tmp_path / "cache" / before.fingerprint / name
    whole = file.read_bytes()
    file.write_bytes(bytes([whole[0] ^ 1]) + whole[1:])
    after = opened(tmp_path, byte_tokenizer(), SFT, *rows)
    assert file.read_bytes() == whole
    assert [after.line(row) for row in range(2)] == [1, 2]


def test_the_cache_is_used_again_and_distrusts_what_is_torn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{"text": "abc"}, {"text": "de"}]
    first = opened(tmp_path, byte_tokenizer(), SFT, *rows)
    with monkeypatch.context() as patched:
        patched.setattr(dataset, "read_rows", lambda *_: pytest.fail("tokenised again"))
        again = opened(tmp_path, byte_tokenizer(), SFT, *rows)
    assert again.fingerprint == first.fingerprint
    folder = tmp_path / "cache" / first.fingerprint
    assert [path.name for path in (tmp_path / "cache").iterdir()] == [first.fingerprint], "no scratch is left"
    for torn in ("tokens.bin", "offsets.bin", "layout.json"):
        (folder / torn).write_bytes((folder / torn).read_bytes()[:-4])
        assert opened(tmp_path, byte_tokenizer(), SFT, *rows).example(1, 99).input_ids.tolist()
        assert len(np.fromfile(folder / "tokens.bin", np.int32)) == 7


def test_the_fingerprint_covers_content_tokenizer_template_and_objective(tmp_path: Path) -> None:
    row = {"prompt": "a", "completion": "b"}
    tokenizer = byte_tokenizer(CHATML)
    base = opened(tmp_path, tokenizer, SFT, row).fingerprint
    others = [
        opened(tmp_path, tokenizer, SFT, {**row, "completion": "c"}).fingerprint,
        opened(tmp_path, byte_tokenizer(STRICT), SFT, row).fingerprint,
        opened(tmp_path, byte_tokenizer(CHATML, bos=True), SFT, row).fingerprint,
        opened(tmp_path, tokenizer, ALL, row).fingerprint,
        opened(tmp_path, tokenizer, SFT, row, max_length_cap=3).fingerprint,
    ]
    assert len({base, *others}) == 6
    tokenizer.backend_tokenizer.enable_truncation(3)
    assert opened(tmp_path, tokenizer, SFT, row).fingerprint == base, "leftovers of other uses do not matter"


def test_a_failed_tokenisation_leaves_nothing_behind(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match=r"line\[2\]"):
        opened(tmp_path, byte_tokenizer(), SFT, {"text": "a"}, {"txt": "b"})
    assert list((tmp_path / "cache").iterdir()) == []


def test_unsuited_rows_and_tokenizers_are_refused(tmp_path: Path) -> None:
    pair = {"prompt": "a", "chosen": "b", "rejected": "c"}
    with pytest.raises(DatasetError, match="DPO"):
        opened(tmp_path, byte_tokenizer(), SFT, pair)
    with pytest.raises(DatasetError, match="DPO"):
        opened(tmp_path, byte_tokenizer(), DPO, {"text": "a"})
    with pytest.raises(TokenizerError, match="eos_token"):
        opened(tmp_path, byte_tokenizer(eos=False), SFT, {"text": "a"})
    with pytest.raises(DatasetError, match="no rows"):
        opened(tmp_path, byte_tokenizer(), SFT)
    with pytest.raises(DatasetError, match="readable"):
        open_dataset(tmp_path / "absent", byte_tokenizer(), SFT, tmp_path / "cache")


def test_the_report_counts_and_shows_marked_rows(tmp_path: Path) -> None:
    rows = [{"prompt": "ab", "completion": "c" * length} for length in (1, 20, 20, 60)]
    report = describe(write(tmp_path, *rows), byte_tokenizer(), SFT, tmp_path / "cache", max_length=30)
    assert (report.rows, report.duplicates, report.format) == (4, 1, "prompt_completion")
    assert report.tokens == 4 + 23 + 23 + 63
    assert report.percentiles == {50: 23, 90: 63, 99: 63, 100: 63}
    assert report.histogram == ((1, 16, 1), (16, 32, 2), (32, 64, 1))
    assert report.truncated_share == 0.25
    assert report.target_share == pytest.approx((2 + 21 + 21 + 28) / (4 + 23 + 23 + 30))
    assert [example.line for example in report.examples] == [1, 3, 4]
    assert report.examples[0].marked_text == "ab⟦c</s>⟧"
    text = report.as_text()
    assert "25.0% of the rows lose some" in text
    assert "line 3: 23 tokens" in text
    json.dumps(report.as_json())


def test_the_report_shows_both_answers_of_a_preference(tmp_path: Path) -> None:
    path = write(tmp_path, {"prompt": "a", "chosen": "b", "rejected": "c"})
    report = describe(path, byte_tokenizer(), DPO, tmp_path / "cache")
    assert [(one.part, one.marked_text) for one in report.examples] == [
        ("chosen", "a⟦b</s>⟧"),
        ("rejected", "a⟦c</s>⟧"),
    ]
