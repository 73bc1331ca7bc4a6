// Ranks as processes that share memory without the rest of the engine: what test_local_transport.py starts.
//
//   local_ranks collectives RANKS         every collective against what one process computes
//   local_ranks killed RANKS TRIALS       the last rank is killed at a random moment of endless collectives
//   local_ranks frozen|gone|elsewhere RANKS   the last rank stops, leaves in order, or is in another collective
//   local_ranks away RANKS                the last rank comes after the deadline, but says that it is away
//   local_ranks stranger RANKS            the process that has the last rank's number here is not that rank
//   local_ranks bound RANKS CORES         rank i runs on the core that is the digit i of CORES
//   local_ranks hosts RANKS NAMES         rank i shares memory with those of the same letter in NAMES
//
// Each rank prints a line; what is wrong makes the exit status 1.

#include <atomic>
#include <cmath>
#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <new>
#include <random>
#include <stdexcept>
#include <string>

#include <sched.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#include "local_collectives.h"

using namespace hvdext;

namespace {

constexpr auto kDeadline = std::chrono::milliseconds(1500);

// How processes of one parent meet: memory from before the fork.
struct Table {
  std::atomic<int> come[2];
  uint8_t bytes[2][64][512];
};

int size;
int rank_ = 0;
bool has_stranger = false;
bool failed = false;
std::vector<int> host_of;

void Expect(bool holds, const char* what, size_t count) {
  if (!holds) {
    std::printf("rank %d: %s of %zu is wrong\n", rank_, what, count);
    failed = true;
  }
}

std::unique_ptr<LocalTransport> Meet(Table& table) {
  int call = 0;
  auto gather = [&](const void* mine, void* all, size_t bytes) {
    std::memcpy(table.bytes[call][rank_], mine, bytes);
    if (has_stranger && call == 0 && rank_ == size - 1) {
      table.bytes[call][rank_][bytes - 1] ^= 1; // of the token, which stands at the end
    }
    ++table.come[call];
    while (table.come[call] < size) {
      usleep(50);
    }
    for (int i = 0; i < size; ++i) {
      std::memcpy(static_cast<uint8_t*>(all) + i * bytes, table.bytes[call][i], bytes);
    }
    ++call;
  };
  std::string why_not;
  LocalTransport::Setting setting{kDeadline, size};
  auto transport = LocalTransport::Connect(rank_, size, setting, gather, host_of, why_not);
  if (transport == nullptr) {
    std::printf("rank %d: off: %s\n", rank_, why_not.c_str());
    std::exit(2);
  }
  return transport;
}

std::vector<std::vector<float>> Brought(size_t count) {
  std::mt19937 generator(static_cast<unsigned>(count));
  std::normal_distribution<float> normal;
  std::vector<std::vector<float>> all(size, std::vector<float>(count));
  for (auto& numbers : all) {
    for (float& number : numbers) {
      number = normal(generator);
    }
  }
  return all;
}

template <typename T> void CheckAllreduce(LocalTransport& transport, const std::vector<std::vector<float>>& floats) {
  const size_t count = floats[0].size();
  std::vector<std::vector<T>> all;
  for (const auto& numbers : floats) {
    std::vector<T> converted(count);
    if constexpr (std::is_same<T, Half>::value) {
      Convert(numbers.data(), converted.data(), count);
    } else {
      std::transform(numbers.begin(), numbers.end(), converted.begin(), [](float n) { return static_cast<T>(n * 8); });
    }
    all.push_back(converted);
  }
  std::vector<Piece> pieces;
  std::vector<T> out(count);
  const size_t third = count / 3;
  pieces.push_back({all[rank_].data(), out.data(), third * sizeof(T)});
  pieces.push_back({all[rank_].data() + third, out.data() + third, (count - third) * sizeof(T)});
  for (Reduction how : {Reduction::Sum, Reduction::Min, Reduction::Max, Reduction::Product}) {
    Allreduce<T>(transport, how, pieces, 1.0, 1.0);
    for (size_t i = 0; i < count; ++i) {
      auto wide = [&](int r) {
        if constexpr (std::is_same<T, Half>::value) {
          return Widened(all[r][i]);
        } else {
          return all[r][i];
        }
      };
      auto want = wide(0);
      for (int r = 1; r < size; ++r) {
        auto next = wide(r);
        want = how == Reduction::Sum   ? want + next
               : how == Reduction::Min ? std::min(want, next)
               : how == Reduction::Max ? std::max(want, next)
                                       : want * next;
      }
      bool equal;
      if constexpr (std::is_same<T, Half>::value) {
        equal = out[i].bits == Narrowed(want).bits;
      } else {
        equal = out[i] == static_cast<T>(want);
      }
      if (!equal) {
        Expect(false, "allreduce", count);
        break;
      }
    }
  }
}

void CheckScaled(LocalTransport& transport, const std::vector<std::vector<float>>& all) {
  std::vector<float> out(all[0].size());
  Allreduce<float>(transport, Reduction::Sum, {{all[rank_].data(), out.data(), out.size() * 4}}, 0.5, 3.0);
  for (size_t i = 0; i < out.size(); ++i) {
    float want = 0.5F * all[0][i];
    for (int r = 1; r < size; ++r) {
      want += 0.5F * all[r][i];
    }
    if (out[i] != want * 3.0F) {
      Expect(false, "scaled allreduce", out.size());
      return;
    }
  }
}

void CheckByTheFirst(LocalTransport& transport, const std::vector<std::vector<float>>& all) {
  const size_t count = all[0].size(), third = count / 3 * 4;
  std::vector<float> row(rank_ == 0 ? count : 0), out(count);
  auto* in = reinterpret_cast<const uint8_t*>(all[rank_].data());
  auto* to = reinterpret_cast<uint8_t*>(out.data());
  std::vector<Piece> pieces{{in, to, third}, {in + third, to + third, count * 4 - third}};
  ReduceToFirst(transport, Reduction::Sum, pieces, 0.5, row.data());
  SpreadFromFirst(transport, row.data(), pieces, 3.0);
  for (size_t i = 0; i < count; ++i) {
    float want = 0.5F * all[0][i];
    for (int r = 1; r < size; ++r) {
      want += 0.5F * all[r][i];
    }
    if (out[i] != want * 3.0F) {
      Expect(false, "sum by the first rank", count);
      return;
    }
  }
}

void CheckMoves(LocalTransport& transport, const std::vector<std::vector<float>>& all) {
  const size_t count = all[0].size();
  std::vector<size_t> bytes, starts;
  size_t total = 0;
  for (int r = 0; r < size; ++r) {
    starts.push_back(total);
    bytes.push_back(r == 1 ? 0 : count / (r + 1) * sizeof(float)); // one rank has nothing
    total += bytes.back();
  }
  std::vector<uint8_t> out(total);
  Allgather(transport, all[rank_].data(), out.data(), bytes, starts);
  for (int r = 0; r < size; ++r) {
    Expect(std::memcmp(out.data() + starts[r], all[r].data(), bytes[r]) == 0, "allgather", count);
  }
  std::vector<float> copy = all[rank_];
  Broadcast(transport, copy.data(), count * sizeof(float), size - 1);
  Expect(copy == all[size - 1], "broadcast", count);
  auto messages = transport.Exchange(What::Message, all[rank_].data(), bytes[rank_]);
  for (int r = 0; r < size; ++r) {
    bool equal = messages[r].size() == bytes[r] && std::memcmp(messages[r].data(), all[r].data(), bytes[r]) == 0;
    Expect(equal, "exchange", count);
  }
}

void CheckAlltoall(LocalTransport& transport, const std::vector<std::vector<float>>& all) {
  const size_t count = all[0].size();
  auto part = [&](int of, int to) { return count / (1 + of + 2 * to) / size * sizeof(float); };
  std::vector<size_t> sent, received;
  size_t total = 0;
  for (int r = 0; r < size; ++r) {
    sent.push_back(part(rank_, r));
    received.push_back(part(r, rank_));
    total += received.back();
  }
  std::vector<uint8_t> out(total);
  Alltoall(transport, all[rank_].data(), out.data(), sent, received);
  size_t at = 0;
  for (int r = 0; r < size; ++r) {
    size_t start = 0;
    for (int to = 0; to < rank_; ++to) {
      start += part(r, to);
    }
    const auto* theirs = reinterpret_cast<const uint8_t*>(all[r].data()) + start;
    Expect(std::memcmp(out.data() + at, theirs, received[r]) == 0, "alltoall", count);
    at += received[r];
  }
}

void CheckReducescatter(LocalTransport& transport, const std::vector<std::vector<float>>& all) {
  const auto count = static_cast<int>(all[0].size());
  std::vector<int> counts(size, count / (size + 1));
  counts[size - 1] = count - (size - 1) * (count / (size + 1));
  std::vector<float> numbers = all[rank_];
  Reducescatter(transport, numbers.data(), counts);
  const int start = rank_ * counts[0];
  for (int i = 0; i < counts[rank_]; ++i) {
    float want = all[0][start + i];
    for (int r = 1; r < size; ++r) {
      want += all[r][start + i];
    }
    if (numbers[i] != want) {
      Expect(false, "reducescatter", count);
      return;
    }
  }
}

void CheckBits(LocalTransport& transport) {
  std::vector<long long> words(200000, ~0LL);
  words[rank_] = 6;
  words[199999] = 8 + (1LL << rank_ << 40);
  CombineBits(transport, words.data(), words.size(), [](long long a, long long b) { return a & b; });
  Expect(words[0] == 6 && words[199999] == 8 && words[100] == ~0LL, "bits", words.size());
}

void Collectives(LocalTransport& transport) {
  for (size_t count : {0, 1, 10, 1000, 100003, 1500001}) {
    auto all = Brought(count);
    CheckAllreduce<float>(transport, all);
    CheckAllreduce<double>(transport, all);
    CheckAllreduce<int64_t>(transport, all);
    CheckAllreduce<int8_t>(transport, all);
    CheckAllreduce<Half>(transport, all);
    CheckScaled(transport, all);
    CheckByTheFirst(transport, all);
    CheckMoves(transport, all);
    CheckAlltoall(transport, all);
    CheckReducescatter(transport, all);
  }
  CheckBits(transport);
  std::printf("rank %d: %s\n", rank_, failed ? "wrong" : "equal");
}

// The others must hear of a rank that is killed: an error within the deadline, and never a wrong sum before.
void UntilItEnds(LocalTransport& transport) {
  std::vector<float> in(300000, 1.0F), out(in.size());
  auto start = std::chrono::steady_clock::now();
  try {
    for (long i = 0;; ++i) {
      Allreduce<float>(transport, Reduction::Sum, {{in.data(), out.data(), in.size() * 4}}, 1.0, 1.0);
      Expect(out.front() == size && out.back() == size, "sum", in.size());
      start = std::chrono::steady_clock::now();
    }
  } catch (const std::runtime_error& error) {
    auto waited = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
    std::printf("rank %d: after %.2f s: %s\n", rank_, waited, error.what());
    failed = failed || waited > 1.0;
  }
}

void InBarrier(LocalTransport& transport) {
  try {
    transport.Exchange(What::Barrier, nullptr, 0);
    std::printf("rank %d: no error\n", rank_);
  } catch (const std::runtime_error& error) {
    std::printf("rank %d: %s\n", rank_, error.what());
  }
}

// What ranks of one name have in common, and nobody else.
void Together(LocalTransport& transport) {
  std::vector<int> mine(100, rank_), out(mine.size());
  Allreduce<int>(transport, Reduction::Sum, {{mine.data(), out.data(), mine.size() * 4}}, 1.0, 1.0);
  std::printf("rank %d: host %d, place %d of %d, sum %d\n", rank_, host_of[rank_], transport.rank(), transport.size(),
              out.back());
}

void Run(const std::string& what, Table& table) {
  std::unique_ptr<LocalTransport> transport = Meet(table);
  const bool is_last = rank_ == size - 1;
  if (what == "hosts") {
    Together(*transport);
  } else if (what == "bound") {
    std::printf("rank %d: %s\n", rank_, transport->may_spin() ? "spins" : "sleeps");
  } else if (what == "collectives") {
    Collectives(*transport);
  } else if (what == "killed") {
    UntilItEnds(*transport);
  } else if (what == "frozen" && is_last) {
    usleep(2 * std::chrono::microseconds(kDeadline).count());
  } else if (what == "away" && is_last) {
    {
      LocalTransport::Away away(*transport);
      usleep(2 * std::chrono::microseconds(kDeadline).count());
    }
    InBarrier(*transport);
  } else if (what == "gone" && is_last) {
    transport.reset();
    usleep(300000);
  } else if (what == "elsewhere" && is_last) {
    std::vector<uint8_t> data(5);
    try {
      Broadcast(*transport, data.data(), data.size(), 0);
    } catch (const std::runtime_error& error) {
      std::printf("rank %d: %s\n", rank_, error.what());
    }
  } else {
    InBarrier(*transport);
  }
}

// Starts the ranks; returns whether all but the one that is killed have ended well.
bool Launch(const std::string& what, const char* names, std::mt19937& random) {
  void* shared = mmap(nullptr, sizeof(Table), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
  auto* table = new (shared) Table{};
  std::vector<pid_t> ranks;
  std::fflush(stdout);
  for (int i = 0; i < size; ++i) {
    pid_t child = fork();
    if (child == 0) {
      rank_ = i;
      if (what == "hosts") {
        setenv("HVDEXT_LOCAL", std::string(1, names[i]).c_str(), 1);
      } else if (what == "bound") {
        cpu_set_t core;
        CPU_ZERO(&core);
        CPU_SET(names[i] - '0', &core);
        sched_setaffinity(0, sizeof(core), &core);
      }
      Run(what, *table);
      std::fflush(stdout);
      _exit(failed);
    }
    ranks.push_back(child);
  }
  if (what == "killed") {
    while (table->come[1] < size) {
      usleep(100);
    }
    usleep(random() % 20000);
    kill(ranks.back(), SIGKILL);
  }
  bool good = true;
  for (pid_t each : ranks) {
    int status;
    waitpid(each, &status, 0);
    good = good && (status == 0 || (what == "killed" && each == ranks.back()));
  }
  munmap(shared, sizeof(Table));
  return good;
}

} // namespace

int main(int, char** arguments) {
  std::string what = arguments[1];
  size = std::atoi(arguments[2]);
  has_stranger = what == "stranger";
  int trials = what == "killed" ? std::atoi(arguments[3]) : 1;
  std::mt19937 random(std::random_device{}());
  for (int i = 0; i < trials; ++i) {
    if (!Launch(what, arguments[3], random)) {
      return 1;
    }
  }
  return 0;
}
