"""The scripted edits to Horovod's source: what is changed, where, and why.

Each edit is one exact piece of text in one file. It must occur there exactly once;
otherwise nothing is written and the build stops, because a fix that is quietly left out
is a hang that nobody can explain later.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from hvdext.engine.errors import EngineError

_OPS_FILE = "horovod/tensorflow/mpi_ops.cc"

# Every TensorFlow op of Horovod that talks to other ranks.
_COMMUNICATING_OPS = (
    "Allreduce",
    "GroupedAllreduce",
    "Allgather",
    "GroupedAllgather",
    "Broadcast",
    "BroadcastInplace",
    "BroadcastInplaceResource",
    "Reducescatter",
    "GroupedReducescatter",
    "Join",
    "Alltoall",
)


class FixError(EngineError):
    """A scripted edit does not fit the source it was written for."""


@dataclass(frozen=True)
class Edit:
    """Replaces one piece of text, which occurs exactly once, in one file.

    Attributes:
        file: path inside the unpacked source, with forward slashes.
        old: the text to find.
        new: the text to put in its place.
    """

    file: str
    old: str
    new: str


@dataclass(frozen=True)
class Fix:
    """The edits that belong together, and what they prevent.

    Attributes:
        name: how the built engine records that it has this fix.
        why: what goes wrong in stock Horovod.
        edits: all of them are made, or none.
        without: one sentence for users of an engine that lacks this protection; empty for a fix
            that only makes the source compile.
        controllers: which of Horovod's ways to bring ranks together the fix concerns.
    """

    name: str
    why: str
    edits: tuple[Edit, ...]
    without: str = ""
    controllers: tuple[str, ...] = ("gloo", "mpi")


STALL_CHECK = Fix(
    name="gloo-stall-check",
    controllers=("gloo",),
    why=(
        "The Gloo controller reserves its list of ranks and fills the memory behind it, but the "
        "list's size stays 0. The stall check walks that list, so it never sees a missing rank."
    ),
    without=(
        "Horovod's stall check never fires with the Gloo controller: a rank that skips a "
        "collective hangs the job without a message from Horovod (hvdext's own watchdog still "
        "ends the job at its deadline)."
    ),
    edits=(
        Edit(
            file="horovod/common/gloo/gloo_controller.cc",
            old="global_ranks_.reserve(size_);",
            new="global_ranks_.resize(size_);",
        ),
    ),
)

STATEFUL_OPS = Fix(
    name="stateful-ops",
    why=(
        "TensorFlow takes Horovod's ops for pure functions: inside a tf.function it removes one "
        "whose output nobody reads, so that its peers wait for ever, and evaluates one with "
        "constant inputs only once."
    ),
    without=(
        "TensorFlow may prune or constant-fold Horovod's collectives inside a tf.function: one "
        "whose output is unused is never sent, and its peers wait (hvdext's own collectives "
        "avoid this, calls of Horovod's API do not)."
    ),
    edits=tuple(
        Edit(
            file=_OPS_FILE,
            old=f'REGISTER_OP("Horovod{op}")\n',
            new=f'REGISTER_OP("Horovod{op}")\n    .SetIsStateful()\n',
        )
        for op in _COMMUNICATING_OPS
    ),
)

XLA_HEADERS = Fix(
    name="xla-headers-for-gpu-only",
    why=(
        "Horovod's XLA ops exist on GPUs only, but their file includes XLA's headers everywhere. "
        "TensorFlow 2.19 ships some of these without the LLVM headers they include; 2.20 and 2.21 "
        "keep some of them in other places. Without a GPU nothing in the file needs them."
    ),
    edits=(
        Edit(
            file="horovod/tensorflow/xla_mpi_ops.cc",
            old="#if TENSORFLOW_VERSION >= 2006000000\n",
            new="#if TENSORFLOW_VERSION >= 2006000000 && HAVE_GPU\n",
        ),
    ),
)

_QUEUE_HEADER = "horovod/common/tensor_queue.h"
_QUEUE_FILE = "horovod/common/tensor_queue.cc"

WAKE_ON_ARRIVAL = Fix(
    name="wake-on-arrival",
    why=(
        "The engine's thread looks for new tensors once per cycle (1 ms) and sleeps in between, which "
        "costs up to a cycle for every message. It is woken instead when a tensor arrives. While other "
        "ranks are not ready for one it asks again soon, and after a while once per cycle: asking without a "
        "pause would take the processor from those ranks."
    ),
    edits=(
        Edit(
            file=_QUEUE_HEADER,
            old="#include <iostream>\n#include <mutex>\n",
            new=(
                "#include <algorithm>\n#include <chrono>\n#include <condition_variable>\n"
                "#include <iostream>\n#include <mutex>\n"
            ),
        ),
        Edit(
            file=_QUEUE_HEADER,
            old="  void RemoveJoinTensor();\n",
            new=(
                "  void RemoveJoinTensor();\n\n"
                "  // Returns when a tensor has been added to any queue, at the latest after `duration`.\n"
                "  static void WaitForTensor(std::chrono::steady_clock::duration duration);\n"
            ),
        ),
        Edit(
            file=_QUEUE_FILE,
            old="// Add a TensorTableEntry as well as its message to the queue.\n",
            new="""namespace {
std::mutex arrival_mutex;
std::condition_variable arrival;
bool arrived = false;
bool returned = false; // other ranks were not ready for a tensor
int soon = 0; // how many times more to ask them again before a cycle is over

void SignalArrival() {
  {
    std::lock_guard<std::mutex> guard(arrival_mutex);
    arrived = true;
    soon = 10;
  }
  arrival.notify_one();
}

void SignalReturn() {
  std::lock_guard<std::mutex> guard(arrival_mutex);
  returned = true;
}
} // namespace

void TensorQueue::WaitForTensor(std::chrono::steady_clock::duration duration) {
  std::unique_lock<std::mutex> lock(arrival_mutex);
  if (returned && soon > 0) {
    --soon;
    duration = std::min<std::chrono::steady_clock::duration>(duration, std::chrono::microseconds(100));
  }
  arrival.wait_for(lock, duration, [] { return arrived; });
  arrived = returned = false;
}

// Add a TensorTableEntry as well as its message to the queue.
""",
        ),
        Edit(
            file=_QUEUE_FILE,
            old="  message_queue_.push(std::move(message));\n  return Status::OK();\n",
            new="  message_queue_.push(std::move(message));\n  SignalArrival();\n  return Status::OK();\n",
        ),
        Edit(
            file=_QUEUE_FILE,
            old="    message_queue_.push(std::move(messages[i]));\n  }\n  return Status::OK();\n",
            new=(
                "    message_queue_.push(std::move(messages[i]));\n  }\n"
                "  SignalArrival();\n  return Status::OK();\n"
            ),
        ),
        Edit(
            file=_QUEUE_FILE,
            old=("  std::lock_guard<std::mutex> guard(mutex_);\n  while (!messages.empty()) {\n"),
            new=(
                "  std::lock_guard<std::mutex> guard(mutex_);\n"
                "  if (!messages.empty()) {\n    SignalReturn();\n  }\n"
                "  while (!messages.empty()) {\n"
            ),
        ),
        Edit(
            file="horovod/common/operations.cc",
            old=(
                "  if (sleep_duration > std::chrono::steady_clock::duration::zero()) {\n"
                "    std::this_thread::sleep_for(sleep_duration);\n"
                "  }\n"
            ),
            new="  TensorQueue::WaitForTensor(sleep_duration);\n",
        ),
    ),
)

FIXES = (STALL_CHECK, STATEFUL_OPS, WAKE_ON_ARRIVAL, XLA_HEADERS)
PROTECTIONS = tuple(fix for fix in FIXES if fix.without)


def apply(source: Path, fixes: tuple[Fix, ...] = FIXES) -> None:
    """Makes all edits in an unpacked source tree, or none of them.

    Args:
        source: the folder that holds Horovod's `setup.py`.
        fixes: what to apply.

    Raises:
        FixError: if any edit's old text does not occur exactly once; no file has then
            been changed.
    """
    edits = [edit for fix in fixes for edit in fix.edits]
    texts = {name: _read(source, name) for name in {edit.file for edit in edits}}
    problems = [
        f"{edit.file}: {edit.old.strip()!r} must occur exactly once. Received: "
        f"{texts[edit.file].count(edit.old)} occurrences."
        for edit in edits
        if texts[edit.file].count(edit.old) != 1
    ]
    problems += _repeated(edits)
    if problems:
        raise FixError(
            "The source fixes do not fit this Horovod source; nothing was changed and nothing "
            "will be built:\n  " + "\n  ".join(problems)
        )
    for edit in edits:
        texts[edit.file] = texts[edit.file].replace(edit.old, edit.new)
    for name, text in texts.items():
        (source / name).write_text(text, encoding="utf-8")


def digest(fixes: tuple[Fix, ...] = FIXES) -> str:
    """Returns a hexadecimal digest that changes with any edit."""
    parts = [(fix.name, edit.file, edit.old, edit.new) for fix in fixes for edit in fix.edits]
    return hashlib.sha256(repr(parts).encode()).hexdigest()


def _read(source: Path, name: str) -> str:
    try:
        return (source / name).read_text(encoding="utf-8")
    except FileNotFoundError:
        raise FixError(
            f"The source fixes need the file {name!r}, which is not in {source}; nothing was "
            "changed and nothing will be built."
        ) from None


def _repeated(edits: list[Edit]) -> list[str]:
    """Two edits of the same text: the second one would find nothing to replace."""
    counts = Counter((edit.file, edit.old) for edit in edits)
    return [
        f"{file}: {old.strip()!r} must be edited by one fix only. Received: {count} edits."
        for (file, old), count in counts.items()
        if count > 1
    ]
