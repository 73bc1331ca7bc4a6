// float16 as its bits.

#ifndef HVDEXT_LOCAL_HALF_H
#define HVDEXT_LOCAL_HALF_H

#include <cstddef>
#include <cstdint>
#include <cstring>

#if __AVX__ && __F16C__
#include <immintrin.h>
#endif

namespace hvdext {

struct Half {
  uint16_t bits;
};

inline float FloatOfBits(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

inline uint32_t BitsOfFloat(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  return bits;
}

inline float Widened(Half half) {
  uint32_t sign = (half.bits & 0x8000u) << 16;
  uint32_t magnitude = half.bits & 0x7fffu;
  if (magnitude >= 0x7c00u) { // infinite or no number
    return FloatOfBits(sign | 0x7f800000u | (magnitude & 0x3ffu) << 13);
  }
  // As if the exponent counted from float32's base; what is too small for an exponent, too.
  return FloatOfBits(sign | BitsOfFloat(FloatOfBits(magnitude << 13) * 0x1p112f));
}

// To the nearest, of two to the even one.
inline Half Narrowed(float value) {
  uint32_t bits = BitsOfFloat(value);
  auto sign = static_cast<uint16_t>(bits >> 16 & 0x8000u);
  uint32_t magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) {
    return {static_cast<uint16_t>(sign | 0x7e00u)};
  }
  if (magnitude >= 0x477ff000u) { // rounds to more than the largest, 65504
    return {static_cast<uint16_t>(sign | 0x7c00u)};
  }
  if (magnitude < 0x38800000u) { // under the smallest with an exponent: float32 rounds to multiples of 2^-24
    uint32_t steps = BitsOfFloat(FloatOfBits(magnitude) + 0.5f) - BitsOfFloat(0.5f);
    return {static_cast<uint16_t>(sign | steps)};
  }
  uint32_t rounded = magnitude - (112u << 23) + 0xfffu + (magnitude >> 13 & 1u);
  return {static_cast<uint16_t>(sign | rounded >> 13)};
}

inline bool HasHalfInstructions() {
#if __AVX__ && __F16C__
  static const bool has = __builtin_cpu_supports("avx") && __builtin_cpu_supports("f16c");
  return has;
#else
  return false;
#endif
}

inline void Convert(const Half* from, float* to, size_t count) {
  size_t i = 0;
#if __AVX__ && __F16C__
  for (; HasHalfInstructions() && i + 8 <= count; i += 8) {
    _mm256_storeu_ps(to + i, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i))));
  }
#endif
  for (; i < count; ++i) {
    to[i] = Widened(from[i]);
  }
}

inline void Convert(const float* from, Half* to, size_t count) {
  size_t i = 0;
#if __AVX__ && __F16C__
  for (; HasHalfInstructions() && i + 8 <= count; i += 8) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to + i), _mm256_cvtps_ph(_mm256_loadu_ps(from + i), 0));
  }
#endif
  for (; i < count; ++i) {
    to[i] = Narrowed(from[i]);
  }
}

} // namespace hvdext

#endif // HVDEXT_LOCAL_HALF_H
