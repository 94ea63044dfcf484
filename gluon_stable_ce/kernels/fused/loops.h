/*
 * The loops that take the time. This file is included twice, with T for float and for double.
 *
 *   ..._of_row    over n classes of one position
 *   ..._of_line   over n positions, for one class; ..._of_lines for some classes, kTile apart
 *   ..._of_tile   over n positions, for what there is once per position
 *
 * Each is a function of its own, compiled for several instruction sets. If the compiler moved it into the
 * function that calls it, it would not be vector code. `ivdep` says that no iteration needs another one: with
 * `omp simd`, GCC keeps a structure of the body in memory, and then computes one number at a time.
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
#pragma GCC ivdep
    for (int lane = 0; lane < kLanes; lane++) sums[lane] += scaled_exp(x[i + lane], ref);
  }
  if (i < n) {
    for (int lane = 0; lane < kLanes; lane++) rest[lane] = i + lane < n ? x[i + lane] : -INFINITY;
#pragma GCC ivdep
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
#pragma GCC ivdep
    for (int i = 0; i < n; i++) out[i] = scaled_exp_times(x[i], ref, q);
  } else {
#pragma GCC ivdep
    for (int i = 0; i < n; i++) out[i] = scaled_exp_times(x[i], ref, q) - u * w[i];
  }
}

KERNEL void largest_of_lines(const T (*x)[kTile], int classes, int n, T* most) {
  for (int j = 0; j < classes; j++) {
#pragma GCC ivdep
    for (int t = 0; t < n; t++) most[t] = x[j][t] > most[t] ? x[j][t] : most[t];
  }
}

// sum_j exp z_j, divided by the reference of the largest. A sum in T would round too much where one term is
// large and many are small.
KERNEL void sum_exp_of_lines(const T (*x)[kTile], int classes, int n, double* log_reference, double* sum) {
  T largest[kTile], shift[kTile];
  Int<T> k[kTile];
  for (int t = 0; t < n; t++) largest[t] = -INFINITY, sum[t] = 0;
  largest_of_lines(x, classes, n, largest);
#pragma GCC ivdep
  for (int t = 0; t < n; t++) {
    const Reference<T> ref = reference_of(largest[t]);
    shift[t] = ref.shift, k[t] = ref.k;
    log_reference[t] = log_reference_of(ref);
  }
  int j = 0;
  for (; j + kGroup <= classes; j += kGroup) {
#pragma GCC ivdep
    for (int t = 0; t < n; t++) {
      const Reference<T> ref = {shift[t], k[t]};
      const T a = scaled_exp(x[j][t], ref), b = scaled_exp(x[j + 1][t], ref);
      const T c = scaled_exp(x[j + 2][t], ref), d = scaled_exp(x[j + 3][t], ref);
      sum[t] += (a + b) + (c + d);
    }
  }
  for (; j < classes; j++) {
#pragma GCC ivdep
    for (int t = 0; t < n; t++) sum[t] += scaled_exp(x[j][t], Reference<T>{shift[t], k[t]});
  }
}

// sum_j w_j (top - z_j) with a finite `top`
KERNEL void weighted_gaps_of_lines(const T (*x)[kTile], const T* w, int classes, int n, const T* top,
                                   double* gaps) {
  for (int t = 0; t < n; t++) gaps[t] = 0;
  for (int j = 0; j < classes; j++) {
    if (w[j] == 0) continue;
#pragma GCC ivdep
    for (int t = 0; t < n; t++) gaps[t] += double(w[j]) * (double(top[t]) - double(x[j][t]));
  }
}

// A position whose gradient is 0 gets 0, whatever its logits are.
KERNEL void gradient_of_line(const T* x, T w, int n, const Gradient<T>* g, T* out) {
  if (w == 0) {
#pragma GCC ivdep
    for (int t = 0; t < n; t++) {
      const T value = scaled_exp_times(x[t], Reference<T>{g->shift[t], g->k[t]}, g->q[t]);
      out[t] = g->q[t] != 0 ? value : T(0);
    }
  } else {
#pragma GCC ivdep
    for (int t = 0; t < n; t++) {
      const T value = scaled_exp_times(x[t], Reference<T>{g->shift[t], g->k[t]}, g->q[t]);
      out[t] = (g->q[t] != 0 ? value : T(0)) - g->u[t] * w;
    }
  }
}

// Adds sums with other references; one that is 0 has none.
KERNEL void add_sums_of_tile(const Tile<T>* tile, const double* log_more, const double* more, Sums* sums) {
#pragma GCC ivdep
  for (int t = 0; t < tile->n; t++) {
    const double sum = sums->sum[t];
    const double a = sum == 0 ? -DBL_MAX : sums->log_reference[t], b = more[t] == 0 ? -DBL_MAX : log_more[t];
    const double rest = exp_of<T>(-std::fabs(a - b));
    sums->sum[t] = b > a ? sum * rest + more[t] : sum + more[t] * rest;
    sums->log_reference[t] = b > a ? b : a;
  }
}

KERNEL void terms_of_tile(const Tile<T>* tile, const Sums* sums, Constants<T> c, Kept<T> kept, Terms<T> out) {
#pragma GCC ivdep
  for (int t = 0; t < tile->n; t++) {
    const double z = sums->z_label[t] == INFINITY ? NAN : sums->z_label[t];
    const double log_reference = sums->log_reference[t], log_sum = log_of<T>(sums->sum[t]);
    const double log_odds = (log_reference - z) + log_sum;
    // of logsumexp and the greater of log S and z_y
    const double distance = log1p_of<T>(exp_of<T>(-std::fabs(log_odds)));
    const bool is_above = log_odds > 0, has_class = tile->y[t] >= 0;
    const double base = is_above ? log_reference : z, more = (is_above ? log_sum : 0) + distance;
    const T nll = T((is_above ? log_odds : 0) + distance), high = T(base + more), w = tile->w_label[t];
    kept.nll[t] = has_class ? nll : T(0);
    kept.logsumexp[t] = has_class ? high : T(0);
    kept.rest[t] = !has_class || std::fabs(high) == INFINITY ? T(0) : T((base - high) + more);
    out.nll[t] = has_class && w != 0 ? w * nll : T(0);
  }
  if (out.logsumexp) std::copy_n(kept.logsumexp, tile->n, out.logsumexp);
  if (out.uniform_nll) {
#pragma GCC ivdep
    for (int t = 0; t < tile->n; t++) {
      // of logsumexp and the largest logit: exact to 1e-8, and at least 0; of no weight, it does not count
      const double gap = (double(kept.logsumexp[t]) - sums->top[t]) + kept.rest[t];
      const double positive = c.total_weight == 0 || gap < 0 ? 0. : gap;
      out.uniform_nll[t] = T((c.total_weight * positive + sums->gaps[t]) / c.classes);
    }
  }
  for (T* const term : {out.nll, out.logsumexp, out.uniform_nll}) {
    if (!term) continue;
#pragma GCC ivdep
    for (int t = 0; t < tile->n; t++) {
      const T fill = tile->y[t] == kIgnored ? c.fill_ignored : c.fill_invalid;
      term[t] = tile->y[t] >= 0 ? term[t] : fill;
    }
  }
}

// Of one position: what `gradient_of_line` and `gradient_of_row` need
INLINE void gradient_at(int t, const Tile<T>* tile, Constants<T> c, Kept<T> kept, Terms<T> in,
                        Gradient<T>* out) {
  const bool has_class = tile->y[t] >= 0;
  const double w = tile->w_label[t], nll = kept.nll[t], high = kept.logsumexp[t];
  const double g_nll = has_class && w != 0 ? in.nll[t] * w : 0.;
  const double g_logsumexp = has_class && in.logsumexp ? in.logsumexp[t] : T(0);
  const double u = has_class && in.uniform_nll ? in.uniform_nll[t] / c.classes : 0.;
  const double of_p = g_logsumexp + (u == 0 ? 0. : u * c.total_weight);
  const Reference<T> ref = reference_of(kept.logsumexp[t]);
  const double scale = high == INFINITY ? 1. : exp_of<T>((log_reference_of(ref) - high) - kept.rest[t]);
  const double of_label = (of_p == 0 ? 0. : of_p * exp_of<T>(-nll)) - (u == 0 ? 0. : u * w);
  const double label = g_nll * expm1_of<T>(-nll) + of_label;
  out->shift[t] = ref.shift, out->k[t] = ref.k;
  out->q[t] = T(g_nll + of_p == 0 ? 0. : (g_nll + of_p) * scale);
  out->u[t] = T(u);
  out->at_label[t] = T(std::fabs(g_nll) + std::fabs(g_logsumexp) + std::fabs(u) == 0 ? 0. : label);
}

KERNEL void gradient_of_tile(const Tile<T>* tile, Constants<T> c, Kept<T> kept, Terms<T> in,
                             Gradient<T>* out) {
  if (in.logsumexp || in.uniform_nll) {
#pragma GCC ivdep
    for (int t = 0; t < tile->n; t++) gradient_at(t, tile, c, kept, in, out);
  } else {  // the same with constants for what there is not, in a quarter of the time
    const Terms<T> nll = {in.nll, nullptr, nullptr};
#pragma GCC ivdep
    for (int t = 0; t < tile->n; t++) gradient_at(t, tile, c, kept, nll, out);
  }
}
