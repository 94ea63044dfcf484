/*
 * Cross entropy in one operator: the class axis reduced to one number per position, and the gradient of that.
 *
 *   stable_ce_class_terms(pred, index[, class_weight]; axis, uniform, weighted)
 *     -> nll, logsumexp, logsumexp_rest[, uniform_nll]
 *
 * Inputs:
 *   pred          (outer..., C at `axis`, inner...), float16, float32 or float64: the logits z
 *   index         (outer..., inner...), any dtype: the class y; where it is -1, the logits are not needed
 *   class_weight  (C,), floats: the weights w
 *
 * Outputs, (outer..., inner...) each:
 *   nll             -log p_y, with p the softmax of z
 *   logsumexp       log sum_j exp z_j
 *   logsumexp_rest  what float rounds off from it: up to 4e-6 at 80, and the gradient needs these digits
 *   uniform_nll     -1/C sum_j w_j log p_j
 *
 * What there is once per logit is computed in T: float for float16 and float32, double for float64. What
 * there is once per position is double.
 *
 * Numerics. S is the sum of exp z_j over all classes but the label's. So with L = log S - z_y, the loss is
 * nll = softplus(L), which is as exact for p near 1 as for p near 0. exp(z) is computed as 2^n exp(r) with
 * |r| <= log(2) / 2, and the sums are scaled by 2^-K, with K from the largest logit so far. That subtracts no
 * logit from another, so it rounds no difference. For larger logits (`far`), n log(2) would be rounded. There
 * z - max is used in its place, which is exact wherever it matters (see Reference).
 *
 * Speed. The loops over logits are functions of their own, compiled once for each instruction set. If the
 * compiler moved them into the loops over positions, they would not be vector code.
 */
#include <algorithm>
#include <atomic>
#include <cfloat>
#include <cmath>
#include <condition_variable>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <limits>
#include <memory>
#include <mutex>
#include <numeric>
#include <string>
#include <system_error>
#include <thread>
#include <unordered_map>
#include <vector>

#include <pthread.h>
#include <sched.h>
#include <sys/mman.h>
#ifdef __x86_64__
#include <immintrin.h>
#endif

#include "mxnet/lib_api.h"

#if !defined(__x86_64__) || !defined(__linux__)
#define KERNEL __attribute__((noinline)) static
#elif __GNUC__ >= 12
#define KERNEL __attribute__((noinline, target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default"))) static
#else
#define KERNEL __attribute__((noinline, target_clones("avx512f", "avx2", "default"))) static
#endif
#define INLINE inline __attribute__((always_inline)) static

namespace {

// Exponentials and logarithms without a call or a branch, so that loops over them become vector code.

const double kLn2 = 0.693147180559945309417, kLog2E = 1.442695040888963407360;

template <typename T> struct Format;
template <> struct Format<float> {
  typedef int32_t Int;
  static const int exp_degree = 8, atanh_degree = 8;  // of double series for float results: 2e-10
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
INLINE float magic(float) { return 12582912.f; }
INLINE double magic(double) { return 6755399441055744.; }

// 2^n for n in [-bias, bias], where 2^-bias is 0
template <typename T> INLINE T power_of_2(Int<T> n) {
  return bits<T>((n + Format<T>::bias) << Format<T>::mantissa);
}

// exp(r) - 1 for |r| <= log(2) / 2
INLINE float expm1_reduced(float r) {  // Cephes' polynomial
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  return p * r * r + r;
}
constexpr double factorial(int n) { return n < 2 ? 1 : n * factorial(n - 1); }
template <int k, int last> struct ExpSeries {  // 1/k! + r/(k + 1)! + ... + r^(last - k)/last!
  INLINE double at(double r) { return ExpSeries<k + 1, last>::at(r) * r + 1 / factorial(k); }
};
template <int last> struct ExpSeries<last, last> {
  INLINE double at(double) { return 1 / factorial(last); }
};
template <int degree> INLINE double expm1_reduced(double r) {
  return ExpSeries<2, degree>::at(r) * r * r + r;
}
INLINE double expm1_reduced(double r) { return expm1_reduced<13>(r); }

// log(2) as two numbers, the first short enough for n times it to be exact up to n = 2^15
INLINE float reduce(float x, float n) { return (x - n * 0.693359375f) - n * -2.12194440054690583e-4f; }
INLINE double reduce(double x, double n) {
  return (x - n * 6.93147180369123816490e-01) - n * 1.90821492927058770002e-10;
}

// n and exp(r) - 1 with exp(x) = 2^n exp(r)
template <typename T> struct Reduced {
  Int<T> n;
  T expm1;
};
template <typename T> INLINE Reduced<T> reduced(T x) {
  const T sum = x * T(kLog2E) + magic(x), n = sum - magic(x);
  return {bits<Int<T>>(sum) - bits<Int<T>>(magic(x)), expm1_reduced(reduce(x, n))};
}

// What follows, for what there is once per position, is double; T is what will become of it.

template <typename T> INLINE Reduced<double> reduced_for(double x) {
  const double sum = x * kLog2E + magic(x), n = sum - magic(x);
  return {bits<int64_t>(sum) - bits<int64_t>(magic(x)), expm1_reduced<Format<T>::exp_degree>(reduce(x, n))};
}
template <typename T> INLINE double exp_of(double x) {  // for x <= 700; 0 below -709
  x = x < -1023 * kLn2 ? -1023 * kLn2 : x;
  const Reduced<double> e = reduced_for<T>(x);
  return (e.expm1 + 1) * power_of_2<double>(e.n);
}
template <typename T> INLINE double expm1_of(double x) {  // for x <= 700
  x = x < -100 ? -100 : x;
  const Reduced<double> e = reduced_for<T>(x);
  return e.expm1 * power_of_2<double>(e.n) + (power_of_2<double>(e.n) - 1);
}

template <int k, int last> struct AtanhSeries {  // 1/(2k + 1) + q/(2k + 3) + ... + q^(last - k)/(2 last + 1)
  INLINE double at(double q) { return AtanhSeries<k + 1, last>::at(q) * q + 1. / (2 * k + 1); }
};
template <int last> struct AtanhSeries<last, last> {
  INLINE double at(double) { return 1. / (2 * last + 1); }
};
template <typename T> INLINE double two_atanh(double s) {  // for 0 <= s <= 1/3
  const double q = s * s;
  return 2 * (AtanhSeries<1, Format<T>::atanh_degree>::at(q) * q * s + s);
}
// for 0 <= x <= 1
template <typename T> INLINE double log1p_of(double x) { return two_atanh<T>(x / (2 + x)); }
template <typename T> INLINE double log_of(double x) {  // for x = 0 and normal x > 0, finite; NaN of NaN
  const int64_t b = bits<int64_t>(x);
  const double m = bits<double>((b & 0xfffffffffffff) | 0x3ff0000000000000);                   // [1, 2)
  const double n = bits<double>((b >> 52) | 0x4330000000000000) - (4503599627370496. + 1023);  // x = 2^n m
  const double result = n * kLn2 + two_atanh<T>((m - 1) / (m + 1));
  return x > 0 ? result : x == 0 ? -INFINITY : x;
}

// What exponentials are divided by before they are added: exp(shift) 2^K.
template <typename T> struct Reference {
  T shift;
  Int<T> k;
};
template <typename T> INLINE bool is_inside(T largest) { return std::fabs(largest) < Format<T>::far; }
template <typename T> INLINE T shift_of(T largest) {
  return is_inside(largest) || largest == -INFINITY ? T(0) : largest;
}
template <typename T> INLINE Int<T> exponent_of(T largest) {
  const T n = (is_inside(largest) ? largest : T(0)) * T(kLog2E) + magic(largest);
  return bits<Int<T>>(n) - bits<Int<T>>(magic(largest));
}
template <typename T> INLINE double log_of(T shift, Int<T> k) { return double(shift) + kLn2 * double(k); }
template <typename T> INLINE Reference<T> reference(T largest) {
  return {shift_of(largest), exponent_of(largest)};
}
template <typename T> INLINE double log_of(Reference<T> ref) { return log_of(ref.shift, ref.k); }

const int kTile = 512;  // positions that are handled together
const int kGroup = 4;   // classes that are added up before anything else is
template <typename T> struct References {
  T shift[kTile];
  Int<T> k[kTile];
};

// exp(x) / (exp(shift) 2^K); exactly 0 where that is below T's normal numbers, so of -inf; NaN of NaN
template <typename T> INLINE T scaled_exp(T x, T shift, Int<T> k) {
  const T lowest = T(kLn2) * T(k - Format<T>::bias);
  x -= shift;
  x = x < lowest ? lowest : x;
  const Reduced<T> e = reduced(x);
  return (e.expm1 + 1) * power_of_2<T>(e.n - k);
}

// The same, down to the least number there is, and times q
template <typename T> INLINE T scaled_exp_times(T x, T shift, Int<T> k, T q) {
  const T lowest = T(kLn2) * T(k - 2 * Format<T>::bias + 2);
  x -= shift;
  x = x < lowest ? lowest : x;
  const Reduced<T> e = reduced(x);
  const Int<T> n = e.n - k, half = n >> 1;
  return (e.expm1 * q + q) * power_of_2<T>(half) * power_of_2<T>(n - half);
}

// Loops over n classes of one position.

template <typename T> INLINE T largest_in(const T* x, int n) {
  T most = -INFINITY;
#pragma omp simd reduction(max : most)
  for (int i = 0; i < n; i++) most = x[i] > most ? x[i] : most;
  return most;
}

// Sums run in as many parts. That keeps all units busy, and each part has few additions.
const int kLanes = 64;

template <typename T> INLINE double sum_exp_in(const T* x, int n, Reference<T> ref) {
  T sums[kLanes] = {}, rest[kLanes];
  int i = 0;
  for (; i + kLanes <= n; i += kLanes) {
#pragma omp simd
    for (int lane = 0; lane < kLanes; lane++) sums[lane] += scaled_exp(x[i + lane], ref.shift, ref.k);
  }
  if (i < n) {
    for (int lane = 0; lane < kLanes; lane++) rest[lane] = i + lane < n ? x[i + lane] : -INFINITY;
#pragma omp simd
    for (int lane = 0; lane < kLanes; lane++) sums[lane] += scaled_exp(rest[lane], ref.shift, ref.k);
  }
  double sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int lane = 0; lane < kLanes; lane++) sum += sums[lane];
  return sum;
}

// sum_j w_j (top - z_j) with a finite `top`, which has no negative term, and sum_j w_j
template <typename T> INLINE double weighted_sum_in(const T* x, const T* w, int n, T top, double* total) {
  double sum = 0, all = 0;
#pragma omp simd reduction(+ : sum, all)
  for (int i = 0; i < n; i++) {
    sum += w[i] == 0 ? 0. : double(w[i]) * (double(top) - double(x[i]));
    all += w[i];
  }
  *total = all;
  return sum;
}

template <typename T>
INLINE void gradient_in(const T* x, const T* w, int n, Reference<T> ref, T q, T u, T* out) {
  if (u == 0) {
#pragma omp simd
    for (int i = 0; i < n; i++) out[i] = scaled_exp_times(x[i], ref.shift, ref.k, q);
  } else {
#pragma omp simd
    for (int i = 0; i < n; i++) out[i] = scaled_exp_times(x[i], ref.shift, ref.k, q) - u * w[i];
  }
}

// Loops over n positions, for one class: arrays are (positions,).

template <typename T> INLINE void largest_at(const T* x, int n, T* most) {
#pragma omp simd
  for (int t = 0; t < n; t++) most[t] = x[t] > most[t] ? x[t] : most[t];
}

// of kGroup classes at once, kTile apart
template <typename T> INLINE void sum_exp_at(const T* x, int n, const References<T>* ref, T* sum) {
  const T* shift = ref->shift;
  const Int<T>* k = ref->k;
#pragma omp simd
  for (int t = 0; t < n; t++) {
    const T a = scaled_exp(x[t], shift[t], k[t]), b = scaled_exp(x[t + kTile], shift[t], k[t]);
    const T c = scaled_exp(x[t + 2 * kTile], shift[t], k[t]),
            d = scaled_exp(x[t + 3 * kTile], shift[t], k[t]);
    sum[t] += (a + b) + (c + d);
  }
}

template <typename T> INLINE void weighted_sum_at(const T* x, T w, int n, const T* top, double* sum) {
#pragma omp simd
  for (int t = 0; t < n; t++) sum[t] += double(w) * (double(top[t]) - double(x[t]));
}

// a position whose gradient is 0 gets 0, whatever its logits are
template <typename T>
INLINE void gradient_at(const T* x, T w, int n, const References<T>* ref, const T* q, const T* u, T* out) {
  const T* shift = ref->shift;
  const Int<T>* k = ref->k;
  if (w == 0) {
#pragma omp simd
    for (int t = 0; t < n; t++) {
      const T value = scaled_exp_times(x[t], shift[t], k[t], q[t]);
      out[t] = q[t] != 0 ? value : T(0);
    }
  } else {
#pragma omp simd
    for (int t = 0; t < n; t++) {
      const T value = scaled_exp_times(x[t], shift[t], k[t], q[t]);
      out[t] = (q[t] != 0 ? value : T(0)) - u[t] * w;
    }
  }
}

// What there is once per position, in double.

// Of many positions. `log_reference` and `sum` give log S; `uniform` is sum_j w_j (top - z_j).
template <typename T> struct Position {
  const double *log_reference, *sum, *z_label, *uniform, *top;
  double total_weight, classes;
  T *nll, *logsumexp, *rest, *uniform_nll;
};

template <typename T> INLINE void finish_at(const Int<T>* y, int n, Position<T> p) {
#pragma omp simd
  for (int t = 0; t < n; t++) {
    const double z = p.z_label[t] == INFINITY ? NAN : p.z_label[t], log_sum = log_of<T>(p.sum[t]);
    const double log_odds = (p.log_reference[t] - z) + log_sum;
    // of logsumexp and the greater of log S and z_label
    const double distance = log1p_of<T>(exp_of<T>(-std::fabs(log_odds)));
    const bool above = log_odds > 0;
    const double base = above ? p.log_reference[t] : z, more = (above ? log_sum : 0) + distance;
    const T high = T(base + more);
    p.nll[t] = y[t] < 0 ? T(0) : T((above ? log_odds : 0) + distance);
    p.logsumexp[t] = y[t] < 0 ? T(0) : high;
    p.rest[t] = y[t] < 0 || std::fabs(high) == INFINITY ? T(0) : T((base - high) + more);
    if (p.uniform_nll) {
      // of logsumexp and the largest logit: exact to 1e-8, and at least 0; of no weight, it does not count
      const double gap = p.total_weight == 0 ? 0. : (base - p.top[t]) + more, positive = gap < 0 ? 0. : gap;
      p.uniform_nll[t] = y[t] < 0 ? T(0) : T((p.total_weight * positive + p.uniform[t]) / p.classes);
    }
  }
}

// Of many positions: g_* are the gradients that come in. dnll/dz = p - onehot, dlogsumexp/dz = p,
// duniform_nll/dz = (sum w / C) p - w / C; so dz = q exp(z - reference) - u w but at the label, where p - 1 =
// expm1(-nll).
template <typename T> struct Slope {
  const T *nll, *logsumexp, *rest, *g_nll, *g_logsumexp, *g_uniform_nll, *w_label;
  double total_weight, classes;
  T *shift, *q, *u, *at_label;
  Int<T>* k;
};

template <typename T> INLINE void prepare_gradient_at(const Int<T>* y, int n, Slope<T> s) {
#pragma omp simd
  for (int t = 0; t < n; t++) {
    const T of_nll = s.g_nll[t], of_logsumexp = s.g_logsumexp[t], of_uniform_nll = s.g_uniform_nll[t];
    const bool needed = y[t] >= 0;
    const double g_nll = needed ? of_nll : T(0), g_logsumexp = needed ? of_logsumexp : T(0);
    const double u = (needed ? of_uniform_nll : T(0)) / s.classes;
    const double of_p = g_logsumexp + u * s.total_weight, nll = s.nll[t], high = s.logsumexp[t];
    const T shift = shift_of(s.logsumexp[t]);
    const Int<T> k = exponent_of(s.logsumexp[t]);
    const double scale = high == INFINITY ? 1. : exp_of<T>((log_of(shift, k) - high) - s.rest[t]);
    const double label = g_nll * expm1_of<T>(-nll) + of_p * exp_of<T>(-nll) - u * s.w_label[t];
    s.shift[t] = shift;
    s.k[t] = k;
    s.q[t] = T(g_nll + of_p == 0 ? 0. : (g_nll + of_p) * scale);
    s.u[t] = T(u);
    s.at_label[t] = T(std::fabs(g_nll) + std::fabs(g_logsumexp) + std::fabs(u) == 0 ? 0. : label);
  }
}

template <typename T>
INLINE void make_references_at(const T* largest, int n, References<T>* ref, double* log_reference) {
  T* shift = ref->shift;
  Int<T>* k = ref->k;
#pragma omp simd
  for (int t = 0; t < n; t++) {
    shift[t] = shift_of(largest[t]);
    k[t] = exponent_of(largest[t]);
    log_reference[t] = log_of(shift[t], k[t]);
  }
}

// Adds sums with other references; one that is 0 has none.
template <typename T, typename More>
INLINE void merge_at(const double* log_more, const More* more, int n, double* log_reference, double* sum) {
#pragma omp simd
  for (int t = 0; t < n; t++) {
    const double a = sum[t] == 0 ? -DBL_MAX : log_reference[t], b = more[t] == 0 ? -DBL_MAX : log_more[t];
    const double rest = exp_of<T>(-std::fabs(a - b));
    sum[t] = b > a ? sum[t] * rest + more[t] : sum[t] + more[t] * rest;
    log_reference[t] = b > a ? b : a;
  }
}

// The loops above, for both types, once for each instruction set
#define KERNELS(T)                                                                                         \
  KERNEL T largest_of(const T* x, int n) { return largest_in(x, n); }                                      \
  KERNEL double sum_exp(const T* x, int n, Reference<T> ref) { return sum_exp_in(x, n, ref); }             \
  KERNEL double weighted_sum(const T* x, const T* w, int n, T top, double* total) {                        \
    return weighted_sum_in(x, w, n, top, total);                                                           \
  }                                                                                                        \
  KERNEL void gradient(const T* x, const T* w, int n, Reference<T> ref, T q, T u, T* out) {                \
    gradient_in(x, w, n, ref, q, u, out);                                                                  \
  }                                                                                                        \
  KERNEL void largest_of(const T* x, int n, T* most) { largest_at(x, n, most); }                           \
  KERNEL void sum_exp(const T* x, int n, const References<T>* ref, T* sum) { sum_exp_at(x, n, ref, sum); } \
  KERNEL void weighted_sum(const T* x, T w, int n, const T* top, double* sum) {                            \
    weighted_sum_at(x, w, n, top, sum);                                                                    \
  }                                                                                                        \
  KERNEL void gradient(const T* x, T w, int n, const References<T>* ref, const T* q, const T* u, T* out) { \
    gradient_at(x, w, n, ref, q, u, out);                                                                  \
  }                                                                                                        \
  KERNEL void make_references(const T* largest, int n, References<T>* ref, double* log_reference) {        \
    make_references_at(largest, n, ref, log_reference);                                                    \
  }                                                                                                        \
  KERNEL void merge(const double* log_more, const T* more, int n, double* log_reference, double* sum) {    \
    merge_at<T>(log_more, more, n, log_reference, sum);                                                    \
  }                                                                                                        \
  KERNEL void finish(const Int<T>* y, int n, Position<T> p) { finish_at(y, n, p); }                        \
  KERNEL void prepare_gradient(const Int<T>* y, int n, Slope<T> s) { prepare_gradient_at(y, n, s); }
KERNELS(float)
KERNELS(double)

// Numbers in memory: float16 is converted, all else is there as it is.

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
template <typename T> void store(const T*, int, T*) {}
void store(const float* x, int n, Half* to) {
  for (int i = kF16C ? store_8(x, n, to) : 0; i < n; i++) put(x[i], to + i);
}

// How work is cut up.

const int kBlock = 1024;                           // classes of one position that fit into the first cache
const int kRowSplit = 1 << 16, kLineSplit = 1024;  // classes that one thread handles
const int kLines = 32;  // classes of kTile positions that fit into the second cache

// Logits are (outer, C, inner). Many classes next to each other are `rows`, read along the classes; all else
// is read in lines, one class of many positions. The cut depends on the shape alone, so the results do not on
// the number of threads.
struct Work {
  int64_t outer, classes, inner, positions;
  bool rows, lines_in_place;
  int64_t tile, tiles, tiles_per_outer, split, splits;

  Work(const std::vector<int64_t>& shape, int axis) : outer(1), classes(shape[axis]), inner(1) {
    for (int i = 0; i < axis; i++) outer *= shape[i];
    for (size_t i = axis + 1; i < shape.size(); i++) inner *= shape[i];
    positions = outer * inner;
    rows = inner == 1 && classes > 64;
    lines_in_place = inner >= 64;
    tile = rows ? std::max<int64_t>(1, std::min<int64_t>(kTile, 16384 / classes)) : kTile;
    tiles_per_outer = ceil(inner, tile);
    tiles = lines_in_place ? outer * tiles_per_outer : ceil(positions, tile);
    split = rows ? kRowSplit : kLineSplit;
    splits = ceil(classes, split);
  }
  static int64_t ceil(int64_t a, int64_t b) { return (a + b - 1) / b; }
};

// Up to kTile positions, and a range of their classes
struct Part {
  int64_t begin;           // the first position
  int n;                   // how many
  int64_t j_begin, j_end;  // classes
  int64_t at[kTile];       // where in `pred` the position's class 0 is

  Part(const Work& work, int64_t tile, int64_t split) {
    j_begin = split * work.split;
    j_end = std::min(work.classes, j_begin + work.split);
    int64_t end;
    if (work.lines_in_place) {
      const int64_t o = tile / work.tiles_per_outer, i = tile % work.tiles_per_outer * work.tile;
      begin = o * work.inner + i;
      end = o * work.inner + std::min(work.inner, i + work.tile);
    } else {
      begin = tile * work.tile;
      end = std::min(work.positions, begin + work.tile);
    }
    n = int(end - begin);
    int64_t i = begin % work.inner, next = begin / work.inner * work.classes * work.inner + i;
    for (int t = 0; t < n; t++, next++) {
      at[t] = next;
      if (++i == work.inner) i = 0, next += (work.classes - 1) * work.inner;
    }
  }
};

// Threads do not survive a fork: forked workers compute alone.
bool forked = false;
const int kForkHandler = pthread_atfork(nullptr, nullptr, [] { forked = true; });

int count_processors() {
#ifdef __linux__
  cpu_set_t allowed;
  if (!sched_getaffinity(0, sizeof(allowed), &allowed)) return CPU_COUNT(&allowed);
#endif
  return int(std::thread::hardware_concurrency());
}

// All processors, where MXNet gives its worker half of them, as if each core were two; but what the user has
// set, as for the rest of MXNet. Small work takes one thread: to wake another one would take longer.
int count_threads(int64_t work) {
  static const int all = [] {
    const char *set = getenv("OMP_NUM_THREADS"), *most = getenv("MXNET_OMP_MAX_THREADS");
    const int threads = set && atoi(set) > 0 ? atoi(set) : count_processors();
    return most && atoi(most) > 0 ? std::min(threads, atoi(most)) : threads;
  }();
  return work < 1 << 18 || forked ? 1 : std::max(1, all);
}

// Threads that sleep until there is work. Whoever has work does not wait for those that have not begun: when
// other programs keep the processors busy, that would take longer than the work. OpenMP does wait.
class Helpers {
  std::mutex in_use, mutex;
  std::condition_variable wake, done;
  const std::function<void()>* job = nullptr;
  int count = 0, wanted = 0, active = 0;

  void help() {
    std::unique_lock<std::mutex> lock(mutex);
    for (;;) {
      wake.wait(lock, [this] { return wanted > 0; });
      const std::function<void()>* const mine = job;
      wanted--, active++;
      lock.unlock();
      (*mine)();
      lock.lock();
      if (--active == 0) done.notify_one();
    }
  }

 public:
  // Runs `all`, which ends when nothing is left to do, here and in up to `helpers` other threads.
  void run(int helpers, const std::function<void()>& all) {
    std::unique_lock<std::mutex> only(in_use, std::try_to_lock);
    if (!only) return all();
    {
      std::lock_guard<std::mutex> lock(mutex);
      try {
        for (; count < helpers; count++) std::thread(&Helpers::help, this).detach();
      } catch (const std::system_error&) {  // the system allows no more
      }
      job = &all, wanted = std::min(helpers, count);
    }
    wake.notify_all();
    all();
    std::unique_lock<std::mutex> lock(mutex);
    wanted = 0;
    done.wait(lock, [this] { return active == 0; });
  }
};

// One for all loops. Never deleted: its threads wait for it until the process ends.
Helpers& all_helpers() {
  static Helpers& helpers = *new Helpers;
  return helpers;
}

template <typename F> void for_each(int64_t n, int64_t work, F body) {
  const int threads = int(std::min<int64_t>(n, count_threads(work)));
  std::atomic<int64_t> next(0);
  const auto all = [&] {
    for (int64_t i; (i = next++) < n;) body(i);
  };
  if (threads > 1) all_helpers().run(threads - 1, all);
  else all();
}

// MXNet asks the system for large arrays anew each time. In pages of 4 KB, getting them takes longer than
// filling them.
void ask_for_large_pages(void* data, size_t size) {
#ifdef MADV_HUGEPAGE
  const uintptr_t page = 1 << 21, begin = (reinterpret_cast<uintptr_t>(data) + page - 1) & -page;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(data) + size) & -page;
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
}

// The operator.

using mxnet::ext::MXTensor;
typedef std::unordered_map<std::string, std::string> Attributes;
typedef std::vector<MXTensor> Tensors;

template <typename From> void read_as(const void* data, int64_t begin, int64_t n, double* to) {
  for (int64_t i = 0; i < n; i++) to[i] = double(value(static_cast<const From*>(data)[begin + i]));
}
void read(const MXTensor& from, int64_t begin, int64_t n, double* to) {
  switch (from.dtype) {
    case mxnet::ext::kFloat64: return read_as<double>(from.data_ptr, begin, n, to);
    case mxnet::ext::kFloat32: return read_as<float>(from.data_ptr, begin, n, to);
    case mxnet::ext::kFloat16: return read_as<Half>(from.data_ptr, begin, n, to);
    case mxnet::ext::kInt64: return read_as<int64_t>(from.data_ptr, begin, n, to);
    case mxnet::ext::kInt32: return read_as<int32_t>(from.data_ptr, begin, n, to);
    case mxnet::ext::kInt8: return read_as<int8_t>(from.data_ptr, begin, n, to);
    default: return read_as<uint8_t>(from.data_ptr, begin, n, to);
  }
}

// Classes as integers; -1 for whatever is none
template <typename Int> void read_index(const MXTensor& index, const Part& part, int64_t classes, Int* y) {
  double j[kTile];
  read(index, part.begin, part.n, j);
  for (int t = 0; t < part.n; t++) y[t] = j[t] >= 0 && j[t] < classes ? Int(j[t]) : Int(-1);
}

// The weights in uniform_nll, which are 1 if none are given; empty if it is not asked for
template <typename T> std::vector<T> read_weights(bool uniform, const MXTensor* given, int64_t classes) {
  std::vector<double> weights(uniform ? classes : 0, 1.);
  if (uniform && given) read(*given, 0, classes, weights.data());
  return std::vector<T>(weights.begin(), weights.end());
}

// One class of all positions of a part: in place, or in `buffer`
template <typename S, typename T>
const T* load_line(const S* x, const Work& work, const Part& part, int64_t j, T* buffer) {
  if (work.lines_in_place) return load(x + part.at[0] + j * work.inner, part.n, buffer);
  for (int t = 0; t < part.n; t++) buffer[t] = value(x[part.at[t] + j * work.inner]);
  return buffer;
}

// Of the positions of a part, over some of their classes
struct Sums {
  double log_reference[kTile], sum[kTile];    // S is sum exp(log_reference)
  double top[kTile], uniform[kTile], weight;  // sum_j w_j (top - z_j), and sum_j w_j

  void clear(int n) {
    std::fill_n(log_reference, n, 0.);
    std::fill_n(sum, n, 0.);
    std::fill_n(top, n, -INFINITY);
    std::fill_n(uniform, n, 0.);
    weight = 0;
  }
  // Adds the weighted sum of other classes of a position, whose weights are `more_weight` in all.
  void add_uniform(int t, double more_top, double more, double more_weight) {
    const double next = std::max(top[t], more_top);
    uniform[t] += more + (weight == 0 ? 0. : weight * (next - top[t])) +
                  (more_weight == 0 ? 0. : more_weight * (next - more_top));
    top[t] = next;
  }
};

// The sum of exponentials of some classes of one position, read once
template <typename T> struct RunningSum {
  T largest = -INFINITY;
  Reference<T> ref = reference(largest);
  double sum = 0;

  void add(const T* x, int n) {
    const T most = largest_of(x, n);
    if (most > largest) {
      const Reference<T> next = reference(most);
      if (sum != 0) sum *= exp_of<double>(log_of(ref) - log_of(next));
      largest = most, ref = next;
    }
    sum += sum_exp(x, n, ref);
  }
};

template <typename S, typename T>
void reduce_row(const S* row, const T* w, int64_t j_begin, int64_t j_end, int64_t y, int t, Sums* sums) {
  T buffer[kBlock];
  RunningSum<T> others;
  sums->weight = 0;
  for (int64_t j = j_begin; j < j_end; j += kBlock) {
    const int n = int(std::min<int64_t>(kBlock, j_end - j));
    const T* x = load(row + j, n, buffer);
    if (w) {
      const T top = std::max(largest_of(x, n), std::numeric_limits<T>::lowest());
      double weight;
      const double uniform = weighted_sum(x, w + j, n, top, &weight);
      sums->add_uniform(t, top, uniform, weight);
      sums->weight += weight;
    }
    if (y < j || y >= j + n) {
      others.add(x, n);
    } else {  // but the label's
      if (y > j) others.add(x, int(y - j));
      if (y + 1 < j + n) others.add(x + (y + 1 - j), int(j + n - (y + 1)));
    }
  }
  sums->log_reference[t] = log_of(others.ref);
  sums->sum[t] = others.sum;
}

// Some classes of all positions of a part. They are read once, into a buffer of their own: lines of images
// are often powers of 2 apart, and so few of them fit into a cache.
template <typename S, typename T> void reduce_lines(const S* pred, const T* w, const Work& work,
                                                    const Part& part, const Int<T>* y, Sums* sums) {
  T lines[kLines][kTile], largest[kTile], sum[kTile];
  double log_reference[kTile];
  References<T> ref;
  const auto find_largest = [&](int classes, T least) {
    std::fill_n(largest, part.n, least);
    for (int j = 0; j < classes; j++) largest_of(lines[j], part.n, largest);
  };
  for (int64_t j_begin = part.j_begin; j_begin < part.j_end; j_begin += kLines) {
    const int classes = int(std::min<int64_t>(kLines, part.j_end - j_begin));
    const int padded = (classes + kGroup - 1) / kGroup * kGroup;
    for (int j = 0; j < classes; j++) {
      const T* line = load_line(pred, work, part, j_begin + j, lines[j]);
      if (line != lines[j]) std::copy_n(line, part.n, lines[j]);
    }
    if (w) {
      double uniform[kTile] = {}, weight = 0;
      find_largest(classes, std::numeric_limits<T>::lowest());
      for (int j = 0; j < classes; j++) {
        if (w[j_begin + j] != 0) weighted_sum(lines[j], w[j_begin + j], part.n, largest, uniform);
        weight += w[j_begin + j];
      }
      for (int t = 0; t < part.n; t++) sums->add_uniform(t, largest[t], uniform[t], weight);
      sums->weight += weight;
    }
    for (int j = classes; j < padded; j++) std::fill_n(lines[j], part.n, T(-INFINITY));
    for (int t = 0; t < part.n; t++) {
      const int64_t j = y[t] - j_begin;
      if (y[t] >= 0 && j >= 0 && j < classes) lines[j][t] = -INFINITY;  // all but the label's
    }
    std::fill_n(sum, part.n, T(0));
    find_largest(classes, T(-INFINITY));
    make_references(largest, part.n, &ref, log_reference);
    for (int j = 0; j < padded; j += kGroup) sum_exp(lines[j], part.n, &ref, sum);
    merge(log_reference, sum, part.n, sums->log_reference, sums->sum);
  }
}

template <typename S, typename T>
void reduce(const S* pred, const T* w, const Work& work, const Part& part, const Int<T>* y, Sums* sums) {
  sums->clear(part.n);
  if (std::all_of(y, y + part.n, [](Int<T> j) { return j < 0; })) return;
  if (!work.rows) return reduce_lines(pred, w, work, part, y, sums);
  for (int t = 0; t < part.n; t++) {
    if (y[t] >= 0) reduce_row(pred + part.at[t], w, part.j_begin, part.j_end, y[t], t, sums);
  }
}

// inf - inf made a NaN of every sum with a logit of inf in it; but the sum is infinite, if no logit is NaN
template <typename S> void restore_infinite(const S* pred, const Work& work, const Part& part, Sums* sums) {
  for (int t = 0; t < part.n; t++) {
    if (sums->log_reference[t] != INFINITY) continue;
    sums->sum[t] = 1;
    for (int64_t j = 0; j < work.classes; j++) {
      if (std::isnan(value(pred[part.at[t] + j * work.inner]))) sums->sum[t] = NAN;
    }
  }
}

// pred, index, class_weight -> nll, logsumexp, logsumexp_rest, uniform_nll
template <typename S, typename T> void forward_as(int axis, bool uniform, Tensors& in, Tensors& out) {
  const Work work(in[0].shape, axis);
  const S* pred = in[0].data<S>();
  const std::vector<T> weights = read_weights<T>(uniform, in.size() > 2 ? &in[2] : nullptr, work.classes);
  const T* w = uniform ? weights.data() : nullptr;
  const double total_weight = std::accumulate(weights.begin(), weights.end(), 0.);
  std::unique_ptr<Sums[]> partial(work.splits > 1 ? new Sums[work.tiles * work.splits] : nullptr);

  const auto finish_part = [&](const Part& part, const Int<T>* y, Sums* sums) {
    double z_label[kTile];
    for (int t = 0; t < part.n; t++) {
      z_label[t] = y[t] < 0 ? 0. : double(value(pred[part.at[t] + y[t] * work.inner]));
    }
    restore_infinite(pred, work, part, sums);
    const auto output = [&](int i) { return out[i].data<T>() + part.begin; };
    finish(y, part.n,
           Position<T>{sums->log_reference, sums->sum, z_label, sums->uniform, sums->top, total_weight,
                       double(work.classes), output(0), output(1), output(2), uniform ? output(3) : nullptr});
  };
  for_each(work.tiles * work.splits, work.positions * work.classes, [&](int64_t i) {
    const Part part(work, i / work.splits, i % work.splits);
    Int<T> y[kTile];
    read_index(in[1], part, work.classes, y);
    if (partial) return reduce(pred, w, work, part, y, &partial[i]);
    Sums sums;
    reduce(pred, w, work, part, y, &sums);
    finish_part(part, y, &sums);
  });
  if (!partial) return;
  for_each(work.tiles, work.positions * work.splits, [&](int64_t tile) {
    const Part part(work, tile, 0);
    Int<T> y[kTile];
    read_index(in[1], part, work.classes, y);
    Sums& sums = partial[tile * work.splits];
    for (int64_t split = 1; split < work.splits; split++) {
      const Sums& more = partial[tile * work.splits + split];
      merge_at<double>(more.log_reference, more.sum, part.n, sums.log_reference, sums.sum);
      for (int t = 0; t < part.n; t++) sums.add_uniform(t, more.top[t], more.uniform[t], more.weight);
      sums.weight += more.weight;
    }
    finish_part(part, y, &sums);
  });
}

template <typename S, typename T> void gradient_of_row(const S* row, const T* w, int64_t j_begin,
                                                       int64_t j_end, Reference<T> ref, T q, T u, S* out) {
  T buffer[kBlock], result[kBlock];
  for (int64_t j = j_begin; j < j_end; j += kBlock) {
    const int n = int(std::min<int64_t>(kBlock, j_end - j));
    T* to = target(out + j, result);
    gradient(load(row + j, n, buffer), w ? w + j : nullptr, n, ref, q, u, to);
    store(to, n, out + j);
  }
}

template <typename S, typename T> void gradient_of_lines(const S* pred, const T* w, const Work& work,
                                                         const Part& part, const References<T>* ref,
                                                         const T* q, const T* u, S* out) {
  T buffer[kTile], result[kTile];
  for (int64_t j = part.j_begin; j < part.j_end; j++) {
    const T* x = load_line(pred, work, part, j, buffer);
    S* line = out + j * work.inner;
    T* to = work.lines_in_place ? target(line + part.at[0], result) : result;
    gradient(x, w ? w[j] : T(0), part.n, ref, q, u, to);
    if (work.lines_in_place) {
      store(to, part.n, line + part.at[0]);
    } else {
      for (int t = 0; t < part.n; t++) put(to[t], line + part.at[t]);
    }
  }
}

// gradients of the outputs, pred, index, class_weight, outputs -> gradients of the inputs
template <typename S, typename T> void backward_as(int axis, bool uniform, Tensors& in, Tensors& out) {
  const size_t first = uniform ? 4 : 3, num_in = out.size();  // of forward: its outputs, its inputs
  const Work work(in[first].shape, axis);
  const S* pred = in[first].data<S>();
  S* to = out[0].data<S>();
  const MXTensor* given = num_in > 2 ? &in[first + 2] : nullptr;
  const std::vector<T> weights = read_weights<T>(uniform, given, work.classes);
  const T* w = uniform ? weights.data() : nullptr;
  const double total_weight = std::accumulate(weights.begin(), weights.end(), 0.);
  ask_for_large_pages(to, out[0].size() * sizeof(S));
  const auto at = [&](size_t i, const Part& part) { return in[i].data<T>() + part.begin; };

  for_each(work.tiles * work.splits, work.positions * work.classes, [&](int64_t i) {
    const Part part(work, i / work.splits, i % work.splits);
    Int<T> y[kTile];
    T q[kTile], u[kTile], at_label[kTile], w_label[kTile], none[kTile] = {};
    References<T> ref;
    read_index(in[first + 1], part, work.classes, y);
    for (int t = 0; t < part.n; t++) w_label[t] = w && y[t] >= 0 ? w[y[t]] : T(0);
    prepare_gradient(
        y, part.n,
        Slope<T>{at(first + num_in, part), at(first + num_in + 1, part), at(first + num_in + 2, part),
                 at(0, part), at(1, part), uniform ? at(3, part) : none, w_label, total_weight,
                 double(work.classes), ref.shift, q, u, at_label, ref.k});
    const auto needed = [&](int t) { return q[t] != 0 || u[t] != 0 || at_label[t] != 0; };
    if (!work.rows) gradient_of_lines(pred, w, work, part, &ref, q, u, to);
    for (int t = 0; t < part.n; t++) {
      S* row = to + part.at[t];
      if (work.rows && needed(t)) {
        gradient_of_row(pred + part.at[t], w, part.j_begin, part.j_end, Reference<T>{ref.shift[t], ref.k[t]},
                        q[t], u[t], row);
      } else if (work.rows) {
        memset(static_cast<void*>(row + part.j_begin), 0, (part.j_end - part.j_begin) * sizeof(S));
      }
      if (y[t] >= part.j_begin && y[t] < part.j_end) put(at_label[t], row + y[t] * work.inner);
    }
  });
}

int to_int(const Attributes& attributes, const char* key, int otherwise) {
  const auto found = attributes.find(key);
  return found == attributes.end() ? otherwise : std::stoi(found->second);
}

mxnet::ext::MXReturnValue fail(const std::string& message) {
  MX_ERROR_MSG << message;
  return mxnet::ext::MX_FAIL;
}

mxnet::ext::MXReturnValue parse(const Attributes& attributes, int* num_in, int* num_out) {
  *num_in = to_int(attributes, "weighted", 0) ? 3 : 2;
  *num_out = to_int(attributes, "uniform", 0) ? 4 : 3;
  return mxnet::ext::MX_SUCCESS;
}

mxnet::ext::MXReturnValue infer_type(const Attributes&, std::vector<int>* in, std::vector<int>* out) {
  const int pred = in->at(0);
  if (pred == -1) return mxnet::ext::MX_SUCCESS;
  if (pred != mxnet::ext::kFloat16 && pred != mxnet::ext::kFloat32 && pred != mxnet::ext::kFloat64) {
    return fail("pred: expected float16, float32 or float64, got dtype " + std::to_string(pred));
  }
  const int terms = pred == mxnet::ext::kFloat64 ? pred : int(mxnet::ext::kFloat32);
  if (in->at(1) == -1) in->at(1) = terms;
  if (in->size() > 2 && in->at(2) == -1) in->at(2) = terms;
  if (in->size() > 2 && in->at(2) > mxnet::ext::kFloat16) return fail("class_weight: expected floats");
  for (int& type : *out) type = terms;
  return mxnet::ext::MX_SUCCESS;
}

int axis_of(const Attributes& attributes, size_t rank) {
  const int axis = to_int(attributes, "axis", -1);
  return axis < 0 ? axis + int(rank) : axis;
}

mxnet::ext::MXReturnValue infer_shape(const Attributes& attributes, std::vector<std::vector<unsigned>>* in,
                                      std::vector<std::vector<unsigned>>* out) {
  std::vector<unsigned> positions = in->at(0);
  const int axis = axis_of(attributes, positions.size());
  if (axis < 0 || axis >= int(positions.size())) return fail("pred: has no such axis");
  const unsigned classes = positions[axis];
  positions.erase(positions.begin() + axis);
  if (in->at(1).empty()) in->at(1) = positions;
  if (in->at(1) != positions) return fail("index: expected the shape of pred without its class axis");
  if (in->size() > 2 && in->at(2).empty()) in->at(2) = {classes};
  if (in->size() > 2 && in->at(2) != std::vector<unsigned>{classes})
    return fail("class_weight: expected one per class");
  for (auto& shape : *out) shape = positions;
  return mxnet::ext::MX_SUCCESS;
}

// What computes, for logits of each dtype
typedef void Compute(int axis, bool uniform, Tensors& in, Tensors& out);
mxnet::ext::MXReturnValue compute(const Attributes& attributes, const MXTensor& logits, Compute* of_float16,
                                  Compute* of_float32, Compute* of_float64, Tensors& in, Tensors& out) {
  const bool is_float16 = logits.dtype == mxnet::ext::kFloat16;
  const bool is_float32 = logits.dtype == mxnet::ext::kFloat32;
  Compute* const of_dtype = is_float16 ? of_float16 : is_float32 ? of_float32 : of_float64;
  of_dtype(axis_of(attributes, logits.shape.size()), to_int(attributes, "uniform", 0), in, out);
  return mxnet::ext::MX_SUCCESS;
}

mxnet::ext::MXReturnValue forward(const Attributes& attributes, Tensors* in, Tensors* out,
                                  const mxnet::ext::OpResource&) {
  return compute(attributes, in->at(0), forward_as<Half, float>, forward_as<float, float>,
                 forward_as<double, double>, *in, *out);
}

mxnet::ext::MXReturnValue backward(const Attributes& attributes, Tensors* in, Tensors* out,
                                   const mxnet::ext::OpResource&) {
  static const size_t sizes[] = {4, 8, 2, 1, 4, 1, 8};  // of a number, by dtype
  for (size_t i = 1; i < out->size(); i++) {            // index and class_weight have no gradient
    memset(out->at(i).data_ptr, 0, out->at(i).size() * sizes[out->at(i).dtype]);
  }
  return compute(attributes, out->at(0), backward_as<Half, float>, backward_as<float, float>,
                 backward_as<double, double>, *in, *out);
}

REGISTER_OP(stable_ce_class_terms)
    .setForward(forward, "cpu")
    .setBackward(backward, "cpu")
    .setParseAttrs(parse)
    .setInferType(infer_type)
    .setInferShape(infer_shape);

}  // namespace

mxnet::ext::MXReturnValue initialize(int version) {
  if (version >= 10900 && version < 11000) return mxnet::ext::MX_SUCCESS;
  return fail("expected MXNet 1.9");
}
