#include "local_transport.h"

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <csignal>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <random>
#include <sstream>
#include <stdexcept>

#include <fcntl.h>
#include <poll.h>
#include <sched.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "futex.h"

namespace hvdext {

namespace {

using Clock = std::chrono::steady_clock;

constexpr size_t kControl = 4096;
constexpr size_t kSegment = kControl + 2 * LocalTransport::kSlot;
constexpr auto kSpin = std::chrono::microseconds(50);
constexpr auto kNap = std::chrono::milliseconds(100); // from one look at whether a peer lives to the next

// What ranks tell each other before they share memory.
struct Greeting {
  uint64_t wants;
  uint64_t version; // of what stands in a segment
  // Ranks share memory where these are equal.
  uint64_t boot;
  uint64_t pid_namespace;
  uint64_t user;
  uint64_t label;
  // How to find it, and what stands in it.
  int64_t pid;
  int64_t segment;
  cpu_set_t processors; // that the rank may run on
  uint64_t token;
};

constexpr uint64_t kVersion = 1;

uint64_t HashOf(const std::string& text) { return std::hash<std::string>{}(text); }

std::string FirstLine(const char* path) {
  std::ifstream file(path);
  std::string text;
  std::getline(file, text);
  return text;
}

// HVDEXT_LOCAL: "0" for no shared memory, else a name of what shares it.
std::string SettingOfUser() {
  const char* setting = std::getenv("HVDEXT_LOCAL");
  return setting == nullptr || *setting == 0 ? "1" : setting;
}

Greeting Greet(int segment, uint64_t token) {
  struct stat pid_namespace {};
  stat("/proc/self/ns/pid", &pid_namespace);
  cpu_set_t processors;
  CPU_ZERO(&processors);
  sched_getaffinity(0, sizeof(processors), &processors);
  return Greeting{SettingOfUser() != "0",
                  kVersion,
                  HashOf(FirstLine("/proc/sys/kernel/random/boot_id")),
                  static_cast<uint64_t>(pid_namespace.st_ino),
                  static_cast<uint64_t>(geteuid()),
                  HashOf(SettingOfUser()),
                  static_cast<int64_t>(getpid()),
                  segment,
                  processors,
                  token};
}

// Why two ranks do not share memory; nothing if they do.
std::string Apart(const Greeting& a, const Greeting& b) {
  if (a.boot != b.boot || a.boot == HashOf("")) { // nothing where the system does not tell
    return "every rank is on a host of its own";
  }
  if (a.pid_namespace != b.pid_namespace) {
    return "every rank is in a container of its own";
  }
  if (a.user != b.user) {
    return "every rank belongs to a user of its own";
  }
  return a.label == b.label ? "" : "every rank has a HVDEXT_LOCAL of its own";
}

// Why nobody shares memory; nothing if some do. The same on all ranks.
std::string WhyNot(const std::vector<Greeting>& all, std::vector<int>& host_of) {
  std::vector<Greeting> hosts;
  host_of.clear();
  for (const Greeting& each : all) {
    if (!each.wants) {
      return "HVDEXT_LOCAL=0";
    }
    if (each.version != all[0].version) {
      return "the engines differ";
    }
    if (each.segment < 0) {
      return "a rank got no memory to share";
    }
    auto host = std::find_if(hosts.begin(), hosts.end(), [&](const Greeting& h) { return Apart(h, each).empty(); });
    host_of.push_back(static_cast<int>(host - hosts.begin()));
    if (host == hosts.end()) {
      hosts.push_back(each);
    }
  }
  return hosts.size() < all.size() ? "" : Apart(all[0], all[1]);
}

std::string System(const char* call) { return std::string(call) + ": " + std::strerror(errno); }

void Pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#else
  std::atomic_signal_fence(std::memory_order_seq_cst);
#endif
}

const char* NameOf(uint32_t what) {
  static const char* const names[] = {"nothing",       "allreduce",  "allgather", "broadcast", "alltoall",
                                      "reducescatter", "ready bits", "message",   "barrier"};
  return what < sizeof(names) / sizeof(*names) ? names[what] : "?";
}

} // namespace

struct LocalTransport::Control {
  uint64_t token;
  alignas(64) std::atomic<uint32_t> posted; // the last round; peers sleep on it
  alignas(64) std::atomic<uint32_t> sleepers;
  std::atomic<uint32_t> closed;
  std::atomic<uint32_t> away;
  struct {
    uint32_t what;
    uint64_t bytes;
  } shown[2];
  Bell bell;
};

struct LocalTransport::Peer {
  uint8_t* memory = nullptr;
  int pid = 0;
  int pidfd = -1;

  Control& control() const { return *reinterpret_cast<Control*>(memory); }
  uint8_t* slot(uint32_t round) const { return memory + kControl + (round % 2) * kSlot; }

  bool has_ended() const {
    if (control().closed.load()) {
      return true;
    }
    if (pidfd < 0) { // an old kernel
      return (kill(pid, 0) != 0 && errno == ESRCH) || state() == 'Z';
    }
    struct pollfd look {pidfd, POLLIN, 0};
    return poll(&look, 1, 0) > 0;
  }

  // Waits for other hosts, and not because it was stopped itself.
  bool is_away() const { return control().away.load() && state() != 'T'; }

  // Of the process, as the system calls it: 'T' if it is stopped, 'Z' if it has ended and nobody has asked.
  char state() const {
    std::string line = FirstLine(("/proc/" + std::to_string(pid) + "/stat").c_str());
    size_t name = line.rfind(") ");
    return name == std::string::npos ? '?' : line[name + 2];
  }
};

std::unique_ptr<LocalTransport> LocalTransport::Connect(int rank, int size, const Setting& setting,
                                                        const Gather& gather, std::vector<int>& host_of,
                                                        std::string& why_not) {
  std::string problem;
  uint64_t token = 0;
  int segment = MakeSegment(token, problem);
  Greeting mine = Greet(segment, token);
  std::vector<Greeting> all(size);
  gather(&mine, all.data(), sizeof(Greeting));
  why_not = WhyNot(all, host_of);
  std::unique_ptr<LocalTransport> made;
  if (why_not.empty()) {
    std::vector<int> members;
    for (int i = 0; i < size; ++i) {
      if (host_of[i] == host_of[rank]) {
        members.push_back(i);
      }
    }
    int place = static_cast<int>(std::find(members.begin(), members.end(), rank) - members.begin());
    made.reset(new LocalTransport(place, std::move(members), setting));
    made->may_spin_ = made->HaveProcessors(setting.ranks_here, all.data());
    problem = made->MapPeers(segment, all.data());
  } else if (segment >= 0) {
    close(segment);
  }
  // All or none: nobody may wait in memory for a rank that waits elsewhere.
  uint8_t can = problem.empty();
  std::vector<uint8_t> everybody(size);
  gather(&can, everybody.data(), 1);
  if (why_not.empty() && std::count(everybody.begin(), everybody.end(), 0)) {
    why_not = problem.empty() ? "another rank cannot" : problem;
  }
  return why_not.empty() ? std::move(made) : nullptr;
}

LocalTransport::LocalTransport(int rank, std::vector<int> members, const Setting& setting)
    : rank_(rank), members_(std::move(members)), deadline_(setting.deadline), peers_(members_.size()) {}

LocalTransport::~LocalTransport() {
  if (getpid() != peers_[rank_].pid && peers_[rank_].pid != 0) {
    return; // a fork of this rank's process, which has no such memory
  }
  if (shares_bells_) {
    Doorbell::Unshare();
  }
  if (peers_[rank_].memory != nullptr) {
    Control& mine = peers_[rank_].control();
    mine.closed.store(1);
    WakeAll(mine.posted);
  }
  for (Peer& peer : peers_) {
    if (peer.memory != nullptr) {
      munmap(peer.memory, kSegment);
    }
    if (peer.pidfd >= 0) {
      close(peer.pidfd);
    }
  }
  if (segment_ >= 0) {
    close(segment_);
  }
}

// A file of this process alone, not of a folder: nothing to clean up, and no limit of /dev/shm. It begins with a
// random number, by which peers know that it is the one they have been told of.
int LocalTransport::MakeSegment(uint64_t& token, std::string& problem) {
  int segment = static_cast<int>(syscall(SYS_memfd_create, "hvdext", 1U /* close on exec */));
  if (segment < 0) {
    problem = System("memfd_create");
    return -1;
  }
  std::random_device random;
  token = (static_cast<uint64_t>(random()) << 32) + random();
  if (ftruncate(segment, kSegment) != 0 || pwrite(segment, &token, sizeof(token), 0) != sizeof(token)) {
    problem = System("making memory to share");
    close(segment);
    return -1;
  }
  return segment;
}

std::string LocalTransport::MapPeers(int segment, const void* greetings) {
  segment_ = segment;
  for (int i = 0; i < size(); ++i) {
    const Greeting& greeting = static_cast<const Greeting*>(greetings)[members_[i]];
    Peer& peer = peers_[i];
    peer.pid = static_cast<int>(greeting.pid);
    int file = segment_;
    if (i != rank_) {
      std::string path = "/proc/" + std::to_string(peer.pid) + "/fd/" + std::to_string(greeting.segment);
      file = open(path.c_str(), O_RDWR | O_CLOEXEC);
      if (file < 0) {
        return System("opening the memory of another rank");
      }
      uint64_t token = 0;
      if (pread(file, &token, sizeof(token), 0) != sizeof(token) || token != greeting.token) {
        close(file);
        return "process " + std::to_string(peer.pid) + " of this host is not the rank that has this number elsewhere";
      }
#ifdef SYS_pidfd_open
      peer.pidfd = static_cast<int>(syscall(SYS_pidfd_open, peer.pid, 0));
#endif
    }
    void* memory = mmap(nullptr, kSegment, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
    std::string problem = memory == MAP_FAILED ? System("mmap") : "";
    if (file != segment_) {
      close(file);
    }
    if (!problem.empty()) {
      return problem;
    }
    madvise(memory, kSegment, MADV_DONTFORK);
    peer.memory = static_cast<uint8_t*>(memory);
  }
  return "";
}

// Whether there are as many processors as ranks, all of them together: each may be bound to its own.
bool LocalTransport::HaveProcessors(int ranks_here, const void* greetings) const {
  cpu_set_t together;
  CPU_ZERO(&together);
  for (int member : members_) {
    CPU_OR(&together, &together, &static_cast<const Greeting*>(greetings)[member].processors);
  }
  return CPU_COUNT(&together) >= std::max(ranks_here, size());
}

void LocalTransport::ShareBells(bool are_all) {
  std::vector<Bell*> others;
  for (int i = 0; i < size(); ++i) {
    if (i != rank_) {
      others.push_back(&peers_[i].control().bell);
    }
  }
  Doorbell::Share(&peers_[rank_].control().bell, std::move(others), are_all);
  shares_bells_ = true;
}

uint8_t* LocalTransport::Mine() { return peers_[rank_].slot(round_ + 1); }

const uint8_t* LocalTransport::Of(int rank) const { return peers_[rank].slot(round_); }

uint64_t LocalTransport::BytesOf(int rank) const { return peers_[rank].control().shown[round_ % 2].bytes; }

void LocalTransport::Post(What what, uint64_t bytes, bool may_differ) {
  if (!failure_.empty()) {
    throw std::runtime_error(failure_);
  }
  ++round_;
  may_differ_ = may_differ;
  Control& mine = peers_[rank_].control();
  mine.shown[round_ % 2].what = static_cast<uint32_t>(what);
  mine.shown[round_ % 2].bytes = bytes;
  mine.posted.store(round_);
  if (mine.sleepers.load() > 0) {
    WakeAll(mine.posted);
  }
}

void LocalTransport::Wait() {
  for (int i = 0; i < size(); ++i) {
    if (i != rank_ && !HasPosted(i)) {
      Await(i);
    }
  }
  Compare();
}

bool LocalTransport::HasPosted(int rank) const {
  uint32_t posted = peers_[rank].control().posted.load(std::memory_order_acquire);
  return static_cast<int32_t>(posted - round_) >= 0; // numbers of rounds start again after 2^32
}

void LocalTransport::Await(int rank) {
  if (may_spin_) {
    auto end = Clock::now() + kSpin;
    do {
      for (int i = 0; i < 32; ++i) {
        if (HasPosted(rank)) {
          return;
        }
        Pause();
      }
    } while (Clock::now() < end);
  }
  Doorbell::HeldUp held_up;
  auto end = Clock::now() + deadline_;
  for (bool first = true; !HasPosted(rank); first = false) {
    if (!first && peers_[rank].has_ended() && !HasPosted(rank)) {
      FailForLackOf(rank, "has ended");
    }
    if (Clock::now() > end) {
      if (!peers_[rank].is_away()) {
        FailForLackOf(rank, "has not come");
      }
      end = Clock::now() + deadline_;
    }
    Sleep(rank);
  }
}

LocalTransport::Away::Away(LocalTransport& transport) : transport_(transport) {
  transport_.peers_[transport_.rank_].control().away.store(1);
}

LocalTransport::Away::~Away() { transport_.peers_[transport_.rank_].control().away.store(0); }

void LocalTransport::Sleep(int rank) {
  Control& peer = peers_[rank].control();
  peer.sleepers.fetch_add(1);
  uint32_t seen = peer.posted.load();
  if (static_cast<int32_t>(seen - round_) < 0 && !peer.closed.load()) {
    SleepOn(peer.posted, seen, kNap);
  }
  peer.sleepers.fetch_sub(1);
}

void LocalTransport::Compare() {
  const auto& mine = peers_[rank_].control().shown[round_ % 2];
  for (int i = 0; i < size(); ++i) {
    const auto& other = peers_[i].control().shown[round_ % 2];
    if (other.what != mine.what || (other.bytes != mine.bytes && !may_differ_)) {
      std::ostringstream text;
      text << "Ranks of one host are in different collectives: rank " << members_[rank_] << " in " << NameOf(mine.what)
           << " of " << mine.bytes << " bytes, rank " << members_[i] << " in " << NameOf(other.what) << " of " << other.bytes << " bytes.";
      Fail(text.str());
    }
  }
}

void LocalTransport::Fail(const std::string& text) {
  failure_ = text;
  throw std::runtime_error(text);
}

void LocalTransport::FailForLackOf(int rank, const char* reason) {
  std::ostringstream text;
  text << "Rank " << members_[rank] << " (process " << peers_[rank].pid << " of this host) " << reason << ": rank "
       << members_[rank_] << " waited for it in " << NameOf(peers_[rank_].control().shown[round_ % 2].what) << ", at most "
       << deadline_.count() << " ms. Missing:";
  for (int i = 0; i < size(); ++i) {
    if (!HasPosted(i)) {
      text << ' ' << members_[i];
    }
  }
  Fail(text.str());
}

std::vector<std::vector<uint8_t>> LocalTransport::Exchange(What what, const void* mine, size_t bytes) {
  std::vector<std::vector<uint8_t>> all(size());
  size_t left = bytes;
  for (bool more = true; more;) {
    size_t now = std::min(left, kSlot);
    if (now > 0) {
      std::memcpy(Mine(), static_cast<const uint8_t*>(mine) + (bytes - left), now);
    }
    Post(what, left, true);
    left -= now;
    Wait();
    more = false;
    for (int i = 0; i < size(); ++i) {
      size_t theirs = std::min<size_t>(BytesOf(i), kSlot);
      all[i].insert(all[i].end(), Of(i), Of(i) + theirs);
      more = more || BytesOf(i) > kSlot;
    }
  }
  return all;
}

} // namespace hvdext
