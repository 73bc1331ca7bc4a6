"""One rank failed, all raise: which class, which words, whose error it comes from."""

import pytest

from hvdext.comm.communicator import SoloComm
from hvdext.comm.failures import on_all, on_root, raise_for, raise_on_all, told
from hvdext.testing import run_ranks

# The second and third of three ranks fail, in two ways.
MISSING = FileNotFoundError("no such file: a.keras")
DIVIDED = ZeroDivisionError("division by zero")
OWN = [None, MISSING, DIVIDED]
WORDS = (
    "The model could not be read:\n"
    "  rank 1: FileNotFoundError: no such file: a.keras\n"
    "  rank 2: ZeroDivisionError: division by zero"
)


def _raised(call):
    """The error that `call` raises on each rank; None where it does not."""

    def run(comm):
        try:
            call(comm)
        except Exception as error:
            return error
        return None

    return run_ranks(3, run)


def _failing(comm):
    if OWN[comm.rank] is not None:
        raise OWN[comm.rank]
    return comm.rank


CALLS = {
    "raise_on_all": lambda comm: raise_on_all(
        comm, OWN[comm.rank], "The model could not be read", "hvdext.test.read"
    ),
    "on_all": lambda comm: on_all(
        comm, lambda: _failing(comm), "The model could not be read", "hvdext.test.read"
    ),
    "raise_for": lambda comm: raise_for(
        comm.ranks, [error and told(error) for error in OWN], "The model could not be read", OWN[comm.rank]
    ),
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_all_ranks_raise_the_same_with_their_own_as_its_cause(call):
    errors = _raised(call)
    assert [type(error) for error in errors] == [FileNotFoundError] * 3  # the first failed rank's
    assert [str(error) for error in errors] == [WORDS] * 3
    assert [error.__cause__ for error in errors] == OWN


@pytest.mark.parametrize(
    ("error", "kind", "text"),
    [
        (FileNotFoundError("gone"), FileNotFoundError, "FileNotFoundError: gone"),
        (FileExistsError("there"), FileExistsError, "FileExistsError: there"),
        (PermissionError("no"), PermissionError, "PermissionError: no"),
        (TimeoutError("late"), TimeoutError, "TimeoutError: late"),
        (NotADirectoryError("a file"), OSError, "NotADirectoryError: a file"),
        (OSError(28, "No space left"), OSError, "OSError: [Errno 28] No space left"),
        (ModuleNotFoundError("no h5py"), ImportError, "ModuleNotFoundError: no h5py"),
        (TypeError("a list"), TypeError, "TypeError: a list"),
        (ValueError("`x` must be 1. Received: x=2."), ValueError, "`x` must be 1. Received: x=2."),
        (UnicodeError("bytes"), ValueError, "bytes"),
        (KeyError("pen"), RuntimeError, "KeyError: 'pen'"),
        (MemoryError(), RuntimeError, "MemoryError"),
    ],
)
def test_the_class_is_the_fault_s_own_or_runtime_error(error, kind, text):
    def fail_on_last(comm):
        raise_on_all(comm, error if comm.rank == 2 else None, "It has failed", "hvdext.test.kind")

    errors = _raised(fail_on_last)
    assert [type(raised) for raised in errors] == [kind] * 3
    assert [str(raised) for raised in errors] == [f"It has failed:\n  rank 2: {text}"] * 3


def test_ranks_with_the_same_fault_are_named_together():
    def fail(comm):
        error = ValueError("no data" if comm.rank != 1 else "no model")
        raise_on_all(comm, error, "It has failed", "hvdext.test.alike")

    errors = _raised(fail)
    assert {str(error) for error in errors} == {"It has failed:\n  ranks 0, 2: no data\n  rank 1: no model"}


def test_ranks_of_a_group_are_named_by_their_number_in_the_job():
    def fail(comm):
        if comm.rank:
            error = ValueError("no data") if comm.rank == 2 else None
            raise_on_all(comm.subset((1, 2)), error, "It has failed", "hvdext.test.group")

    nobody, *errors = _raised(fail)
    assert nobody is None
    assert [str(error) for error in errors] == ["It has failed:\n  rank 2: no data"] * 2


def test_nobody_has_failed():
    def run(comm):
        raise_on_all(comm, None, "It has failed", "hvdext.test.none")
        raise_for(comm.ranks, [None] * 3, "It has failed", None)
        everyone = on_all(comm, lambda: comm.rank * 10, "It has failed", "hvdext.test.all")
        first = on_root(comm, lambda: comm.rank + 7, 1, "It has failed", "hvdext.test.root")
        return everyone, first

    assert run_ranks(3, run) == [([0, 10, 20], 8)] * 3


def test_one_rank_acts_and_all_raise():
    def run(comm):
        on_root(comm, lambda: _failing(comm), 1, "The model could not be read", "hvdext.test.root")

    errors = _raised(run)
    assert [type(error) for error in errors] == [FileNotFoundError] * 3
    assert {str(error) for error in errors} == {WORDS.rpartition("\n")[0]}
    assert [error.__cause__ for error in errors] == [None, MISSING, None]


def test_what_a_rank_was_at_and_what_to_do_are_part_of_the_words():
    everyone = [told(MISSING, "batch 9"), None, None]
    errors = _raised(lambda comm: raise_for(comm.ranks, everyone, "It has failed", None, "Go on from row 8."))
    assert {str(error) for error in errors} == {
        "It has failed:\n  rank 0: batch 9: FileNotFoundError: no such file: a.keras\nGo on from row 8."
    }


def test_alone_the_error_has_the_same_form():
    with pytest.raises(
        FileNotFoundError, match=r"^It has failed:\n  rank 0: FileNotFoundError: no such file"
    ):
        raise_on_all(SoloComm(), MISSING, "It has failed", "hvdext.test.alone")
