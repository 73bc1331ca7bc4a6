"""What is wrong in Horovod's source, or does not compile."""

from __future__ import annotations

from hvdext.engine.fixes.edits import Edit, Fix

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

SETS_OF_SURVIVORS = Fix(
    name="sets-of-survivors",
    why=(
        "When the engine ends, its ranks agree on the removal of every process set. If one of them is gone, "
        "that throws, where nobody catches it: the survivors of a job with process sets abort, instead of "
        "telling of the lost rank."
    ),
    edits=(
        Edit(
            file="horovod/common/process_set.cc",
            old=(
                "    MarkProcessSetForRemoval(id);\n"
                "    // Block until all processes have been able to finalize and deregister\n"
                "    // this process set.\n"
                "    while (true) {\n"
                "      InitializeRegisteredAndRemoveMarkedIfReady_(context, status);\n"
            ),
            new=(
                "    MarkProcessSetForRemoval(id);\n"
                "    // Block until all processes have been able to finalize and deregister\n"
                "    // this process set.\n"
                "    while (true) {\n"
                "      try {\n"
                "        InitializeRegisteredAndRemoveMarkedIfReady_(context, status);\n"
                "      } catch (const std::exception&) { // a rank is gone: each of the others by itself\n"
                "        id_to_process_set_[id].Finalize(status);\n"
                "        DeregisterProcessSet(id);\n"
                "        id_to_be_removed_ = NO_PENDING_REMOVAL;\n"
                "        break;\n"
                "      }\n"
            ),
        ),
    ),
)

LINK_OF_SETS = Fix(
    name="link-of-process-sets",
    why=(
        "Every process set, that of all ranks too, connects its ranks anew, but is not told which network "
        "device the user named (HOROVOD_GLOO_IFACE, horovodrun's --network-interface): it takes the one of "
        "the host's own name, which is 127.0.0.1 on many. Ranks on several hosts then cannot start."
    ),
    edits=(
        Edit(
            file="horovod/common/gloo/gloo_context.cc",
            old="  assert(global_context.IsEnabled());\n",
            new=("  assert(global_context.IsEnabled());\n  gloo_iface_ = global_context.gloo_iface_;\n"),
        ),
    ),
)
