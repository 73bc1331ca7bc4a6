"""Ranks of one host exchange through memory that they share, not through Gloo's sockets.

The C++ is beside this file, in `local`. What is edited is where the engine calls Gloo: for a group of ranks
that share memory it takes the other way, with the same names, types, orders and errors. Groups of several
hosts share memory within each, and one rank of each host speaks with the others through Gloo.
"""

from __future__ import annotations

from hvdext.engine.fixes.edits import Edit, Fix
from hvdext.engine.fixes.sources import new_files

_CONTEXT_HEADER = "horovod/common/gloo/gloo_context.h"
_CONTEXT = "horovod/common/gloo/gloo_context.cc"
_CONTROLLER = "horovod/common/gloo/gloo_controller.cc"
_OPERATIONS = "horovod/common/ops/gloo_operations.cc"


_ONE_HOST = "gloo_context_.local != nullptr && gloo_context_.local->IsOneHost()"


def _branch(signature: str, body: str, where: str = _ONE_HOST) -> Edit:
    """In a function of the controller: another way where ranks share memory.

    Args:
        signature: from the function's name to its opening brace.
        body: what is done there, with `group` the ranks and `local` the memory of this host.
        where: by default where all ranks are on this host.
    """
    begin = f"  if ({where}) {{\n    auto& group = *gloo_context_.local;\n"
    if "local" in body:
        begin += "    auto& local = group.memory();\n"
    lines = "".join(f"    {line}\n" for line in body.strip().splitlines())
    return Edit(file=_CONTROLLER, old=signature, new=f"{signature}{begin}{lines}  }}\n")


_BUILD = (
    Edit(
        file="CMakeLists.txt",
        old='    list(APPEND SOURCES "${PROJECT_SOURCE_DIR}/horovod/common/gloo/gloo_context.cc"\n',
        new=(
            '    list(APPEND SOURCES "${PROJECT_SOURCE_DIR}/horovod/common/local/local_engine.cc"\n'
            '                        "${PROJECT_SOURCE_DIR}/horovod/common/local/local_group.cc"\n'
            '                        "${PROJECT_SOURCE_DIR}/horovod/common/local/local_transport.cc"\n'
            '                        "${PROJECT_SOURCE_DIR}/horovod/common/gloo/gloo_context.cc"\n'
        ),
    ),
)

_GROUPS = (
    Edit(
        file=_CONTEXT_HEADER,
        old='#include "../logging.h"\n',
        new='#include "../local/local_group.h"\n#include "../logging.h"\n',
    ),
    Edit(
        file=_CONTEXT_HEADER,
        old="  std::shared_ptr<gloo::Context> ctx = nullptr;  // entire process set\n",
        new=(
            "  std::shared_ptr<gloo::Context> ctx = nullptr;  // entire process set\n"
            "  std::shared_ptr<LocalGroup> local; // of ctx, where its ranks share memory\n"
        ),
    ),
    Edit(
        file=_CONTEXT,
        old='#include "../utils/env_parser.h"\n',
        new='#include "../local/local_group.h"\n#include "../utils/env_parser.h"\n',
    ),
    Edit(
        file=_CONTEXT,
        old='  LOG(DEBUG) << "Global Gloo context initialized.";\n',
        new=(
            '  LOG(DEBUG) << "Global Gloo context initialized.";\n'
            "  local = LocalGroup::Meet(ctx, local_size, true, [&](int leader, int leaders) {\n"
            '    return Rendezvous("leaders", rendezvous_addr_env, rendezvous_port, leader, '
            "leaders, dev, timeout_);\n"
            "  });\n"
        ),
    ),
    Edit(
        file=_CONTEXT,
        old=(
            '  LOG(DEBUG) << "Global Gloo context initialized for process set with hash "\n'
            '             << process_set_hash << ".";\n'
        ),
        new=(
            '  LOG(DEBUG) << "Global Gloo context initialized for process set with hash "\n'
            '             << process_set_hash << ".";\n'
            "  int ranks_here = GetIntEnvOrDefault(HOROVOD_LOCAL_SIZE, 1);\n"
            "  local = LocalGroup::Meet(ctx, ranks_here, false, [&](int leader, int leaders) {\n"
            '    return Rendezvous("leaders" + process_set_suffix, rendezvous_addr_env, rendezvous_port,\n'
            "                      leader, leaders, dev, timeout_);\n"
            "  });\n"
        ),
    ),
    Edit(
        file=_CONTEXT,
        old="void GlooContext::Finalize() {\n",
        new=(
            "void GlooContext::Finalize() {\n"
            "  local.reset(); // that of a process set, too, which is not enabled as the global one is\n"
        ),
    ),
)

_DATA = (
    Edit(
        file=_OPERATIONS,
        old='#include "../global_state.h"\n',
        new='#include "../global_state.h"\n#include "../local/local_engine.h"\n',
    ),
    Edit(
        file=_OPERATIONS,
        old=(
            "IGlooAlgorithms* GetAlgorithmsForType(DataType dtype,\n"
            "                                      GlooContext* gloo_context) {\n"
        ),
        new=(
            "IGlooAlgorithms* GetAlgorithmsForType(DataType dtype,\n"
            "                                      GlooContext* gloo_context) {\n"
            "  if (gloo_context->local != nullptr) {\n"
            "    return GetLocalAlgorithmsForType(dtype, *gloo_context->local);\n"
            "  }\n"
        ),
    ),
    Edit(
        file=_OPERATIONS,
        old=(
            "  const void* fused_input_data;\n  void* buffer_data;\n"
            "  int num_elements = (int)NumElements(entries);\n"
        ),
        new=(
            "  if (gloo_context.local != nullptr) {\n"
            '    global_state_->timeline.ActivityStartAll(entries, "LOCAL_ALLREDUCE");\n'
            "    AllreduceLocally(*gloo_context.local, entries, glooOp, prescale_factor, postscale_factor);\n"
            "    global_state_->timeline.ActivityEndAll(entries);\n"
            "    return Status::OK();\n"
            "  }\n\n"
            "  const void* fused_input_data;\n  void* buffer_data;\n"
            "  int num_elements = (int)NumElements(entries);\n"
        ),
    ),
)

_NEGOTIATION = (
    Edit(
        file=_CONTROLLER,
        old='#include "gloo_context.h"\n#include "../logging.h"\n',
        new='#include "gloo_context.h"\n#include "../local/local_collectives.h"\n#include "../logging.h"\n',
    ),
    _branch(
        "void GlooController::CrossRankBitwiseAnd(std::vector<long long>& bitvector,\n"
        "                                         int count) {\n",
        "group.CombineBits(bitvector.data(), count, true);\nreturn;",
        where="gloo_context_.local != nullptr",
    ),
    _branch(
        "void GlooController::CrossRankBitwiseOr(std::vector<long long>& bitvector,\n"
        "                                        int count) {\n",
        "group.CombineBits(bitvector.data(), count, false);\nreturn;",
        where="gloo_context_.local != nullptr",
    ),
    _branch(
        "void GlooController::RecvReadyTensors(std::vector<std::string>& ready_to_reduce,\n"
        "                                      std::vector<RequestList>& ready_list) {\n",
        """
auto messages = local.Exchange(hvdext::What::Message, nullptr, 0);
ready_list.emplace_back(); // rank 0 has counted its own
for (int i = 1; i < size_; ++i) {
  RequestList received_message_list;
  RequestList::ParseFromBytes(received_message_list, messages[i].data());
  ready_list.push_back(std::move(received_message_list));
}
return;
""",
    ),
    _branch(
        "  // Notify all nodes which tensors we'd like to reduce at this step.\n"
        "  std::string encoded_response;\n"
        "  ResponseList::SerializeToString(response_list, encoded_response);\n",
        """
local.Exchange(hvdext::What::Message, encoded_response.c_str(), encoded_response.length() + 1);
return;
""",
    ),
    _branch(
        "  std::string encoded_message;\n  RequestList::SerializeToString(message_list, encoded_message);\n",
        """
local.Exchange(hvdext::What::Message, encoded_message.c_str(), encoded_message.length() + 1);
return;
""",
    ),
    _branch(
        "void GlooController::RecvFinalTensors(ResponseList& response_list) {\n",
        """
auto messages = local.Exchange(hvdext::What::Message, nullptr, 0);
ResponseList::ParseFromBytes(response_list, messages[RANK_ZERO].data());
return;
""",
    ),
    _branch(
        "void GlooController::AlltoallGetRecvSplits(const std::vector<int32_t>& splits,\n"
        "                                           std::vector<int32_t>& recvsplits) {\n"
        "  recvsplits.resize(size_);\n",
        """
auto all = local.Exchange(hvdext::What::Message, splits.data(), splits.size() * sizeof(int32_t));
for (int i = 0; i < size_; ++i) {
  std::memcpy(&recvsplits[i], all[i].data() + rank_ * sizeof(int32_t), sizeof(int32_t));
}
return;
""",
    ),
    _branch(
        "                                    std::vector<int>& recv_values) {\n"
        "  recv_values.resize(size_ * 2);\n",
        """
auto all = local.Exchange(hvdext::What::Message, values.data(), 2 * sizeof(int));
for (int i = 0; i < size_; ++i) {
  std::memcpy(&recv_values[2 * i], all[i].data(), 2 * sizeof(int));
}
return;
""",
    ),
    _branch(
        "void GlooController::Bcast(void* buffer, size_t size, int root_rank,\n"
        "                           Communicator communicator) {\n",
        "hvdext::Broadcast(local, buffer, size, root_rank);\nreturn;",
        where=f"communicator == Communicator::GLOBAL && {_ONE_HOST}",
    ),
    _branch(
        "void GlooController::Barrier(Communicator communicator) {\n",
        "local.Exchange(hvdext::What::Barrier, nullptr, 0);\nreturn;",
        where=f"communicator == Communicator::GLOBAL && {_ONE_HOST}",
    ),
)

LOCAL_TRANSPORT = Fix(
    name="local-transport",
    controllers=("gloo",),
    why=(
        "Between ranks of one host a message costs two wake-ups of threads at either end and passes the "
        "kernel's network twice, whatever its size. Through memory that the ranks share it costs one wait."
    ),
    edits=(*_BUILD, *_GROUPS, *_DATA, *_NEGOTIATION),
    files=new_files(
        "local_collectives.h",
        "local_engine.cc",
        "local_engine.h",
        "local_group.cc",
        "local_group.h",
        "local_half.h",
        "local_hosts.h",
        "local_reduce.h",
        "local_transport.cc",
        "local_transport.h",
    ),
)
