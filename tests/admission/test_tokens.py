"""Tokens come back to what they were made for, and to nothing else."""

import pytest
from alto.v1 import error_pb2
from alto_admission.domain.tokens import page_key, page_token, resume_token, resumed_sequence
from alto_common.errors import DomainError
from hypothesis import given
from hypothesis import strategies as st

# Without NUL, and without surrogates, as text that a database keeps.
KEPT = st.characters(exclude_characters="\0", exclude_categories=["Cs"])


@given(st.binary(), st.integers(0, 2**53), st.text(KEPT))
def test_a_page_token_comes_back(binding, number, text):
    assert page_key(page_token(binding, (number, text)), binding, (int, str)) == (number, text)


@given(st.text(max_size=100))
def test_any_other_page_token_is_refused(token):
    if not token:
        assert page_key(token, b"list", (int,)) is None
        return
    with pytest.raises(DomainError) as caught:
        page_key(token, b"list", (int,))
    assert caught.value.reason == error_pb2.ERROR_REASON_PAGE_TOKEN_INVALID


@pytest.mark.parametrize(("binding", "kinds"), [(b"other", (int, str)), (b"list", (int,)), (b"list", (str, str))])
def test_a_page_token_of_another_list_is_refused(binding, kinds):
    with pytest.raises(DomainError, match="does not belong"):
        page_key(page_token(b"list", (1, "a")), binding, kinds)


@pytest.mark.parametrize("key", [(2**63, "a"), (-(2**63) - 1, "a"), (1, "\ud800"), (1, "a\0")])
def test_a_page_token_that_no_database_can_compare_with_is_refused(key):
    with pytest.raises(DomainError, match="does not belong"):
        page_key(page_token(b"list", key), b"list", (int, str))


@given(st.text(min_size=1), st.integers(0, 2**63 - 1))
def test_a_resume_token_comes_back(task_id, sequence):
    assert resumed_sequence(resume_token(task_id, sequence), task_id, sequence) == sequence


@pytest.mark.parametrize(
    "token", [resume_token("other", 1), resume_token("task", 4), "", "x", "ä", resume_token("task", 1) + "AA"]
)
def test_any_other_resume_token_is_refused(token):
    with pytest.raises(DomainError) as caught:
        resumed_sequence(token, "task", 3)
    assert caught.value.reason == error_pb2.ERROR_REASON_RESUME_TOKEN_INVALID
