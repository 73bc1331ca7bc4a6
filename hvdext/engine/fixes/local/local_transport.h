// Ranks of one host exchange bytes through memory that they share.
//
// Each rank owns a segment: a page for control and two slots. A collective is made of rounds. In a round a rank
// writes into its slot, posts, waits until all have posted, and reads the slots of the others. Slots are used in
// turn: who has posted round k+1 has read what it wanted of round k, so that a slot is written again only when
// nobody reads it any more, and one wait per round is enough.
//
// A transport belongs to one thread at a time. Ranks must go through the same rounds; what they are in and how
// much they bring stands beside the data, so that ranks in different collectives get an error.

#ifndef HVDEXT_LOCAL_TRANSPORT_H
#define HVDEXT_LOCAL_TRANSPORT_H

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "doorbell.h"

namespace hvdext {

enum class What : uint32_t {
  Allreduce = 1,
  Allgather,
  Broadcast,
  Alltoall,
  Reducescatter,
  ReadyBits,
  Message,
  Barrier,
};

class LocalTransport {
public:
  // Bytes of a slot: what a rank can show to the others at once.
  static constexpr size_t kSlot = size_t{1} << 20;

  // Gathers `bytes` of every rank in the order of ranks; how ranks meet before they share memory.
  using Gather = std::function<void(const void* mine, void* all, size_t bytes)>;

  struct Setting {
    std::chrono::milliseconds deadline; // of a wait
    int ranks_here;                     // at least so many share the processors
  };

  // Connects `rank` of `size` ranks with those of its host. Returns nothing on all ranks, and `why_not`, if any of
  // them cannot or should not, or no two share a host.
  //
  // host_of: gets the host of every rank, counted from 0 in the order of their first ranks.
  static std::unique_ptr<LocalTransport> Connect(int rank, int size, const Setting& setting, const Gather& gather,
                                                 std::vector<int>& host_of, std::string& why_not);

  ~LocalTransport();
  LocalTransport(const LocalTransport&) = delete;
  LocalTransport& operator=(const LocalTransport&) = delete;

  // Among those of this host.
  int rank() const { return rank_; }
  int size() const { return static_cast<int>(members_.size()); }

  // Whether a rank that waits does so for a moment without giving its processor away: each has one of its own.
  bool may_spin() const { return may_spin_; }

  // From now on a tensor that comes to one rank wakes the others' threads that wait for it.
  //
  // are_all: whether no ranks are on other hosts.
  void ShareBells(bool are_all);

  // Where this rank writes in this round.
  uint8_t* Mine();

  // Shows what has been written. `bytes` must be equal on all ranks unless `may_differ`.
  void Post(What what, uint64_t bytes, bool may_differ = false);

  // Returns when all ranks have posted. Throws std::runtime_error if one has ended, does not come before the
  // deadline or is in another collective.
  void Wait();

  // What a rank has written and posted, until this rank posts again.
  const uint8_t* Of(int rank) const;
  uint64_t BytesOf(int rank) const;

  // While this rank speaks with other hosts, which may take longer than the deadline, and has a deadline of its own.
  class Away {
  public:
    explicit Away(LocalTransport& transport);
    ~Away();
    Away(const Away&) = delete;
    Away& operator=(const Away&) = delete;

  private:
    LocalTransport& transport_;
  };

  // Every rank's bytes, of any length.
  std::vector<std::vector<uint8_t>> Exchange(What what, const void* mine, size_t bytes);

private:
  struct Control;
  struct Peer;

  LocalTransport(int rank, std::vector<int> members, const Setting& setting);
  static int MakeSegment(uint64_t& token, std::string& problem);
  std::string MapPeers(int segment, const void* greetings);
  bool HaveProcessors(int ranks_here, const void* greetings) const;
  bool HasPosted(int rank) const;
  void Await(int rank);
  void Sleep(int rank);
  void Compare();
  [[noreturn]] void Fail(const std::string& text);
  [[noreturn]] void FailForLackOf(int rank, const char* reason);

  int rank_;
  std::vector<int> members_; // what the ranks of this host are called in the whole group
  bool may_spin_ = false;
  std::chrono::milliseconds deadline_;
  int segment_ = -1;
  uint32_t round_ = 0;
  bool may_differ_ = false;
  std::string failure_;
  bool shares_bells_ = false;
  std::vector<Peer> peers_;
};

} // namespace hvdext

#endif // HVDEXT_LOCAL_TRANSPORT_H
