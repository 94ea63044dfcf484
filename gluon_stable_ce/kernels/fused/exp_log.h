/*
 * Exponentials and logarithms without a call or a branch, so that loops over them become vector code.
 *
 * T is float or double. What there is once per logit is computed in T, and what there is once per position in
 * double: there T is what will become of the result, and says how many terms of a series are needed.
 */
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#define INLINE inline __attribute__((always_inline)) static

namespace {

const double kLn2 = 0.693147180559945309417, kLog2E = 1.442695040888963407360;

template <typename T> struct Format;
template <> struct Format<float> {
  typedef int32_t Int;
  static const int exp_degree = 8, atanh_degree = 8;  // of series in double
  static const int mantissa = 23, bias = 127;
  static const int far = 4096;  // from here on, n log(2) is rounded too much
};
template <> struct Format<double> {
  typedef int64_t Int;
  static const int exp_degree = 13, atanh_degree = 16;
  static const int mantissa = 52, bias = 1023;
  static const int far = 16;
};
template <typename T> using Int = typename Format<T>::Int;

template <typename To, typename From> INLINE To bits(From from) {
  To to;
  memcpy(&to, &from, sizeof(to));
  return to;
}

// x + magic has round(x) in its last bits
template <typename T> INLINE T magic(T) { return T(1.5) * T(int64_t(1) << Format<T>::mantissa); }
template <typename T> INLINE Int<T> last_bits(T sum) { return bits<Int<T>>(sum) - bits<Int<T>>(magic(sum)); }
// n as T: AVX2 has no such conversion of int64. Valid range: |n| < 2^22 (float), 2^51 (double).
template <typename T> INLINE T number(Int<T> n) { return bits<T>(n + bits<Int<T>>(magic(T()))) - magic(T()); }

// 2^n. Valid range: [-bias, bias], where 2^-bias is 0.
template <typename T> INLINE T power_of_2(Int<T> n) {
  return bits<T>((n + Format<T>::bias) << Format<T>::mantissa);
}

// exp(r) - 1, with as many terms as P needs. Valid range: |r| <= log(2) / 2. Max error of exp(r), relative:
// 3e-8 (float), 1e-16 (double).
template <typename P> INLINE float expm1_reduced(float r) {  // Cephes' polynomial
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  return p * r * r + r;
}
template <typename P> INLINE double expm1_reduced(double r) {  // r^k / k! for each k
  constexpr double factorial[] = {1,     1,      2,       6,        24,        120,       720,
                                  5040., 40320., 362880., 3628800., 39916800., 479001600., 6227020800.};
  double p = 1 / factorial[Format<P>::exp_degree];
  for (int k = Format<P>::exp_degree - 1; k >= 2; k--) p = p * r + 1 / factorial[k];
  return p * r * r + r;
}

// x - n log(2), with log(2) as two numbers. The first is so short that n times it is exact up to n = 2^15.
INLINE float reduce(float x, float n) { return (x - n * 0.693359375f) - n * -2.12194440054690583e-4f; }
INLINE double reduce(double x, double n) {
  return (x - n * 6.93147180369123816490e-01) - n * 1.90821492927058770002e-10;
}

// exp(x) = 2^n (expm1 + 1)
template <typename T> struct Reduced {
  Int<T> n;
  T expm1;
};
template <typename P, typename T> INLINE Reduced<T> reduced(T x) {
  const T sum = x * T(kLog2E) + magic(x);
  return {last_bits(sum), expm1_reduced<P>(reduce(x, sum - magic(x)))};
}

// For both functions below: of one x, the compiler computes it once. Below -709, 2^n is 0.
template <typename P> INLINE Reduced<double> reduced_or_0(double x) {
  return reduced<P>(x < -1023 * kLn2 ? -1023 * kLn2 : x);
}

// exp(x). Valid range: up to 700; 0 below -709. Max error, relative: 3e-10 (float), 2e-16 (double).
template <typename T> INLINE double exp_of(double x) {
  const Reduced<double> e = reduced_or_0<T>(x);
  return (e.expm1 + 1) * power_of_2<double>(e.n);
}

// exp(x) - 1. Valid range: up to 700. Max error, relative: 1e-9 (float), 3e-16 (double).
template <typename T> INLINE double expm1_of(double x) {
  const Reduced<double> e = reduced_or_0<T>(x);
  return e.expm1 * power_of_2<double>(e.n) + (power_of_2<double>(e.n) - 1);
}

// 2 atanh(s) = log((1 + s) / (1 - s)) = 2 sum_k s^(2k + 1) / (2k + 1). Valid range: [0, 1/3].
template <typename P> INLINE double two_atanh(double s) {
  double p = 0;
  const double q = s * s;
  for (int k = Format<P>::atanh_degree; k >= 1; k--) p = p * q + 1. / (2 * k + 1);
  return 2 * (p * q * s + s);
}

// log(1 + x). Valid range: [0, 1]. Max error, relative: 2e-10 (float), 4e-16 (double).
template <typename T> INLINE double log1p_of(double x) { return two_atanh<T>(x / (2 + x)); }

// log(x). Valid range: 0, normal x > 0 and NaN. Max error, of 1 or of a larger result: 2e-10 (float), 4e-16
// (double).
template <typename T> INLINE double log_of(double x) {
  const int64_t b = bits<int64_t>(x);
  const double m = bits<double>((b & 0xfffffffffffff) | 0x3ff0000000000000);                   // [1, 2)
  const double n = bits<double>((b >> 52) | 0x4330000000000000) - (4503599627370496. + 1023);  // x = 2^n m
  const double result = n * kLn2 + two_atanh<T>((m - 1) / (m + 1));
  return x > 0 ? result : x == 0 ? -INFINITY : x;
}

// What exponentials are divided by before they are added: exp(shift) 2^k.
template <typename T> struct Reference {
  T shift;
  Int<T> k;
};
template <typename T> INLINE Reference<T> reference_of(T largest) {
  const bool is_far = !(std::fabs(largest) < Format<T>::far);
  const T near = is_far ? T(0) : largest;
  return {is_far && largest != -INFINITY ? largest : T(0), last_bits(near * T(kLog2E) + magic(near))};
}
template <typename T> INLINE double log_reference_of(Reference<T> ref) {
  return double(ref.shift) + kLn2 * number<T>(ref.k);
}

// exp(x) / reference as 2^n (expm1 + 1), where n is at least -`least`
template <typename T> INLINE Reduced<T> reduced_by(Reference<T> ref, T x, int least) {
  const T lowest = T(kLn2) * number<T>(ref.k - least);
  x -= ref.shift;
  x = x < lowest ? lowest : x;
  const Reduced<T> e = reduced<T>(x);
  return {e.n - ref.k, e.expm1};
}

// exp(x) / reference. Valid range: x up to the logit that the reference is of, -inf and NaN. Exactly 0 where
// the result is below T's normal numbers. Max error, relative: 9e-8 (float), 2e-16 (double).
template <typename T> INLINE T scaled_exp(T x, Reference<T> ref) {
  const Reduced<T> e = reduced_by(ref, x, Format<T>::bias);
  return (e.expm1 + 1) * power_of_2<T>(e.n);
}

// The same times q, down to the least number that there is. Max error, relative: 8e-8 (float), 8e-15
// (double).
template <typename T> INLINE T scaled_exp_times(T x, Reference<T> ref, T q) {
  const Reduced<T> e = reduced_by(ref, x, 2 * Format<T>::bias - 2);
  const Int<T> half = e.n >> 1;
  return (e.expm1 * q + q) * power_of_2<T>(half) * power_of_2<T>(e.n - half);
}

}  // namespace
