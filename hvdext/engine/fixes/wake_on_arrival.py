"""The engine's thread starts when there is something to do."""

from __future__ import annotations

from hvdext.engine.fixes.edits import Edit, Fix
from hvdext.engine.fixes.sources import new_files

_QUEUE_HEADER = "horovod/common/tensor_queue.h"
_QUEUE_FILE = "horovod/common/tensor_queue.cc"

WAKE_ON_ARRIVAL = Fix(
    name="wake-on-arrival",
    why=(
        "The engine's thread looks for new tensors once per cycle (1 ms) and sleeps in between, which "
        "costs up to a cycle for every message. It is woken instead when a tensor arrives. While other "
        "ranks are not ready for one it asks again soon, and after a while once per cycle: asking without a "
        "pause would take the processor from those ranks. A rank that has nothing looks 50 times a second: "
        "those that have something wait for it to get it, too. Only where ranks exchange without this one, "
        "and do not share memory with it to wake it, does it look in every cycle."
    ),
    edits=(
        Edit(
            file="CMakeLists.txt",
            old='        "${PROJECT_SOURCE_DIR}/horovod/common/tensor_queue.cc"\n',
            new=(
                '        "${PROJECT_SOURCE_DIR}/horovod/common/local/doorbell.cc"\n'
                '        "${PROJECT_SOURCE_DIR}/horovod/common/tensor_queue.cc"\n'
            ),
        ),
        Edit(
            file=_QUEUE_HEADER,
            old="#include <iostream>\n#include <mutex>\n",
            new="#include <chrono>\n#include <iostream>\n#include <mutex>\n",
        ),
        Edit(
            file=_QUEUE_HEADER,
            old="  void RemoveJoinTensor();\n",
            new=(
                "  void RemoveJoinTensor();\n\n"
                "  bool HasTensors();\n\n"
                "  // Returns when a tensor has been added to any queue, at the latest after `cycle`; later\n"
                "  // where no queue has tensors.\n"
                "  //\n"
                "  // others_do: other ranks may exchange without this one, but must ask it whether "
                "they may.\n"
                "  static void WaitForTensor(std::chrono::steady_clock::duration cycle, bool has_tensors,\n"
                "                            bool others_do);\n"
            ),
        ),
        Edit(
            file=_QUEUE_FILE,
            old="// Add a TensorTableEntry as well as its message to the queue.\n",
            new="""namespace {
std::atomic<bool> returned{false}; // other ranks were not ready for a tensor
std::atomic<int> soon{0};          // how many times more to ask them again before a cycle is over

void SignalArrival() {
  soon = 10;
  hvdext::Doorbell::Ring();
}
} // namespace

bool TensorQueue::HasTensors() {
  std::lock_guard<std::mutex> guard(mutex_);
  return !tensor_table_.empty();
}

void TensorQueue::WaitForTensor(std::chrono::steady_clock::duration cycle, bool has_tensors,
                                bool others_do) {
  using Time = std::chrono::steady_clock::duration;
  const bool is_woken = hvdext::Doorbell::ReachesAll(); // by whatever comes to any rank
  Time limit = cycle;
  if (!has_tensors) {
    if (is_woken || !others_do) {
      limit = std::max<Time>(cycle, std::chrono::milliseconds(20));
    }
  } else if (is_woken) {
    if (returned && soon == 10) {
      soon = 0;
      limit = Time::zero(); // what the ranks have agreed on may be void: once more, from the beginning
    }
  } else if (returned && soon > 0) {
    --soon;
    limit = std::min<Time>(cycle, std::chrono::microseconds(100));
  }
  returned = false;
  hvdext::Doorbell::Wait(limit, has_tensors || others_do);
}

// Add a TensorTableEntry as well as its message to the queue.
""",
        ),
        Edit(
            file=_QUEUE_FILE,
            old='#include "tensor_queue.h"\n',
            new=(
                '#include "tensor_queue.h"\n\n#include <algorithm>\n#include <atomic>\n\n'
                '#include "local/doorbell.h"\n'
            ),
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
                "  if (!messages.empty()) {\n    returned = true;\n  }\n"
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
            new=(
                "  bool has_tensors = false;\n"
                "  auto sets = state.process_set_table.Ids();\n"
                "  for (auto id : sets) {\n"
                "    has_tensors = has_tensors || "
                "state.process_set_table.Get(id).tensor_queue.HasTensors();\n"
                "  }\n"
                "  TensorQueue::WaitForTensor(sleep_duration, has_tensors, sets.size() > 1);\n"
            ),
        ),
    ),
    files=new_files("doorbell.h", "doorbell.cc", "futex.h"),
)
