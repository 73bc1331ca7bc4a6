"""Kill ranks while predictions are streamed: what is done stays, is named, and is not done again."""

import json
import re

import numpy as np
import pytest

from tests.multiprocess.launching.launch import launch
from tests.multiprocess.programs.predicting import BATCH, BATCHES

pytestmark = pytest.mark.multiprocess


def _done(folder):
    return json.loads((folder / "progress.json").read_text())["rows"]


def _said(ended, rank, what):
    """What a survivor has said: of a lost rank, or, if the launcher was faster, of its own end."""
    how = r"hvd\.predict (?:has lost a rank|is ended by SIGTERM)\. "
    found = re.search(rf"\[{rank}\]<stderr>:hvdext: {how}{what}", ended.output)
    assert found, ended.output
    return found.groups()


def test_killed_ranks_and_resumed_predictions(tmp_path):
    def stream(**orders):
        env = {"PREDICT_FOLDER": str(tmp_path), **orders}
        return launch(2, "programs.predicting:stream", timeout=90, env=env)

    ended = stream(PREDICT_KILL="1", PREDICT_AT="1000")
    assert ended.exit_code not in (0, None), ended.output
    first = _done(tmp_path)
    assert 0 < first < 1200 * BATCH
    assert len(np.load(tmp_path / "predictions.npy")) == first
    row, folder, following = _said(
        ended, 0, r"Rows 0 to (\d+) are done and kept in '(.*?)'; .* from row (\d+)\."
    )
    assert (int(row) + 1, folder, int(following)) == (first, str(tmp_path), first)

    # Rank 0 itself: what it has written is there.
    ended = stream(PREDICT_KILL="0", PREDICT_AT="2000")
    assert ended.exit_code not in (0, None), ended.output
    second = _done(tmp_path)
    assert first < second < BATCHES * BATCH
    (row,) = _said(ended, 1, r"Rows 0 to (\d+) are done")
    assert first <= int(row) + 1 <= second

    ended = stream()
    assert ended.exit_code == 0, ended.output
    assert ended.ranks[0]["is_same"]
    assert ended.ranks[0]["files"] == ["predictions.npy", "progress.json"]
    asked = sorted({index for rank in ended.ranks for index in rank["asked"]} - {0})
    assert asked == list(range(second // BATCH, BATCHES))
