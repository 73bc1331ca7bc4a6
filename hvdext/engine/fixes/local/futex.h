// Sleeping on a word that processes share.

#ifndef HVDEXT_FUTEX_H
#define HVDEXT_FUTEX_H

#include <atomic>
#include <chrono>
#include <climits>
#include <cstdint>
#include <ctime>

#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>

namespace hvdext {

// Returns when somebody wakes, at once if the word is not `seen`, at the latest after `limit`; or for no reason.
inline void SleepOn(const std::atomic<uint32_t>& word, uint32_t seen, std::chrono::nanoseconds limit) {
  struct timespec time {};
  time.tv_sec = limit.count() / 1000000000;
  time.tv_nsec = limit.count() % 1000000000;
  // Without FUTEX_PRIVATE_FLAG: other processes wake, too.
  syscall(SYS_futex, &word, FUTEX_WAIT, seen, &time, nullptr, 0);
}

inline void WakeAll(const std::atomic<uint32_t>& word) {
  syscall(SYS_futex, &word, FUTEX_WAKE, INT_MAX, nullptr, nullptr, 0);
}

} // namespace hvdext

#endif // HVDEXT_FUTEX_H
