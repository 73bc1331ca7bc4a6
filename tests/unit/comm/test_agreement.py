"""What ranks are told when they differ."""

import pytest

from hvdext.comm import agreement
from hvdext.testing import run_ranks


def test_the_text_names_ranks_and_values():
    everyone = [{"op": "'Sum'", "same": "1"}, {"op": "'Average'", "same": "1"}, {"op": "'Sum'", "same": "1"}]
    assert agreement.disagreement("this", everyone, (0, 2, 5)) == (
        "The ranks disagree about this:\n  op: ranks 0, 5: 'Sum'; rank 2: 'Average'"
    )


def test_a_fact_that_one_rank_lacks():
    text = agreement.disagreement("this", [{"a": "1", "b": "2"}, {"a": "1"}], (0, 1))
    assert text.splitlines()[1:] == ["  b: rank 0: 2; rank 1: (missing)"]


def test_many_differences_are_counted():
    everyone = [{str(i): str(rank) for i in range(23)} for rank in range(2)]
    lines = agreement.disagreement("this", everyone, (0, 1)).splitlines()
    assert len(lines) == 1 + 20 + 1
    assert lines[-1].strip() == "and 3 more"


def _check(comm, facts):
    try:
        agreement.check(comm, "the test", facts(comm.rank))
    except ValueError as error:
        return str(error)
    return None


def test_equal_facts_pass_in_any_order():
    def facts(rank):
        return {"a": 1, "b": (2,)} if rank else {"b": (2,), "a": 1}

    assert run_ranks(3, _check, facts) == [None] * 3


def test_different_facts_fail_alike_on_every_rank():
    texts = run_ranks(3, _check, lambda rank: {"a": rank // 2})
    assert set(texts) == {"The ranks disagree about the test:\n  a: ranks 0, 1: 0; rank 2: 1"}


def test_an_object_is_compared_by_what_it_says():
    with pytest.raises(ValueError, match=r"rank 1: 1\.0"):
        run_ranks(2, lambda comm: agreement.check(comm, "x", {"a": 1.0 if comm.rank else 1}))
