// The ranks of a Gloo context by hosts: ranks of one host share memory, and the first rank of each, its leader,
// speaks with the leaders of the others through Gloo.

#ifndef HVDEXT_LOCAL_GROUP_H
#define HVDEXT_LOCAL_GROUP_H

#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "gloo/context.h"

#include "local_transport.h"

namespace horovod {
namespace common {

struct GlooContext;

class LocalGroup {
public:
  // Connects a leader, the how-manieth of how many, with the others.
  using ConnectLeaders = std::function<std::shared_ptr<gloo::Context>(int rank, int size)>;

  // Nothing, on all ranks, where no two of the context share memory or one does not want to.
  //
  // ranks_here: how many ranks share the processors, as the launcher knows it.
  // is_global: whether `horovod_local_transport` tells about this one.
  static std::shared_ptr<LocalGroup> Meet(const std::shared_ptr<gloo::Context>& context, int ranks_here,
                                          bool is_global, const ConnectLeaders& connect_leaders);

  hvdext::LocalTransport& memory() { return *memory_; }

  bool IsOneHost() const { return hosts_ == 1; }
  int hosts() const { return hosts_; }
  int HostOf(int rank) const { return host_of_[rank]; }
  // The place of a rank among those of its host.
  int PlaceOf(int rank) const { return place_of_[rank]; }
  int size() const { return static_cast<int>(host_of_.size()); }
  int rank() const { return rank_; }
  int host() const { return host_of_[rank_]; }

  // On leaders of several hosts: what they speak through. Elsewhere nothing.
  GlooContext* leaders() const { return leaders_.get(); }

  // All ranks through Gloo, whatever they share.
  GlooContext& everybody() const { return *everybody_; }

  // words[i] of rank 0 and (or) words[i] of rank 1 ...
  void CombineBits(long long* words, int count, bool both);

private:
  LocalGroup(int rank, std::vector<int> host_of, std::unique_ptr<hvdext::LocalTransport> memory);

  int rank_;
  std::vector<int> host_of_;
  std::vector<int> place_of_;
  int hosts_;
  std::unique_ptr<hvdext::LocalTransport> memory_;
  std::unique_ptr<GlooContext> leaders_;
  std::unique_ptr<GlooContext> everybody_;
};

} // namespace common
} // namespace horovod

#endif // HVDEXT_LOCAL_GROUP_H
