#include "doorbell.h"

#include <mutex>

#include "futex.h"

namespace hvdext {

namespace {

Bell alone; // before anybody shares memory, and after
Bell* mine = &alone;
std::vector<Bell*> others;
std::mutex sharing; // of the two above, which only the thread that sleeps changes
std::atomic<bool> held_up{false};
bool reaches_all = false; // of the thread that sleeps
uint32_t rung_seen = 0;
uint32_t arrivals_seen = 0;

void Wake(Bell& bell) {
  bell.rung.fetch_add(1);
  if (bell.sleep.load() != 0) {
    WakeAll(bell.rung);
  }
}

void See() {
  rung_seen = mine->rung.load();
  arrivals_seen = mine->arrivals.load();
}

} // namespace

void Doorbell::Share(Bell* own, std::vector<Bell*> peers, bool are_all) {
  std::lock_guard<std::mutex> guard(sharing);
  mine = own;
  reaches_all = are_all;
  others = std::move(peers);
  See();
  mine->rung.fetch_add(1); // what has come to the bell before
}

void Doorbell::Unshare() { Share(&alone, {}, false); }

bool Doorbell::ReachesAll() { return reaches_all; }

void Doorbell::Ring() {
  std::lock_guard<std::mutex> guard(sharing);
  Wake(*mine);
  for (Bell* bell : others) {
    bell->arrivals.fetch_add(1);
    uint32_t sleep = bell->sleep.load();
    if (sleep == 2 || (sleep == 1 && held_up.load())) {
      Wake(*bell);
    }
  }
}

Doorbell::HeldUp::HeldUp() { held_up.store(true); }

Doorbell::HeldUp::~HeldUp() { held_up.store(false); }

void Doorbell::Wait(std::chrono::nanoseconds limit, bool expects) {
  // In this order: who has rung before this rank is said to sleep has changed what is looked at after.
  mine->sleep.store(expects ? 2 : 1);
  bool is_news = mine->rung.load() != rung_seen || (expects && mine->arrivals.load() != arrivals_seen);
  if (!is_news && limit.count() > 0) {
    SleepOn(mine->rung, rung_seen, limit);
  }
  mine->sleep.store(0);
  See();
}

} // namespace hvdext
