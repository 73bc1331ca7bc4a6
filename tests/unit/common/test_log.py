"""One logger with the rank in its records, shown by default; warnings that point at the user's line."""

import logging
import subprocess
import sys

import pytest

from hvdext.common import log


@pytest.fixture
def of_rank_3():
    log.set_rank(3)
    yield
    log.set_rank(None)


def test_every_record_knows_the_rank(caplog, of_rank_3):
    log.logger("test").warning("on a child")
    logging.getLogger("hvdext").warning("on the root")
    log.set_rank(None)
    log.logger("test").warning("after the end")
    assert [(record.name, record.rank, record.getMessage()) for record in caplog.records] == [
        ("hvdext.test", 3, "on a child"),
        ("hvdext", 3, "on the root"),
        ("hvdext.test", None, "after the end"),
    ]


_PROGRAM = """
import logging
from hvdext.common import log
{setup}
log.logger("test").warning("%d samples are left out", 3)
log.set_rank(1)
log.logger("test").info("a detail")
log.logger("test").warning("a rank is lost")
"""


@pytest.mark.parametrize(
    ("setup", "shown"),
    [
        ("", ["hvdext test: 3 samples are left out", "hvdext test: rank 1: a rank is lost"]),
        (
            "log.show(logging.INFO)",
            [
                "hvdext test: 3 samples are left out",
                "hvdext test: rank 1: a detail",
                "hvdext test: rank 1: a rank is lost",
            ],
        ),
        (
            "logging.basicConfig(format='%(rank)s %(message)s')",
            ["None 3 samples are left out", "1 a rank is lost"],
        ),
        (
            "log.logger('test'); logging.getLogger('hvdext').addHandler(logging.NullHandler())",
            [],
        ),
    ],
    ids=["by default", "more of it", "where logging is set up", "where hvdext's logger has a handler"],
)
def test_what_is_shown(setup, shown):
    program = _PROGRAM.format(setup=setup)
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert ended.stderr.splitlines() == shown
    assert ended.stdout == ""


def test_warnings_point_at_the_user_s_line():
    def of(module):
        names = {"__name__": module, "log": log}
        exec(
            "def call(function=None):\n    function() if function else log.warn('look', DeprecationWarning)",
            names,
        )
        return names["call"]

    inner, fit = of("hvdext.gradients.optimizer"), of("keras.src.trainers")
    with pytest.warns(DeprecationWarning, match="look") as caught:
        fit(inner)
    assert caught[0].filename == __file__
