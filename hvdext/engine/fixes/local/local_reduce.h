// Arithmetic of collectives over shared memory: one type, one operation, sources in the order of ranks.

#ifndef HVDEXT_LOCAL_REDUCE_H
#define HVDEXT_LOCAL_REDUCE_H

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <vector>

#include "local_half.h"

namespace hvdext {

// What numbers are reduced in: float16 in float32, rounded once.
template <typename T> struct Wide {
  using type = T;
};
template <> struct Wide<Half> {
  using type = float;
};

constexpr size_t kBlock = 1024; // numbers that are worked on while they are in the nearest cache

template <typename T> void Convert(const T* from, T* to, size_t count) { std::memcpy(to, from, count * sizeof(T)); }

enum class Reduction { Sum, Min, Max, Product };

struct Add {
  template <typename W> static W Of(W a, W b) { return static_cast<W>(a + b); }
};
struct Least {
  template <typename W> static W Of(W a, W b) { return b < a ? b : a; }
};
struct Greatest {
  template <typename W> static W Of(W a, W b) { return a < b ? b : a; }
};
struct Times {
  template <typename W> static W Of(W a, W b) { return static_cast<W>(a * b); }
};

template <typename W, typename S> void Scale(W* numbers, size_t count, S factor) {
  for (size_t i = 0; i < count; ++i) {
    numbers[i] = static_cast<W>(factor * numbers[i]);
  }
}

// As the engine scales: float32 and float16 by a float32, all others by a float64.
template <typename W> void ScaleIfAny(W* numbers, size_t count, double factor) {
  if (factor == 1.0) {
    return;
  }
  if (std::is_same<W, float>::value) {
    Scale(numbers, count, static_cast<float>(factor));
  } else {
    Scale(numbers, count, factor);
  }
}

// to = factor * from
template <typename T> void CopyScaled(const T* from, T* to, size_t count, double factor) {
  using W = typename Wide<T>::type;
  if (factor == 1.0) {
    std::memcpy(static_cast<void*>(to), from, count * sizeof(T));
    return;
  }
  W block[kBlock];
  for (size_t done = 0; done < count; done += kBlock) {
    size_t now = std::min(kBlock, count - done);
    Convert(from + done, block, now);
    ScaleIfAny(block, now, factor);
    Convert(block, to + done, now);
  }
}

// Numbers as they are reduced: where they lie, or else in `room`.
template <typename T, typename W> const W* Widen(const T* from, W* room, size_t count) {
  if constexpr (std::is_same<T, W>::value) {
    return from;
  } else {
    Convert(from, room, count);
    return room;
  }
}

// to = factor * (sources[0] op sources[1] op ...); `to` may be one of the sources.
template <typename T, typename Op>
void ReduceWith(const std::vector<const T*>& sources, T* to, size_t count, double factor) {
  using W = typename Wide<T>::type;
  constexpr bool kAsItIs = std::is_same<T, W>::value;
  W sum[kBlock];
  W next[kBlock];
  for (size_t done = 0; done < count; done += kBlock) {
    const size_t now = std::min(kBlock, count - done);
    W* result = sum;
    if constexpr (kAsItIs) {
      result = to + done;
    }
    const W* so_far = Widen(sources[0] + done, sum, now);
    for (size_t s = 1; s < sources.size(); ++s) {
      const W* term = Widen(sources[s] + done, next, now);
      W* into = s + 1 < sources.size() ? sum : result;
#pragma GCC ivdep
      for (size_t i = 0; i < now; ++i) {
        into[i] = Op::template Of<W>(so_far[i], term[i]);
      }
      so_far = into;
    }
    ScaleIfAny(result, now, factor);
    if constexpr (!kAsItIs) {
      Convert(sum, to + done, now);
    }
  }
}

template <typename T>
void Reduce(Reduction how, const std::vector<const T*>& sources, T* to, size_t count, double factor) {
  if (sources.size() == 1) {
    return CopyScaled(sources[0], to, count, factor);
  }
  switch (how) {
  case Reduction::Sum:
    return ReduceWith<T, Add>(sources, to, count, factor);
  case Reduction::Min:
    return ReduceWith<T, Least>(sources, to, count, factor);
  case Reduction::Max:
    return ReduceWith<T, Greatest>(sources, to, count, factor);
  case Reduction::Product:
    return ReduceWith<T, Times>(sources, to, count, factor);
  }
}

} // namespace hvdext

#endif // HVDEXT_LOCAL_REDUCE_H
