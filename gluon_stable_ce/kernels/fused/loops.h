/*
 * The loops that take the time. This file is included twice, with T for float and for double.
 *
 *   ..._of_row    over n classes of one position
 *   ..._of_line   over n positions, for one class
 *   ..._of_tile   over n positions, for what there is once per position
 *
 * Each is a function of its own, compiled for several instruction sets. If the compiler moved it into the
 * function that calls it, it would not be vector code.
 */
#ifndef KERNEL
#if !defined(__x86_64__) || !defined(__linux__)
#define KERNEL __attribute__((noinline)) static
#elif __GNUC__ >= 12
#define KERNEL __attribute__((noinline, target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default"))) static
#else
#define KERNEL __attribute__((noinline, target_clones("avx512f", "avx2", "default"))) static
#endif
#endif

KERNEL T largest_of_row(const T* x, int n) {
  T most = -INFINITY;
#pragma omp simd reduction(max : most)
  for (int i = 0; i < n; i++) most = x[i] > most ? x[i] : most;
  return most;
}

// In kLanes parts: that keeps all units busy, and each part has few additions.
KERNEL double sum_exp_of_row(const T* x, int n, Reference<T> ref) {
  T sums[kLanes] = {}, rest[kLanes];
  int i = 0;
  for (; i + kLanes <= n; i += kLanes) {
#pragma omp simd
    for (int lane = 0; lane < kLanes; lane++) sums[lane] += scaled_exp(x[i + lane], ref);
  }
  if (i < n) {
    for (int lane = 0; lane < kLanes; lane++) rest[lane] = i + lane < n ? x[i + lane] : -INFINITY;
#pragma omp simd
    for (int lane = 0; lane < kLanes; lane++) sums[lane] += scaled_exp(rest[lane], ref);
  }
  double sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int lane = 0; lane < kLanes; lane++) sum += sums[lane];
  return sum;
}

// sum_j w_j (top - z_j) with a finite `top`, which has no negative term, and sum_j w_j
KERNEL double weighted_gaps_of_row(const T* x, const T* w, int n, T top, double* total) {
  double gaps = 0, weight = 0;
#pragma omp simd reduction(+ : gaps, weight)
  for (int i = 0; i < n; i++) {
    gaps += w[i] == 0 ? 0. : double(w[i]) * (double(top) - double(x[i]));
    weight += w[i];
  }
  *total = weight;
  return gaps;
}

KERNEL void gradient_of_row(const T* x, const T* w, int n, Reference<T> ref, T q, T u, T* out) {
  if (u == 0) {
#pragma omp simd
    for (int i = 0; i < n; i++) out[i] = scaled_exp_times(x[i], ref, q);
  } else {
#pragma omp simd
    for (int i = 0; i < n; i++) out[i] = scaled_exp_times(x[i], ref, q) - u * w[i];
  }
}

KERNEL void largest_of_line(const T* x, int n, T* most) {
#pragma omp simd
  for (int t = 0; t < n; t++) most[t] = x[t] > most[t] ? x[t] : most[t];
}

// Of kGroup lines at once, kTile apart
KERNEL void sum_exp_of_lines(const T* x, int n, const T* shift, const Int<T>* k, T* sum) {
#pragma omp simd
  for (int t = 0; t < n; t++) {
    const Reference<T> ref = {shift[t], k[t]};
    const T a = scaled_exp(x[t], ref), b = scaled_exp(x[t + kTile], ref);
    const T c = scaled_exp(x[t + 2 * kTile], ref), d = scaled_exp(x[t + 3 * kTile], ref);
    sum[t] += (a + b) + (c + d);
  }
}

KERNEL void weighted_gaps_of_line(const T* x, T w, int n, const T* top, double* gaps) {
#pragma omp simd
  for (int t = 0; t < n; t++) gaps[t] += double(w) * (double(top[t]) - double(x[t]));
}

// A position whose gradient is 0 gets 0, whatever its logits are.
KERNEL void gradient_of_line(const T* x, T w, int n, const Gradient<T>* g, T* out) {
  const T *shift = g->shift, *q = g->q, *u = g->u;
  const Int<T>* k = g->k;
  if (w == 0) {
#pragma omp simd
    for (int t = 0; t < n; t++) {
      const T value = scaled_exp_times(x[t], Reference<T>{shift[t], k[t]}, q[t]);
      out[t] = q[t] != 0 ? value : T(0);
    }
  } else {
#pragma omp simd
    for (int t = 0; t < n; t++) {
      const T value = scaled_exp_times(x[t], Reference<T>{shift[t], k[t]}, q[t]);
      out[t] = (q[t] != 0 ? value : T(0)) - u[t] * w;
    }
  }
}

KERNEL void references_of_tile(const T* largest, int n, T* shift, Int<T>* k, double* log_reference) {
#pragma omp simd
  for (int t = 0; t < n; t++) {
    const Reference<T> ref = reference_of(largest[t]);
    shift[t] = ref.shift;
    k[t] = ref.k;
    log_reference[t] = log_reference_of(ref);
  }
}

// Adds sums with other references; one that is 0 has none.
KERNEL void add_sums_of_tile(const double* log_more, const T* more, int n, double* log_reference,
                             double* sum) {
#pragma omp simd
  for (int t = 0; t < n; t++) {
    const double a = sum[t] == 0 ? -DBL_MAX : log_reference[t], b = more[t] == 0 ? -DBL_MAX : log_more[t];
    const double rest = exp_of<T>(-std::fabs(a - b));
    sum[t] = b > a ? sum[t] * rest + more[t] : sum[t] + more[t] * rest;
    log_reference[t] = b > a ? b : a;
  }
}

KERNEL void terms_of_tile(const Int<T>* y, int n, Terms<T> p) {
#pragma omp simd
  for (int t = 0; t < n; t++) {
    const double z = p.z_label[t] == INFINITY ? NAN : p.z_label[t], log_sum = log_of<T>(p.sum[t]);
    const double log_odds = (p.log_reference[t] - z) + log_sum;
    // of logsumexp and the greater of log S and z_y
    const double distance = log1p_of<T>(exp_of<T>(-std::fabs(log_odds)));
    const bool is_above = log_odds > 0, has_class = y[t] >= 0;
    const double base = is_above ? p.log_reference[t] : z, more = (is_above ? log_sum : 0) + distance;
    const T nll = T((is_above ? log_odds : 0) + distance), high = T(base + more), w = p.w_label[t];
    const T fill = y[t] == kIgnored ? p.fill_ignored : p.fill_invalid;
    p.kept_nll[t] = has_class ? nll : T(0);
    p.kept_logsumexp[t] = has_class ? high : T(0);
    p.kept_rest[t] = !has_class || std::fabs(high) == INFINITY ? T(0) : T((base - high) + more);
    p.nll[t] = !has_class ? fill : w == 0 ? T(0) : w * nll;
    if (p.logsumexp) p.logsumexp[t] = has_class ? high : fill;
    if (p.uniform_nll) {
      // of logsumexp and the largest logit: exact to 1e-8, and at least 0; of no weight, it does not count
      const double gap = p.total_weight == 0 ? 0. : (base - p.top[t]) + more, positive = gap < 0 ? 0. : gap;
      p.uniform_nll[t] = has_class ? T((p.total_weight * positive + p.gaps[t]) / p.classes) : fill;
    }
  }
}

KERNEL void gradient_of_tile(const Int<T>* y, int n, Incoming<T> in, Gradient<T>* gradient) {
  T *shift = gradient->shift, *q = gradient->q, *to_u = gradient->u, *at_label = gradient->at_label;
  Int<T>* k = gradient->k;
#pragma omp simd
  for (int t = 0; t < n; t++) {
    const T g = in.g_nll[t], g_of_logsumexp = in.g_logsumexp[t], g_of_uniform_nll = in.g_uniform_nll[t];
    const double w = in.w_label[t], nll = in.nll[t], high = in.logsumexp[t];
    const bool has_class = y[t] >= 0;
    const double g_nll = has_class && w != 0 ? g * w : 0.;
    const double g_logsumexp = has_class ? g_of_logsumexp : T(0);
    const double u = (has_class ? g_of_uniform_nll : T(0)) / in.classes;
    const double of_p = g_logsumexp + u * in.total_weight;
    const Reference<T> ref = reference_of(in.logsumexp[t]);
    const double scale = high == INFINITY ? 1. : exp_of<T>((log_reference_of(ref) - high) - in.rest[t]);
    const double label = g_nll * expm1_of<T>(-nll) + of_p * exp_of<T>(-nll) - u * w;
    shift[t] = ref.shift;
    k[t] = ref.k;
    q[t] = T(g_nll + of_p == 0 ? 0. : (g_nll + of_p) * scale);
    to_u[t] = T(u);
    at_label[t] = T(std::fabs(g_nll) + std::fabs(g_logsumexp) + std::fabs(u) == 0 ? 0. : label);
  }
}
