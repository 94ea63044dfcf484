/*
 * Numbers in memory: float16 is converted, all else is there as it is.
 */
#pragma once

#include <algorithm>
#include <cstdint>

#ifdef __x86_64__
#include <immintrin.h>
#endif

#include "exp_log.h"

namespace {

struct Half {
  uint16_t bits;
};
template <typename T> inline T value(T x) { return x; }
inline float value(Half half) {  // 2^112 moves the exponent, and makes denormals normal
  const uint32_t rest = half.bits & 0x7fff, sign = uint32_t(half.bits & 0x8000) << 16;
  const float x = bits<float>(rest << 13) * 0x1p112f;
  return bits<float>((rest >= 0x7c00 ? (rest << 13) | 0x7f800000 : bits<uint32_t>(x)) | sign);
}
template <typename T> inline void put(T x, T* to) { *to = x; }
inline void put(float x, Half* to) {  // to nearest, ties to even
  const uint32_t b = bits<uint32_t>(x), sign = b >> 16 & 0x8000, size = b & 0x7fffffff;
  uint32_t half;
  if (size > 0x7f800000) half = 0x7e00;        // NaN
  else if (size >= 0x477ff000) half = 0x7c00;  // from 65520 on, infinite
  else if (size < 0x38800000) half = bits<uint32_t>(std::fabs(x) + .5f) - 0x3f000000;  // in units of 2^-24
  else half = (size - 0x38000000 + 0xfff + (size >> 13 & 1)) >> 13;
  to->bits = half | sign;
}

#ifdef __x86_64__
const bool kF16C = __builtin_cpu_supports("avx") && __builtin_cpu_supports("f16c");
__attribute__((target("avx,f16c"))) int load_8(const Half* x, int n, float* to) {
  int i = 0;
  for (; i + 8 <= n; i += 8)
    _mm256_storeu_ps(to + i, _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)(x + i))));
  return i;
}
__attribute__((target("avx,f16c"))) int store_8(const float* x, int n, Half* to) {
  int i = 0;
  for (; i + 8 <= n; i += 8) _mm_storeu_si128((__m128i*)(to + i), _mm256_cvtps_ph(_mm256_loadu_ps(x + i), 0));
  return i;
}
#else
const bool kF16C = false;
int load_8(const Half*, int, float*) { return 0; }
int store_8(const float*, int, Half*) { return 0; }
#endif

// n numbers as T: in place, or in `buffer`
template <typename T> const T* load(const T* x, int, T*) { return x; }
const float* load(const Half* x, int n, float* buffer) {
  for (int i = kF16C ? load_8(x, n, buffer) : 0; i < n; i++) buffer[i] = value(x[i]);
  return buffer;
}
// where to compute what goes to `to`, and to bring it there
template <typename T> T* target(T* to, T*) { return to; }
float* target(Half*, float* buffer) { return buffer; }
template <typename T> void store(const T* x, int n, T* to) {
  if (x != to) std::copy_n(x, n, to);
}
void store(const float* x, int n, Half* to) {
  for (int i = kF16C ? store_8(x, n, to) : 0; i < n; i++) put(x[i], to + i);
}

}  // namespace
