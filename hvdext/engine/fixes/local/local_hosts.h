// The engine's collectives for ranks of several hosts: through memory within each, through Gloo between leaders.

#ifndef HVDEXT_LOCAL_HOSTS_H
#define HVDEXT_LOCAL_HOSTS_H

#include <cstring>
#include <memory>
#include <vector>

#include "../ops/gloo_operations.h"
#include "local_collectives.h"
#include "local_group.h"

namespace horovod {
namespace common {

IGlooAlgorithms* GetAlgorithmsForType(DataType dtype, GlooContext* gloo_context);

inline hvdext::Reduction ReductionOf(ReduceOp how) {
  switch (how) {
  case ReduceOp::MIN:
    return hvdext::Reduction::Min;
  case ReduceOp::MAX:
    return hvdext::Reduction::Max;
  case ReduceOp::PRODUCT:
    return hvdext::Reduction::Product;
  default:
    return hvdext::Reduction::Sum;
  }
}

template <typename T, typename N> std::vector<size_t> InBytes(const N* counts, int size) {
  std::vector<size_t> bytes;
  for (int i = 0; i < size; ++i) {
    bytes.push_back(counts[i] * sizeof(T));
  }
  return bytes;
}

template <typename T> class HostsAlgorithms : public IGlooAlgorithms {
public:
  HostsAlgorithms(LocalGroup& group, DataType dtype)
      : group_(group), memory_(group.memory()), flat_(GetAlgorithmsForType(dtype, &group.everybody())) {
    if (group.leaders() != nullptr) {
      leaders_.reset(GetAlgorithmsForType(dtype, group.leaders()));
    }
  }

  void Allreduce(void* data, int count, ReduceOp how) override {
    AllreducePieces({{data, data, count * sizeof(T)}}, how, 1.0, 1.0);
  }

  // Each host's sum to its leader, the sum of all among leaders, and that to the others: bits are alike on all ranks.
  void AllreducePieces(const std::vector<hvdext::Piece>& pieces, ReduceOp how, double prescale, double postscale) {
    const size_t count = leaders_ != nullptr ? hvdext::BytesOf(pieces) / sizeof(T) : 0;
    std::unique_ptr<T[]> row(new T[count]);
    hvdext::ReduceToFirst(memory_, ReductionOf(how), pieces, prescale, row.get());
    if (leaders_ != nullptr) {
      hvdext::LocalTransport::Away away(memory_);
      leaders_->Allreduce(row.get(), static_cast<int>(count), how);
    }
    hvdext::SpreadFromFirst(memory_, row.get(), pieces, postscale);
  }

  void Allgather(void* data, void* out, int* counts, int* starts) override {
    // Ranks in the order of hosts, so that each host's bytes are one part of `row`.
    std::vector<int> of_host(group_.hosts(), 0), start_of_host(group_.hosts(), 0), start_of_rank(group_.size());
    for (int rank = 0; rank < group_.size(); ++rank) {
      start_of_rank[rank] = of_host[group_.HostOf(rank)];
      of_host[group_.HostOf(rank)] += counts[rank];
    }
    for (int host = 1; host < group_.hosts(); ++host) {
      start_of_host[host] = start_of_host[host - 1] + of_host[host - 1];
    }
    const size_t total = static_cast<size_t>(start_of_host.back()) + of_host.back();
    std::vector<size_t> bytes, offsets; // of this host's ranks
    for (int rank = 0; rank < group_.size(); ++rank) {
      start_of_rank[rank] += start_of_host[group_.HostOf(rank)];
      if (group_.HostOf(rank) == group_.host()) {
        bytes.push_back(counts[rank] * sizeof(T));
        offsets.push_back(start_of_rank[rank] * sizeof(T));
      }
    }
    std::unique_ptr<T[]> row(new T[total]);
    hvdext::Allgather(memory_, static_cast<T*>(data) + starts[group_.rank()], row.get(), bytes, offsets);
    if (leaders_ != nullptr) {
      hvdext::LocalTransport::Away away(memory_);
      leaders_->Allgather(row.get(), row.get(), of_host.data(), start_of_host.data());
    }
    hvdext::Broadcast(memory_, row.get(), total * sizeof(T), 0);
    for (int rank = 0; rank < group_.size(); ++rank) {
      std::memcpy(static_cast<T*>(out) + starts[rank], row.get() + start_of_rank[rank], counts[rank] * sizeof(T));
    }
  }

  void Broadcast(void* data, int count, int root) override {
    const bool is_of_root = group_.host() == group_.HostOf(root);
    if (is_of_root) {
      hvdext::Broadcast(memory_, data, count * sizeof(T), group_.PlaceOf(root));
    }
    if (leaders_ != nullptr) {
      hvdext::LocalTransport::Away away(memory_);
      leaders_->Broadcast(data, count, group_.HostOf(root));
    }
    if (!is_of_root) {
      hvdext::Broadcast(memory_, data, count * sizeof(T), 0);
    }
  }

  // Every rank's part is another: leaders would only carry what ranks can send themselves.
  void Alltoall(void* data, void* out, std::vector<int64_t>& sent, std::vector<int64_t>& received) override {
    flat_->Alltoall(data, out, sent, received);
  }

  void Reducescatter(void* data, std::vector<int>& counts) override { flat_->Reducescatter(data, counts); }

  int ElementSize() const override { return sizeof(T); }

private:
  LocalGroup& group_;
  hvdext::LocalTransport& memory_;
  std::unique_ptr<IGlooAlgorithms> flat_;
  std::unique_ptr<IGlooAlgorithms> leaders_;
};

} // namespace common
} // namespace horovod

#endif // HVDEXT_LOCAL_HOSTS_H
