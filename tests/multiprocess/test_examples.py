"""The examples run as their own first lines say, and their ranks end with the same weights."""

import itertools
import re
from pathlib import Path

import numpy as np
import pytest

from tests.multiprocess.launching.launch import HOROVODRUN, launch_script

pytestmark = pytest.mark.multiprocess

EXAMPLES = Path(__file__).parents[2] / "examples"
OPTIONS = [
    "average",
    "sum, learning rate / size",
    "adasum",
    "float16 on the wire",
    "2 micro-batches per update",
    "weighed by samples",
    "kernels only, biases local",
    "within pairs of ranks",
]


def _lines_of(script, *arguments, ranks=2, **options):
    """What rank 0 printed."""
    ended = launch_script(ranks, EXAMPLES / script, *arguments, timeout=300, **options)
    assert ended.exit_code == 0, ended.output
    start = "[0]<stdout>:"
    return [line.removeprefix(start) for line in ended.output.splitlines() if line.startswith(start)]


def _difference(lines):
    (found,) = [line for line in lines if "largest difference between" in line]
    return re.search(r"largest difference between .*?(\S+)$", found).group(1)


def _numbers(lines, pattern):
    """The numbers in the one line that `pattern` matches."""
    (found,) = [match for line in lines if (match := re.search(pattern, line))]
    return [float(number) for number in found.groups()]


def test_train(tmp_path):
    lines = _lines_of("train.py", "--epochs", "2", "--output", str(tmp_path))
    assert _difference(lines) == "0.0"
    assert (tmp_path / "train.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "model.keras").read_bytes().startswith(b"PK")


def test_basic():
    lines = _lines_of("basic.py", launcher=HOROVODRUN)
    assert _difference(lines) == "0.0"
    assert _numbers(lines, r"test accuracy (\S+);")[0] > 0.8


def test_advanced(tmp_path):
    lines = _lines_of("advanced.py", "--epochs", "4", "--output", str(tmp_path))
    assert _difference(lines) == "0.0"
    assert any("the warm-up has ended, the learning rate is 0.04" in line for line in lines)
    assert "written by rank 0: best.keras, resume, tensorboard" in lines
    logs = [path.name for path in (tmp_path / "tensorboard" / "train").iterdir()]
    assert len([name for name in logs if "tfevents" in name]) == 1


def test_process_sets():
    lines = _lines_of("process_sets.py", ranks=4)
    (even,) = _numbers(lines, r"model of ranks \[0, 2\]: test accuracy (\S+)")
    (odd,) = _numbers(lines, r"model of ranks \[1, 3\]: test accuracy (\S+)")
    (both,) = _numbers(lines, r"both together: test accuracy (\S+)")
    assert min(even, odd, both) > 0.8
    assert "different models: 2" in lines


def test_train_sliced(tmp_path):
    arguments = ["--epochs", "2", "--layers", "1", "--output", str(tmp_path)]
    lines = _lines_of("train_sliced.py", *arguments)
    by_rank, whole = _numbers(lines, r"slices=2\): \[(\d+), .*\] parameters by rank, (\d+) in the whole")
    assert by_rank < 0.6 * whole
    assert _numbers(lines, r"opened in plain Keras: test accuracy ([\d.]+);")[0] > 0.6
    assert _numbers(lines, r"between its logits and those of one process: (\S+)")[0] < 0.01
    assert (tmp_path / "sliced.keras").read_bytes().startswith(b"PK")


def test_strategy():
    lines = _lines_of("strategy.py", "--strategy", str(EXAMPLES / "strategies" / "diloco.yaml"))
    assert _difference(lines) == "0.0"


def test_gradient_accumulation():
    lines = _lines_of("gradient_accumulation.py")
    (small,) = _numbers(lines, r"4 micro-batches of 8: (\d+) exchanges")
    (large,) = _numbers(lines, r"one batch of 32: (\d+) exchanges")
    assert small == large > 0
    apart, accuracy = _numbers(lines, r"between the two models: (\S+); test accuracy (\S+)")
    assert apart < 1e-4
    assert accuracy > 0.8


def test_uneven_batches():
    lines = _lines_of("uneven_batches.py")
    assert _difference(lines) == "0.0"
    longest, shortest, updates = _numbers(lines, r"by rank: \[(\d+), (\d+)\]; updates: (\d+)")
    assert longest > shortest
    assert updates == 6 * longest
    shared, at_once = _numbers(lines, r"over the shares: (\S+); in one process: (\S+)")
    assert shared == at_once > 0.8


def test_custom_loop():
    assert _difference(_lines_of("custom_loop.py")) == "0.0"


def test_gradient_options():
    rows = {line[:28].strip(): line[28:].split() for line in _lines_of("gradient_options.py")}
    assert [option for option in rows if option in OPTIONS] == OPTIONS
    for option in OPTIONS:
        accuracy, updates, sent, unit, apart = rows[option]
        assert float(accuracy) > 0.5
        assert int(updates) > 0
        assert float(sent) > 0
        assert unit == "KiB"
        # Local biases differ from rank to rank, everything else is the same.
        assert (float(apart) > 0) == (option == "kernels only, biases local")
    assert rows["average"][-1] == "0"


def test_warmup():
    lines = _lines_of("warmup.py")
    assert _difference(lines) == "0.0"
    pattern = r"scores by rank (\S+), (\S+); all take rank (\d)"
    rounds = [_numbers([line], pattern) for line in lines if "round" in line and "scores" in line]
    assert len(rounds) == 8
    for scores, following in itertools.pairwise(rounds):
        # The best of one round is the first rank's candidate of the next.
        assert following[0] == min(scores[:2]) == scores[int(scores[2])]
    first, last = _numbers(lines, r"initial weights (\S+), of the last round's best (\S+)")
    assert last < first


def test_consensus():
    lines = _lines_of("consensus.py", "--interrupt-after", "100")
    assert _difference(lines) == "0.0"
    first, second = _numbers(lines, r"an interrupt: True; samples by rank: \[(\d+), (\d+)\]")
    assert 16 * 98 < second < 16 * 111  # the next check after 100 batches; the last of an epoch is smaller
    assert first > second
    mean, common = _numbers(lines, r"mean of the ranks: (\S+); of their consensus: (\S+)")
    assert common > mean > 0.8
    assert _numbers(lines, r"were (\S+) away from it")[0] > 0.1


def test_train_sync():
    lines = _lines_of("train_sync.py", "--epochs", "3")
    assert _difference(lines) == "0.0"
    samples, steps = _numbers(lines, r"all: (\d+) samples in (\d+) steps; \d+ samples/s")
    assert [samples, steps] == [3 * 44 * 32, 3 * 44]
    fast, slow = (_numbers(lines, rf"^ +{rank} +\d+ +(\d+) ")[0] for rank in range(2))
    assert fast == slow == 3 * 22
    assert _numbers(lines, r"test accuracy (\S+)")[0] > 0.8


def test_train_async():
    lines = _lines_of("train_async.py", "--epochs", "3", "--slow-factor", "4")
    assert _difference(lines) == "0.0"
    samples, steps = _numbers(lines, r"all: (\d+) samples in (\d+) steps; \d+ samples/s")
    assert [samples, steps] == [3 * 1437, 3 * 45]  # each sample once per epoch, over the ranks
    fast, slow = (_numbers(lines, rf"^ +{rank} +\d+ +(\d+) ")[0] for rank in range(2))
    assert fast > slow > 0
    assert _numbers(lines, r"test accuracy (\S+)")[0] > 0.8


def test_sync_monitor(tmp_path):
    arguments = ["--epochs", "3", "--every", "4", "--delay", "1", "--output", str(tmp_path)]
    lines = _lines_of("sync_monitor.py", *arguments)
    assert _difference(lines) == "0.0"
    table = [line.split() for line in lines if re.match(r" +\d+ +\d", line)]
    assert [int(row[0]) for row in table] == [1, 2, 3]
    for _, distance, _, noise, sent, _, saved, _ in table:
        assert float(distance) > 0
        assert float(noise) > 0 or noise == "nan"
        assert float(saved) > 2 * float(sent) > 0  # an exchange every fourth step
    assert (tmp_path / "sync.png").read_bytes().startswith(b"\x89PNG")
    assert len(list((tmp_path / "tensorboard").iterdir())) == 1
    assert "sync/divergence/" in (tmp_path / "epochs.csv").read_text()


def test_train_pipeline(tmp_path):
    arguments = ["--epochs", "3", "--schedule", "interleaved", "--output", str(tmp_path)]
    lines = _lines_of("train_pipeline.py", *arguments)
    first, second = _numbers(lines, r"weights by rank: \[(\d+), (\d+)\]")
    (accuracy,) = _numbers(lines, r"test accuracy (\S+), loss")
    whole, again = _numbers(lines, r"the file, (\d+) weights, in plain Keras: test accuracy (\S+)")
    assert whole == first + second
    assert again == accuracy > 0.8


def test_deploy():
    lines = _lines_of("deploy.py")
    for name in ("model.keras", "exported", "model.weights.h5"):
        (accuracy,) = _numbers(
            lines, rf"^{re.escape(name)}: test accuracy ([0-9.]+); images by rank \[180, 180\]"
        )
        assert accuracy > 0.8


def test_batch_predict(tmp_path):
    model, output = tmp_path / "model.keras", tmp_path / "predictions"
    _lines_of("train.py", "--epochs", "2", "--output", str(tmp_path))
    lines = _lines_of("batch_predict.py", "--model", str(model), "--output", str(output))
    # 23 batches of 16; the one in the middle could not be read at first.
    assert "interrupted: hvd.predict has failed:" in lines
    assert any("batch 11: OSError" in line for line in lines)
    (row,) = _numbers(lines, r"Rows .* are done and kept in .* goes on from row (\d+)")
    assert 0 < row <= 11 * 16
    images, streamed = _numbers(lines, r"2 ranks: (\d+) images, test accuracy (\S+)")
    (evaluated,) = _numbers(lines, r"by hvd.evaluate: test accuracy (\S+)")
    assert images == 360
    assert streamed == evaluated > 0.5
    assert np.load(output / "predictions.npy").shape == (360, 10)
