"""Horovod's own tests of TensorFlow and Keras, run on hvdext with two ranks:

    HOROVOD_SOURCE=<a checkout of Horovod's repository at v0.28.1> python -m tests.peers.horovod_tests [words]

Words pick the tests whose names contain one of them. Fails if a test fails that is not in `cannot_pass.txt`,
or one does not that is.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.peers.mending import mended_copy
from tests.peers.rank import name_of, told

_HERE = Path(__file__).parent
_RANKS = 2
_STARTS = 20  # of one file: each ends with a test that hangs


def main(words: list[str]) -> int:
    """Runs the tests and says what has become of them; returns 0 if that is as expected."""
    source = os.environ.get("HOROVOD_SOURCE")
    if not source:
        print("HOROVOD_SOURCE must be a checkout of Horovod's repository at v0.28.1. Received: nothing.")
        return 2
    with tempfile.TemporaryDirectory() as folder:
        answers: dict[str, dict] = {}
        for file in mended_copy(Path(source), Path(folder)):
            answers |= _run(file, words)
    return report(answers, read_list(_HERE / "cannot_pass.txt"), bool(words))


def _run(file: Path, words: list[str]) -> dict[str, dict]:
    """Each test's answers, the worse of the ranks'; starts the ranks again after a test that hangs."""
    folder = file.parent / file.stem
    folder.mkdir()
    names = _collected(file)
    unwanted = {name for name in names if words and not any(word in name for word in words)}
    done: dict[str, dict] = {}
    for _ in range(_STARTS):
        left = [name for name in names if name not in done and name not in unwanted]
        if not left:
            return done
        skipped = file.parent / "skipped.json"
        skipped.write_text(json.dumps([*done, *unwanted]))
        _launch([sys.executable, "-m", "tests.peers.rank", str(file), str(folder), str(skipped)])
        ranks = [told(folder / f"rank{rank}.jsonl") for rank in range(_RANKS)]
        finished = [name for name in left if all(name in rank for rank in ranks)]
        done |= {name: _worse([rank[name] for rank in ranks]) for name in finished}
        hung = [name for name in left if name not in done][:1]
        done |= {name: {"outcome": "failed", "text": "hangs, or ends a rank"} for name in hung}
    raise RuntimeError(f"{file.name}: more than {_STARTS} tests hang. Left: {left}")


def _worse(answers):
    return max(answers, key=lambda answer: ("skipped", "passed", "failed").index(answer["outcome"]))


def _collected(file):
    options = [
        "--collect-only",
        "-q",
        "-p",
        "no:cacheprovider",
        "-p",
        "no:xdist",
        "-c",
        os.devnull,
        "-W",
        "ignore",
    ]
    found = subprocess.run(
        [sys.executable, "-m", "pytest", *options, f"--rootdir={file.parent}", str(file)],
        capture_output=True,
        text=True,
        env=_environment(file.parent),
    )
    names = [name_of(line) for line in found.stdout.splitlines() if "::" in line]
    if not names:
        raise RuntimeError(f"{file.name} does not import:\n{found.stdout}{found.stderr}")
    return names


def _launch(command):
    subprocess.run(
        ["horovodrun", "-np", str(_RANKS), *command],
        env=_environment(Path(command[3]).parent),
        stdout=sys.stderr,
        check=False,
    )


def _environment(folder):
    paths = [str(folder), str(_HERE.parents[1]), os.environ.get("PYTHONPATH", "")]
    return os.environ | {
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        "TF_CPP_MIN_LOG_LEVEL": "3",
        "CUDA_VISIBLE_DEVICES": "",
    }


def read_list(file: Path) -> dict[str, str]:
    """The reason of each test that cannot pass: lines with names below lines that begin with #."""
    reasons, reason, heading = {}, "", False
    for line in filter(None, map(str.strip, file.read_text().splitlines())):
        if line.startswith("#"):
            text = line.lstrip("# ")
            reason, heading = (f"{reason} {text}" if heading else text), True
        else:
            reasons[line], heading = reason, False
    return reasons


def report(answers: dict[str, dict], known: dict[str, str], some_only: bool) -> int:
    """Prints how the tests went; returns 0 if those that fail are the known ones.

    Args:
        answers: outcome and text of each test.
        known: the reason of each that cannot pass.
        some_only: whether other tests have been left out.
    """
    failed = {test for test, answer in answers.items() if answer["outcome"] == "failed"}
    for test in sorted(failed - set(known)):
        print(f"FAILED {test}\n{answers[test]['text'][-3000:]}\n")
    surprises = sorted(test for test in known if test in answers and test not in failed)
    unknown = sorted(test for test in known if test not in answers and not some_only)
    for test in surprises:
        print(f"ON THE LIST, BUT {answers[test]['outcome'].upper()}: {test}")
    for test in unknown:
        print(f"ON THE LIST, BUT THERE IS NO SUCH TEST: {test}")
    outcomes = [answer["outcome"] for answer in answers.values()]
    passed, skipped = outcomes.count("passed"), outcomes.count("skipped")
    expected = len(failed & set(known))
    print(f"{passed} passed, {skipped} skipped, {expected} cannot pass, {len(failed) - expected} failed")
    return int(bool(failed - set(known) or surprises or unknown))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
