"""The programs of the real ranks, with threads as ranks."""

import exchange_programs
import overflow_programs
import pytest
import refusal_programs

import hvdext as hvd
from hvdext.testing import run_ranks

PROGRAMS = exchange_programs.PROGRAMS | overflow_programs.PROGRAMS | refusal_programs.PROGRAMS
# Real ranks come in twos and fours, so threads come in threes where they can.
PAIRS = [(3 if 3 in program.sizes else program.sizes[-1], name) for name, program in PROGRAMS.items()]


@pytest.mark.filterwarnings("ignore:Gradients do not exist")
@pytest.mark.parametrize(("size", "name"), PAIRS)
def test_program(size, name):
    program = PROGRAMS[name]
    program.check(run_ranks(size, lambda comm: program.run(hvd), timeout=30))
