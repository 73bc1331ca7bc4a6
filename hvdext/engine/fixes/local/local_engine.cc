#include "local_engine.h"

#include <stdexcept>

#include "../ops/gloo_operations.h"
#include "local_collectives.h"
#include "local_hosts.h"
#include "pieces_tensor.h"

namespace horovod {
namespace common {

namespace {

// What Gloo does for the engine, over the memory of one host.
template <typename T> class LocalAlgorithms : public IGlooAlgorithms {
public:
  explicit LocalAlgorithms(hvdext::LocalTransport& memory) : memory_(memory) {}

  void Allreduce(void* data, int count, ReduceOp how) override {
    hvdext::Allreduce<T>(memory_, ReductionOf(how), {{data, data, count * sizeof(T)}}, 1.0, 1.0);
  }

  void Allgather(void* data, void* out, int* counts, int* starts) override {
    auto bytes = InBytes<T>(counts, memory_.size());
    auto offsets = InBytes<T>(starts, memory_.size());
    hvdext::Allgather(memory_, static_cast<uint8_t*>(data) + offsets[memory_.rank()], out, bytes, offsets);
  }

  void Broadcast(void* data, int count, int root) override {
    hvdext::Broadcast(memory_, data, count * sizeof(T), root);
  }

  void Alltoall(void* data, void* out, std::vector<int64_t>& sent, std::vector<int64_t>& received) override {
    hvdext::Alltoall(memory_, data, out, InBytes<T>(sent.data(), memory_.size()),
                     InBytes<T>(received.data(), memory_.size()));
  }

  void Reducescatter(void* data, std::vector<int>& counts) override {
    if constexpr (std::is_same<T, bool>::value) {
      throw std::logic_error("GlooReducescatter does not support bool data.");
    } else {
      hvdext::Reducescatter(memory_, static_cast<T*>(data), counts);
    }
  }

  int ElementSize() const override { return sizeof(T); }

private:
  hvdext::LocalTransport& memory_;
};

// visit(a null pointer of the type of numbers)
template <typename Visit> auto WithType(DataType dtype, Visit visit) {
  switch (dtype) {
  case HOROVOD_UINT8:
    return visit(static_cast<uint8_t*>(nullptr));
  case HOROVOD_INT8:
    return visit(static_cast<int8_t*>(nullptr));
  case HOROVOD_UINT16:
    return visit(static_cast<uint16_t*>(nullptr));
  case HOROVOD_INT16:
    return visit(static_cast<int16_t*>(nullptr));
  case HOROVOD_INT32:
    return visit(static_cast<int32_t*>(nullptr));
  case HOROVOD_INT64:
    return visit(static_cast<int64_t*>(nullptr));
  case HOROVOD_FLOAT16:
    return visit(static_cast<hvdext::Half*>(nullptr));
  case HOROVOD_FLOAT32:
    return visit(static_cast<float*>(nullptr));
  case HOROVOD_FLOAT64:
    return visit(static_cast<double*>(nullptr));
  case HOROVOD_BOOL:
    return visit(static_cast<bool*>(nullptr));
  default:
    throw std::logic_error("Type " + DataType_Name(dtype) + " is not supported in Gloo mode.");
  }
}

bool IsScaled(DataType dtype) {
  return dtype != HOROVOD_UINT16 && dtype != HOROVOD_INT16 && dtype != HOROVOD_BOOL;
}

} // namespace

IGlooAlgorithms* GetLocalAlgorithmsForType(DataType dtype, LocalGroup& group) {
  return WithType(dtype, [&](auto* null) -> IGlooAlgorithms* {
    using T = std::remove_pointer_t<decltype(null)>;
    if (group.IsOneHost()) {
      return new LocalAlgorithms<T>(group.memory());
    }
    return new HostsAlgorithms<T>(group, dtype);
  });
}

void AllreduceLocally(LocalGroup& group, std::vector<TensorTableEntry>& entries, ReduceOp how, double prescale,
                      double postscale) {
  DataType dtype = entries[0].tensor->dtype();
  if ((prescale != 1.0 || postscale != 1.0) && !IsScaled(dtype)) {
    throw std::logic_error("Type " + DataType_Name(dtype) + " not supported by ScaleBufferCPUImpl.");
  }
  const std::vector<hvdext::Piece> pieces = PiecesOf(entries);
  WithType(dtype, [&](auto* null) {
    using T = std::remove_pointer_t<decltype(null)>;
    if (group.IsOneHost()) {
      hvdext::Allreduce<T>(group.memory(), ReductionOf(how), pieces, prescale, postscale);
    } else {
      HostsAlgorithms<T>(group, dtype).AllreducePieces(pieces, how, prescale, postscale);
    }
  });
}

} // namespace common
} // namespace horovod
