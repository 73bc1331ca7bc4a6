// Where the engine's thread sleeps while there is nothing to do, and what wakes it.
//
// A rank that has nothing sleeps until it gets something: the others wait for it. One that has something need not ask
// again and again whether the others have it, too, where all share memory: the one that comes wakes those that wait.

#ifndef HVDEXT_DOORBELL_H
#define HVDEXT_DOORBELL_H

#include <atomic>
#include <chrono>
#include <cstdint>
#include <vector>

namespace hvdext {

// One rank's, in memory that its peers may share.
struct Bell {
  alignas(64) std::atomic<uint32_t> rung;     // the thread sleeps on it
  alignas(64) std::atomic<uint32_t> arrivals; // of tensors at other ranks
  std::atomic<uint32_t> sleep;                // 0: awake; 1: until a tensor comes; 2: or one comes elsewhere
};

class Doorbell {
public:
  // From now on the bell of this rank is `mine`, and those of its peers are `peers`; the thread that sleeps calls it.
  //
  // are_all: whether there are no other ranks.
  static void Share(Bell* mine, std::vector<Bell*> peers, bool are_all);
  static void Unshare();

  // A tensor has come: wakes this rank's thread, those of peers that expect one elsewhere, and, if this rank's is
  // held up by one that sleeps, all. Any thread may call it.
  static void Ring();

  // While it lives, this rank's thread is held up by peers.
  class HeldUp {
  public:
    HeldUp();
    ~HeldUp();
  };

  // Returns when a tensor has come since the last call, at the latest after `limit`.
  //
  // expects: whether a tensor that comes to another rank counts: this rank has some that others lack, or others
  // exchange some without it.
  static void Wait(std::chrono::nanoseconds limit, bool expects);

  // Whether every rank's tensors ring here.
  static bool ReachesAll();
};

} // namespace hvdext

#endif // HVDEXT_DOORBELL_H
