// The engine's collectives for ranks that share memory, on one host or within each of several.

#ifndef HVDEXT_LOCAL_ENGINE_H
#define HVDEXT_LOCAL_ENGINE_H

#include <vector>

#include "../common.h"
#include "../message.h"
#include "local_group.h"

namespace horovod {
namespace common {

class IGlooAlgorithms;

IGlooAlgorithms* GetLocalAlgorithmsForType(DataType dtype, LocalGroup& group);

// From the tensors to memory and back, without the fusion buffer.
void AllreduceLocally(LocalGroup& group, std::vector<TensorTableEntry>& entries, ReduceOp how, double prescale,
                      double postscale);

} // namespace common
} // namespace horovod

#endif // HVDEXT_LOCAL_ENGINE_H
