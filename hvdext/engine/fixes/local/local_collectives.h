// Collectives over a LocalTransport, in bytes where numbers are only moved.

#ifndef HVDEXT_LOCAL_COLLECTIVES_H
#define HVDEXT_LOCAL_COLLECTIVES_H

#include <algorithm>
#include <cstring>
#include <vector>

#include "local_reduce.h"
#include "local_transport.h"

namespace hvdext {

// One tensor of several that travel together.
struct Piece {
  const void* in;
  void* out;
  size_t bytes;
};

// The parts of `pieces` that lie in [begin, end) of all bytes: visit(piece, offset in it, offset from begin, bytes).
template <typename Visit> void InRange(const std::vector<Piece>& pieces, size_t begin, size_t end, Visit visit) {
  size_t start = 0;
  for (const Piece& piece : pieces) {
    size_t from = std::max(start, begin);
    size_t to = std::min(start + piece.bytes, end);
    if (from < to) {
      visit(piece, from - start, from - begin, to - from);
    }
    start += piece.bytes;
    if (start >= end) {
      return;
    }
  }
}

inline size_t BytesOf(const std::vector<Piece>& pieces) {
  size_t total = 0;
  for (const Piece& piece : pieces) {
    total += piece.bytes;
  }
  return total;
}

constexpr size_t kReduced = LocalTransport::kSlot / 2; // bytes reduced at once

// From here on three or more ranks reduce a share each, in a round of its own, before they take the results.
constexpr size_t kShared = 64 << 10;

// The part that each rank reduces: first(rank) to first(rank + 1).
struct Shares {
  size_t count;
  size_t each;
  Shares(size_t count, int ranks) : count(count), each((count + ranks - 1) / ranks) {}
  size_t first(int rank) const { return std::min(count, each * rank); }
};

// What the ranks show, from `offset` on.
template <typename T> std::vector<const T*> Shown(const LocalTransport& transport, size_t offset) {
  std::vector<const T*> sources(transport.size());
  for (int i = 0; i < transport.size(); ++i) {
    sources[i] = reinterpret_cast<const T*>(transport.Of(i) + offset);
  }
  return sources;
}

template <typename T>
void Show(LocalTransport& transport, const std::vector<Piece>& pieces, size_t begin, size_t end, double prescale) {
  uint8_t* slot = transport.Mine();
  InRange(pieces, begin, end, [&](const Piece& piece, size_t at, size_t offset, size_t bytes) {
    CopyScaled(reinterpret_cast<const T*>(static_cast<const uint8_t*>(piece.in) + at),
               reinterpret_cast<T*>(slot + offset), bytes / sizeof(T), prescale);
  });
  transport.Post(What::Allreduce, BytesOf(pieces));
  transport.Wait();
}

// After Show: reduces this rank's share of `bytes` and shows it instead.
template <typename T>
void ShowShare(LocalTransport& transport, Reduction how, const Shares& shares, double postscale, size_t total) {
  size_t first = shares.first(transport.rank());
  Reduce(how, Shown<T>(transport, first * sizeof(T)), reinterpret_cast<T*>(transport.Mine()),
         shares.first(transport.rank() + 1) - first, postscale);
  transport.Post(What::Allreduce, total);
  transport.Wait();
}

// out = postscale * (prescale * in of rank 0 op prescale * in of rank 1 op ...), bit for bit the same on all ranks.
//
// Small messages take one round, in which each rank reduces everything; larger ones of three or more ranks two, in
// the first of which each reduces its share.
template <typename T>
void Allreduce(LocalTransport& transport, Reduction how, const std::vector<Piece>& pieces, double prescale,
               double postscale) {
  const size_t total = BytesOf(pieces);
  for (size_t begin = 0; begin < total; begin += kReduced) {
    size_t end = std::min(begin + kReduced, total);
    Show<T>(transport, pieces, begin, end, prescale);
    if (transport.size() < 3 || end - begin < kShared) {
      InRange(pieces, begin, end, [&](const Piece& piece, size_t at, size_t offset, size_t bytes) {
        Reduce(how, Shown<T>(transport, offset), reinterpret_cast<T*>(static_cast<uint8_t*>(piece.out) + at),
               bytes / sizeof(T), postscale);
      });
      continue;
    }
    const Shares shares((end - begin) / sizeof(T), transport.size());
    ShowShare<T>(transport, how, shares, postscale, total);
    for (int i = 0; i < transport.size(); ++i) {
      InRange(pieces, begin + shares.first(i) * sizeof(T), begin + shares.first(i + 1) * sizeof(T),
              [&](const Piece& piece, size_t at, size_t offset, size_t bytes) {
                std::memcpy(static_cast<uint8_t*>(piece.out) + at, transport.Of(i) + offset, bytes);
              });
    }
  }
}

// out, on rank 0 alone, = prescale * in of rank 0 op prescale * in of rank 1 op ..., all pieces in a row.
template <typename T>
void ReduceToFirst(LocalTransport& transport, Reduction how, const std::vector<Piece>& pieces, double prescale,
                   T* out) {
  const size_t total = BytesOf(pieces);
  for (size_t begin = 0; begin < total; begin += kReduced) {
    const size_t count = (std::min(begin + kReduced, total) - begin) / sizeof(T);
    T* to = out + begin / sizeof(T);
    Show<T>(transport, pieces, begin, begin + count * sizeof(T), prescale);
    if (transport.size() < 3 || count * sizeof(T) < kShared) {
      if (transport.rank() == 0) {
        Reduce(how, Shown<T>(transport, 0), to, count, 1.0);
      }
      continue;
    }
    const Shares shares(count, transport.size());
    ShowShare<T>(transport, how, shares, 1.0, total);
    for (int i = 0; i < transport.size() && transport.rank() == 0; ++i) {
      const T* share = reinterpret_cast<const T*>(transport.Of(i));
      std::copy(share, share + shares.first(i + 1) - shares.first(i), to + shares.first(i));
    }
  }
}

// The other way round: what rank 0 has in a row goes, times `scale`, into the pieces of all.
template <typename T>
void SpreadFromFirst(LocalTransport& transport, const T* row, const std::vector<Piece>& pieces, double scale) {
  const size_t total = BytesOf(pieces);
  for (size_t begin = 0; begin < total; begin += kReduced) {
    const size_t end = std::min(begin + kReduced, total);
    if (transport.rank() == 0) {
      CopyScaled(row + begin / sizeof(T), reinterpret_cast<T*>(transport.Mine()), (end - begin) / sizeof(T), scale);
    }
    transport.Post(What::Broadcast, total);
    transport.Wait();
    InRange(pieces, begin, end, [&](const Piece& piece, size_t at, size_t offset, size_t bytes) {
      std::memcpy(static_cast<uint8_t*>(piece.out) + at, transport.Of(0) + offset, bytes);
    });
  }
}

// Every rank's bytes to all: out + starts[i] gets bytes[i] of rank i, which this rank has at `in`.
inline void Allgather(LocalTransport& transport, const void* in, void* out, const std::vector<size_t>& bytes,
                      const std::vector<size_t>& starts) {
  constexpr size_t kSlot = LocalTransport::kSlot;
  const int me = transport.rank();
  size_t longest = *std::max_element(bytes.begin(), bytes.end());
  size_t total = 0;
  for (size_t each : bytes) {
    total += each;
  }
  auto part = [&](int rank, size_t begin) { return std::min(kSlot, bytes[rank] - std::min(begin, bytes[rank])); };
  for (size_t begin = 0; begin < longest; begin += kSlot) {
    std::memcpy(transport.Mine(), static_cast<const uint8_t*>(in) + std::min(begin, bytes[me]), part(me, begin));
    transport.Post(What::Allgather, total);
    transport.Wait();
    for (int i = 0; i < transport.size(); ++i) {
      if (part(i, begin) > 0) {
        std::memcpy(static_cast<uint8_t*>(out) + starts[i] + begin, transport.Of(i), part(i, begin));
      }
    }
  }
}

inline void Broadcast(LocalTransport& transport, void* data, size_t bytes, int root) {
  constexpr size_t kSlot = LocalTransport::kSlot;
  for (size_t begin = 0; begin < bytes; begin += kSlot) {
    auto* here = static_cast<uint8_t*>(data) + begin;
    size_t now = std::min(kSlot, bytes - begin);
    if (transport.rank() == root) {
      std::memcpy(transport.Mine(), here, now);
    }
    transport.Post(What::Broadcast, bytes);
    transport.Wait();
    if (transport.rank() != root) {
      std::memcpy(here, transport.Of(root), now);
    }
  }
}

// Part i of `in`, `sent[i]` bytes, goes to rank i; part i of `out`, `received[i]` bytes, comes from it.
inline void Alltoall(LocalTransport& transport, const void* in, void* out, const std::vector<size_t>& sent,
                     const std::vector<size_t>& received) {
  const int me = transport.rank(), size = transport.size();
  const size_t room = LocalTransport::kSlot / size;
  // How long it takes depends on the longest part of all, which nobody knows yet.
  size_t longest = *std::max_element(sent.begin(), sent.end());
  transport.Post(What::Alltoall, longest, true);
  transport.Wait();
  for (int i = 0; i < size; ++i) {
    longest = std::max<size_t>(longest, transport.BytesOf(i));
  }
  auto part = [&](size_t whole, size_t begin) { return std::min(room, whole - std::min(begin, whole)); };
  for (size_t begin = 0; begin < longest; begin += room) {
    const auto* from = static_cast<const uint8_t*>(in);
    for (int i = 0; i < size; ++i) {
      std::memcpy(transport.Mine() + i * room, from + std::min(begin, sent[i]), part(sent[i], begin));
      from += sent[i];
    }
    transport.Post(What::Alltoall, longest);
    transport.Wait();
    auto* to = static_cast<uint8_t*>(out);
    for (int i = 0; i < size; ++i) {
      std::memcpy(to + std::min(begin, received[i]), transport.Of(i) + me * room, part(received[i], begin));
      to += received[i];
    }
  }
}

// Part i of the sum of all ranks' `data`, `counts[i]` numbers, is left at the beginning of rank i's.
template <typename T> void Reducescatter(LocalTransport& transport, T* data, const std::vector<int>& counts) {
  const int me = transport.rank(), size = transport.size();
  const size_t room = LocalTransport::kSlot / sizeof(T) / size / 16 * 16;
  std::vector<size_t> starts(size + 1, 0);
  for (int i = 0; i < size; ++i) {
    starts[i + 1] = starts[i] + counts[i];
  }
  size_t longest = *std::max_element(counts.begin(), counts.end());
  auto part = [&](int rank, size_t begin) {
    size_t whole = counts[rank];
    return std::min(room, whole - std::min(begin, whole));
  };
  std::vector<const T*> sources(size);
  std::vector<T> result(counts[me]); // what others' parts of `data` are is still to be sent
  for (size_t begin = 0; begin < longest; begin += room) {
    T* slot = reinterpret_cast<T*>(transport.Mine());
    for (int i = 0; i < size; ++i) {
      std::memcpy(slot + i * room, data + starts[i] + std::min<size_t>(begin, counts[i]), part(i, begin) * sizeof(T));
    }
    transport.Post(What::Reducescatter, starts[size] * sizeof(T));
    transport.Wait();
    for (int i = 0; i < size; ++i) {
      sources[i] = reinterpret_cast<const T*>(transport.Of(i)) + me * room;
    }
    if (part(me, begin) > 0) {
      Reduce(Reduction::Sum, sources, result.data() + begin, part(me, begin), 1.0);
    }
  }
  std::copy(result.begin(), result.end(), data);
}

// word[i] = word[i] of rank 0 `op` word[i] of rank 1 ...
template <typename Op> void CombineBits(LocalTransport& transport, long long* words, size_t count, Op op) {
  constexpr size_t kRoom = LocalTransport::kSlot / sizeof(long long);
  for (size_t begin = 0; begin < count; begin += kRoom) {
    size_t now = std::min(kRoom, count - begin);
    std::memcpy(transport.Mine(), words + begin, now * sizeof(long long));
    transport.Post(What::ReadyBits, count * sizeof(long long));
    transport.Wait();
    for (int i = 0; i < transport.size(); ++i) {
      const auto* theirs = reinterpret_cast<const long long*>(transport.Of(i));
      for (size_t k = 0; k < now && i != transport.rank(); ++k) {
        words[begin + k] = op(words[begin + k], theirs[k]);
      }
    }
  }
}

} // namespace hvdext

#endif // HVDEXT_LOCAL_COLLECTIVES_H
