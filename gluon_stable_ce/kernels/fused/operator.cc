/*
 * Cross entropy in one operator: the class axis reduced to one number per position, and the gradient of that.
 *
 *   stable_ce_class_terms(pred, label[, class_weight]) -> nll[, logsumexp][, uniform_nll]
 *
 * Inputs:
 *   pred          (outer..., C at `axis`, inner...), float16, float32 or float64: the logits z
 *   label         (outer..., inner...), or with 1 at `axis`; any integers or floats
 *   class_weight  (C,), floats
 *
 * Attributes are those of `Options`. A label is valid if it is an integer in [0, C).
 *
 * Outputs, of (outer..., inner...), weighted by class and filled in where the label is invalid or ignored:
 *   nll           w_y times -log p_y, with p the softmax of z
 *   logsumexp     log sum_j exp z_j
 *   uniform_nll   -1/C sum_j w_j log p_j
 *
 * The symbols below, and their names in the code:
 *   z_j, z_y                             x, z_label
 *   y                                    y; where the label is no class, kInvalid or kIgnored
 *   w_j, w_y, sum_j w_j                  w, w_label, total_weight
 *   S = sum_{j != y} exp z_j             sum exp(log_reference)
 *   exp(shift) 2^k                       Reference, whose logarithm is log_reference
 *   L = log S - z_y                      log_odds
 *   d = log1p(exp(-|L|))                 distance
 *   nll = softplus(L) = max(L, 0) + d    nll
 *   logsumexp = max(log S, z_y) + d      high + rest: T rounds off up to 4e-6 at 80, which the gradient needs
 *   sum_j w_j (top - z_j)                gaps, with a `top` that no z_j exceeds
 *   the gradients that come in           g_nll, g_logsumexp, g_uniform_nll
 *   q exp(z - log_reference) - u w       q, u; at the label, at_label
 * The last is the gradient of z. It is the sum of these times what comes in: dnll/dz = w_y (p - onehot), with
 * p_y - 1 = expm1(-nll); dlogsumexp/dz = p; duniform_nll/dz = (p sum_j w_j - w) / C.
 *
 * What there is once per logit is computed in T: float for float16 and float32, double for float64. What
 * there is once per position is double.
 *
 * Numerics. nll = softplus(L) is as exact for p near 1 as for p near 0. exp(z) is computed as 2^n exp(r) with
 * |r| <= log(2) / 2, and the sums are scaled by 2^-k, with k from the largest logit so far. That subtracts no
 * logit from another, so it rounds no difference. For larger logits (`far`), n log(2) would be rounded. There
 * z - max is used in its place, which is exact wherever it matters.
 */
#include <algorithm>
#include <cfloat>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <memory>
#include <numeric>
#include <string>
#include <unordered_map>
#include <vector>

#include <sys/mman.h>

#include "exp_log.h"
#include "float16.h"
#include "mxnet/lib_api.h"
#include "threads.h"
#include "tile.h"

namespace {

// The loops for both types: the arguments of a call choose.
namespace for_float {
typedef float T;
#include "loops.h"
}  // namespace for_float
namespace for_double {
typedef double T;
#include "loops.h"
}  // namespace for_double
using namespace for_float;
using namespace for_double;

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

// MXNet asks the system for large arrays anew each time. In pages of 4 KB, getting them takes longer than
// filling them.
void ask_for_large_pages(void* data, size_t size) {
#ifdef MADV_HUGEPAGE
  const uintptr_t page = 1 << 21, begin = (reinterpret_cast<uintptr_t>(data) + page - 1) & -page;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(data) + size) & -page;
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
}

using mxnet::ext::MXTensor;
typedef std::unordered_map<std::string, std::string> Attributes;
typedef std::vector<MXTensor> Tensors;

// The attributes of the operator
struct Options {
  int axis = -1;
  bool has_ignore_label = false, clip = false;  // whether invalid labels become the nearest class
  int64_t ignore_label = 0;
  double fill_invalid = NAN, fill_ignored = 0;
  bool weighted = false, logsumexp = false, uniform = false;  // which inputs and outputs there are

  explicit Options(const Attributes& attributes) {
    for (const auto& attribute : attributes) {
      const std::string &name = attribute.first, &value = attribute.second;
      if (name == "axis") axis = std::stoi(value);
      else if (name == "ignore_label") has_ignore_label = true, ignore_label = std::stoll(value);
      else if (name == "clip") clip = value != "0";
      else if (name == "fill_invalid") fill_invalid = std::stod(value);
      else if (name == "fill_ignored") fill_ignored = std::stod(value);
      else if (name == "weighted") weighted = value != "0";
      else if (name == "logsumexp") logsumexp = value != "0";
      else if (name == "uniform") uniform = value != "0";
    }
  }
  int inputs() const { return 2 + weighted; }
  int outputs() const { return 1 + logsumexp + uniform; }
  int axis_of(size_t rank) const { return axis < 0 ? axis + int(rank) : axis; }
};

// Classes; kInvalid and kIgnored for labels that are none. double tells all from each other that matter: an
// integer up to 2^53 - 1, which is the limit of ignore_label, is no other one rounded.
template <typename L, typename Int>
void read_labels_as(const L* label, int n, const Options& options, int64_t classes, Int* y) {
  const double last = double(classes - 1), ignored = double(options.ignore_label);
  for (int t = 0; t < n; t++) {
    const double given = double(value(label[t]));
    const Int nearest = given >= 0 ? Int(given < last ? given : last) : Int(0);  // 0 for NaN
    const bool is_valid = options.clip || double(nearest) == given;
    y[t] = options.has_ignore_label && given == ignored ? kIgnored : is_valid ? nearest : kInvalid;
  }
}
template <typename Int>
void read_labels(MXTensor& label, const Part& part, const Options& options, int64_t classes, Int* y) {
#define READ(L) return read_labels_as(label.data<L>() + part.begin, part.n, options, classes, y)
  switch (label.dtype) {
    case mxnet::ext::kFloat64: READ(double);
    case mxnet::ext::kFloat32: READ(float);
    case mxnet::ext::kFloat16: READ(Half);
    case mxnet::ext::kInt64: READ(int64_t);
    case mxnet::ext::kInt32: READ(int32_t);
    case mxnet::ext::kInt8: READ(int8_t);
    default: READ(uint8_t);
  }
#undef READ
}

// The weights of the classes: 1 if none are given and uniform_nll needs them, and null if nothing does
template <typename T> class Weights {
  std::vector<T> copy;

  template <typename From> void read(const From* from) {
    for (size_t j = 0; j < copy.size(); j++) copy[j] = T(value(from[j]));
  }

 public:
  const T* w = nullptr;
  double total = 0;

  Weights(const Options& options, MXTensor* given, int64_t classes) {
    if (!given && !options.uniform) return;
    copy.assign(classes, T(1));
    if (given && given->dtype == mxnet::ext::kFloat16) read(given->data<Half>());
    else if (given && given->dtype == mxnet::ext::kFloat32) read(given->data<float>());
    else if (given) read(given->data<double>());
    w = copy.data();
    if (options.uniform) total = std::accumulate(copy.begin(), copy.end(), 0.);
  }
  // of the labels of a tile, (positions,)
  void of_labels(const Int<T>* y, int n, T* w_label) const {
    for (int t = 0; t < n; t++) w_label[t] = w && y[t] >= 0 ? w[y[t]] : T(1);
  }
};

// One class of all positions of a part: in place, or in `buffer`
template <typename S, typename T>
const T* load_line(const S* x, const Work& work, const Part& part, int64_t j, T* buffer) {
  if (work.lines_in_place) return load(x + part.at[0] + j * work.inner, part.n, buffer);
  for (int t = 0; t < part.n; t++) buffer[t] = value(x[part.at[t] + j * work.inner]);
  return buffer;
}

// Of the positions of a part, over some of their classes
struct Sums {
  double log_reference[kTile], sum[kTile];
  double top[kTile], gaps[kTile], weight;  // sum_j w_j (top - z_j), and sum_j w_j

  void clear(int n) {
    std::fill_n(log_reference, n, 0.);
    std::fill_n(sum, n, 0.);
    std::fill_n(top, n, -INFINITY);
    std::fill_n(gaps, n, 0.);
    weight = 0;
  }
  // Adds the gaps of other classes of a position, whose weights are `more_weight` in all.
  void add_gaps(int t, double more_top, double more, double more_weight) {
    const double next = std::max(top[t], more_top);
    gaps[t] += more + (weight == 0 ? 0. : weight * (next - top[t])) +
               (more_weight == 0 ? 0. : more_weight * (next - more_top));
    top[t] = next;
  }
  void add(const Sums& more, int n) {
    add_sums_of_tile(more.log_reference, more.sum, n, log_reference, sum);
    for (int t = 0; t < n; t++) add_gaps(t, more.top[t], more.gaps[t], more.weight);
    weight += more.weight;
  }
};

// The sum of exponentials of some classes of one position, read once
template <typename T> struct RunningSum {
  T largest = -INFINITY;
  Reference<T> ref = reference_of(largest);
  double sum = 0;

  void add(const T* x, int n) {
    const T most = largest_of_row(x, n);
    if (most > largest) {
      const Reference<T> next = reference_of(most);
      if (sum != 0) sum *= exp_of<double>(log_reference_of(ref) - log_reference_of(next));
      largest = most, ref = next;
    }
    sum += sum_exp_of_row(x, n, ref);
  }
};

template <typename S, typename T>
void add_row(const S* row, const T* w, const Part& part, int64_t y, int t, Sums* sums) {
  T buffer[kBlock];
  RunningSum<T> others;
  sums->weight = 0;
  for (int64_t j = part.j_begin; j < part.j_end; j += kBlock) {
    const int n = int(std::min<int64_t>(kBlock, part.j_end - j));
    const T* x = load(row + j, n, buffer);
    if (w) {
      const T top = std::max(largest_of_row(x, n), std::numeric_limits<T>::lowest());
      double weight;
      const double gaps = weighted_gaps_of_row(x, w + j, n, top, &weight);
      sums->add_gaps(t, top, gaps, weight);
      sums->weight += weight;
    }
    if (y < j || y >= j + n) {
      others.add(x, n);
    } else {  // but the label's
      if (y > j) others.add(x, int(y - j));
      if (y + 1 < j + n) others.add(x + (y + 1 - j), int(j + n - (y + 1)));
    }
  }
  sums->log_reference[t] = log_reference_of(others.ref);
  sums->sum[t] = others.sum;
}

// Some classes of all positions of a part. They are read once, into a buffer of their own: lines of images
// are often powers of 2 apart, and so few of them fit into a cache.
template <typename T> struct Lines {
  T x[kLines][kTile], largest[kTile];
  int n, classes;

  template <typename S> Lines(const S* pred, const Work& work, const Part& part, int64_t j_begin)
      : n(part.n), classes(int(std::min<int64_t>(kLines, part.j_end - j_begin))) {
    for (int j = 0; j < classes; j++) {
      const T* line = load_line(pred, work, part, j_begin + j, x[j]);
      if (line != x[j]) std::copy_n(line, n, x[j]);
    }
  }
  void find_largest(T least) {
    std::fill_n(largest, n, least);
    for (int j = 0; j < classes; j++) largest_of_line(x[j], n, largest);
  }
  void add_gaps(const T* w, Sums* sums) {
    double gaps[kTile], weight = 0;
    std::fill_n(gaps, n, 0.);
    find_largest(std::numeric_limits<T>::lowest());
    for (int j = 0; j < classes; j++) {
      if (w[j] != 0) weighted_gaps_of_line(x[j], w[j], n, largest, gaps);
      weight += w[j];
    }
    for (int t = 0; t < n; t++) sums->add_gaps(t, largest[t], gaps[t], weight);
    sums->weight += weight;
  }
  void add_exp(Sums* sums) {
    T shift[kTile], sum[kTile];
    Int<T> k[kTile];
    double log_reference[kTile];
    const int padded = (classes + kGroup - 1) / kGroup * kGroup;
    for (int j = classes; j < padded; j++) std::fill_n(x[j], n, T(-INFINITY));
    std::fill_n(sum, n, T(0));
    find_largest(T(-INFINITY));
    references_of_tile(largest, n, shift, k, log_reference);
    for (int j = 0; j < padded; j += kGroup) sum_exp_of_lines(x[j], n, shift, k, sum);
    add_sums_of_tile(log_reference, sum, n, sums->log_reference, sums->sum);
  }
};

template <typename S, typename T>
void add_lines(const S* pred, const T* w, const Work& work, const Part& part, const Int<T>* y, Sums* sums) {
  for (int64_t j_begin = part.j_begin; j_begin < part.j_end; j_begin += kLines) {
    Lines<T> lines(pred, work, part, j_begin);
    if (w) lines.add_gaps(w + j_begin, sums);
    for (int t = 0; t < part.n; t++) {
      const int64_t j = y[t] - j_begin;
      if (y[t] >= 0 && j >= 0 && j < lines.classes) lines.x[j][t] = -INFINITY;  // all but the label's
    }
    lines.add_exp(sums);
  }
}

template <typename S, typename T>
void reduce(const S* pred, const T* w, const Work& work, const Part& part, const Int<T>* y, Sums* sums) {
  sums->clear(part.n);
  if (std::all_of(y, y + part.n, [](Int<T> j) { return j < 0; })) return;
  if (!work.rows) return add_lines(pred, w, work, part, y, sums);
  for (int t = 0; t < part.n; t++) {
    if (y[t] >= 0) add_row(pred + part.at[t], w, part, y[t], t, sums);
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

// pred, label[, class_weight] -> nll[, logsumexp][, uniform_nll]
template <typename S, typename T>
void forward_as(const Options& options, Tensors& in, Tensors& out, std::vector<char>* state) {
  const Work work(in[0].shape, options.axis_of(in[0].shape.size()));
  const S* pred = in[0].data<S>();
  const Weights<T> weights(options, options.weighted ? &in[2] : nullptr, work.classes);
  const T* w = options.uniform ? weights.w : nullptr;  // of the gaps
  state->resize(3 * work.positions * sizeof(T));
  T* const kept = reinterpret_cast<T*>(state->data());
  std::unique_ptr<Sums[]> partial(work.splits > 1 ? new Sums[work.tiles * work.splits] : nullptr);

  const auto write = [&](const Part& part, const Int<T>* y, Sums* sums) {
    double z_label[kTile];
    T w_label[kTile];
    for (int t = 0; t < part.n; t++) {
      z_label[t] = y[t] < 0 ? 0. : double(value(pred[part.at[t] + y[t] * work.inner]));
    }
    weights.of_labels(y, part.n, w_label);
    restore_infinite(pred, work, part, sums);
    Terms<T> terms;
    terms.log_reference = sums->log_reference;
    terms.sum = sums->sum;
    terms.top = sums->top;
    terms.gaps = sums->gaps;
    terms.z_label = z_label;
    terms.w_label = w_label;
    terms.total_weight = weights.total;
    terms.classes = double(work.classes);
    terms.fill_invalid = T(options.fill_invalid);
    terms.fill_ignored = T(options.fill_ignored);
    terms.nll = out[0].data<T>() + part.begin;
    terms.logsumexp = options.logsumexp ? out[1].data<T>() + part.begin : nullptr;
    terms.uniform_nll = options.uniform ? out.back().data<T>() + part.begin : nullptr;
    terms.kept_nll = kept + part.begin;
    terms.kept_logsumexp = terms.kept_nll + work.positions;
    terms.kept_rest = terms.kept_logsumexp + work.positions;
    terms_of_tile(y, part.n, terms);
  };
  for_each(work.tiles * work.splits, work.positions * work.classes, [&](int64_t i) {
    const Part part(work, i / work.splits, i % work.splits);
    Int<T> y[kTile];
    read_labels(in[1], part, options, work.classes, y);
    if (partial) return reduce(pred, w, work, part, y, &partial[i]);
    Sums sums;
    reduce(pred, w, work, part, y, &sums);
    write(part, y, &sums);
  });
  if (!partial) return;
  for_each(work.tiles, work.positions * work.splits, [&](int64_t tile) {
    const Part part(work, tile, 0);
    Int<T> y[kTile];
    read_labels(in[1], part, options, work.classes, y);
    Sums& sums = partial[tile * work.splits];
    for (int64_t split = 1; split < work.splits; split++)
      sums.add(partial[tile * work.splits + split], part.n);
    write(part, y, &sums);
  });
}

template <typename S, typename T>
void write_row(const S* row, const T* w, const Part& part, const Gradient<T>& gradient, int t, S* out) {
  const T q = gradient.q[t], u = gradient.u[t];
  if (q == 0 && u == 0 && gradient.at_label[t] == 0) {  // whatever the logits are
    memset(static_cast<void*>(out + part.j_begin), 0, (part.j_end - part.j_begin) * sizeof(S));
    return;
  }
  T buffer[kBlock], result[kBlock];
  for (int64_t j = part.j_begin; j < part.j_end; j += kBlock) {
    const int n = int(std::min<int64_t>(kBlock, part.j_end - j));
    T* to = target(out + j, result);
    const Reference<T> ref = {gradient.shift[t], gradient.k[t]};
    gradient_of_row(load(row + j, n, buffer), w ? w + j : nullptr, n, ref, q, u, to);
    store(to, n, out + j);
  }
}

template <typename S, typename T> void write_lines(const S* pred, const T* w, const Work& work,
                                                   const Part& part, const Gradient<T>& gradient, S* out) {
  T buffer[kTile], result[kTile];
  for (int64_t j = part.j_begin; j < part.j_end; j++) {
    const T* x = load_line(pred, work, part, j, buffer);
    S* line = out + j * work.inner;
    T* to = work.lines_in_place ? target(line + part.at[0], result) : result;
    gradient_of_line(x, w ? w[j] : T(0), part.n, &gradient, to);
    if (work.lines_in_place) {
      store(to, part.n, line + part.at[0]);
    } else {
      for (int t = 0; t < part.n; t++) put(to[t], line + part.at[t]);
    }
  }
}

// gradients of the outputs, inputs, outputs -> gradients of the inputs
template <typename S, typename T>
void backward_as(const Options& options, Tensors& in, Tensors& out, const std::vector<char>& state) {
  static const T zeros[kTile] = {};
  MXTensor* const inputs = &in[options.outputs()];
  const Work work(inputs[0].shape, options.axis_of(inputs[0].shape.size()));
  const S* pred = inputs[0].data<S>();
  const T* const kept = reinterpret_cast<const T*>(state.data());
  S* to = out[0].data<S>();
  const Weights<T> weights(options, options.weighted ? &inputs[2] : nullptr, work.classes);
  const T* w = options.uniform ? weights.w : nullptr;  // of the gaps
  ask_for_large_pages(to, out[0].size() * sizeof(S));

  for_each(work.tiles * work.splits, work.positions * work.classes, [&](int64_t i) {
    const Part part(work, i / work.splits, i % work.splits);
    Int<T> y[kTile];
    T w_label[kTile];
    Gradient<T> gradient;
    read_labels(inputs[1], part, options, work.classes, y);
    weights.of_labels(y, part.n, w_label);
    Incoming<T> incoming;
    incoming.g_nll = in[0].data<T>() + part.begin;
    incoming.g_logsumexp = options.logsumexp ? in[1].data<T>() + part.begin : zeros;
    incoming.g_uniform_nll = options.uniform ? in[options.outputs() - 1].data<T>() + part.begin : zeros;
    incoming.nll = kept + part.begin;
    incoming.logsumexp = incoming.nll + work.positions;
    incoming.rest = incoming.logsumexp + work.positions;
    incoming.w_label = w_label;
    incoming.total_weight = weights.total;
    incoming.classes = double(work.classes);
    gradient_of_tile(y, part.n, incoming, &gradient);
    if (!work.rows) write_lines(pred, w, work, part, gradient, to);
    for (int t = 0; t < part.n; t++) {
      if (work.rows) write_row(pred + part.at[t], w, part, gradient, t, to + part.at[t]);
      if (y[t] >= part.j_begin && y[t] < part.j_end) {
        put(gradient.at_label[t], to + part.at[t] + y[t] * work.inner);
      }
    }
  });
}

mxnet::ext::MXReturnValue fail(const std::string& message) {
  MX_ERROR_MSG << message;
  return mxnet::ext::MX_FAIL;
}

mxnet::ext::MXReturnValue parse(const Attributes& attributes, int* num_in, int* num_out) {
  const Options options(attributes);
  *num_in = options.inputs();
  *num_out = options.outputs();
  return mxnet::ext::MX_SUCCESS;
}

bool is_float(int dtype) {
  return dtype == mxnet::ext::kFloat16 || dtype == mxnet::ext::kFloat32 || dtype == mxnet::ext::kFloat64;
}

mxnet::ext::MXReturnValue infer_type(const Attributes&, std::vector<int>* in, std::vector<int>* out) {
  const int pred = in->at(0);
  if (pred == -1) return mxnet::ext::MX_SUCCESS;
  const std::string got = ", got dtype ";
  if (!is_float(pred)) return fail("pred: expected float16, float32 or float64" + got + std::to_string(pred));
  const int terms = pred == mxnet::ext::kFloat64 ? pred : int(mxnet::ext::kFloat32);
  for (size_t i = 1; i < in->size(); i++) {
    int& type = in->at(i);
    if (type == -1) type = terms;
    const bool is_label = i == 1, is_accepted = is_float(type) || (is_label && type <= mxnet::ext::kInt64);
    if (!is_accepted) {
      return fail((is_label ? "label: expected integers or floats" : "class_weight: expected floats") + got +
                  std::to_string(type));
    }
  }
  std::fill(out->begin(), out->end(), terms);
  return mxnet::ext::MX_SUCCESS;
}

typedef std::vector<unsigned> Shape;
std::string text(const Shape& shape) {
  std::string sizes;
  for (unsigned size : shape) sizes += (sizes.empty() ? "" : ", ") + std::to_string(size);
  return "(" + sizes + (shape.size() == 1 ? ",)" : ")");
}

mxnet::ext::MXReturnValue infer_shape(const Attributes& attributes, std::vector<Shape>* in,
                                      std::vector<Shape>* out) {
  const Options options(attributes);
  const Shape& pred = in->at(0);
  const int axis = options.axis_of(pred.size());
  if (axis < 0 || axis >= int(pred.size())) {
    return fail("pred: expected an axis " + std::to_string(options.axis) + ", got shape " + text(pred));
  }
  Shape positions = pred, one_class = pred, &label = in->at(1);
  const Shape classes = {pred[axis]};
  one_class[axis] = 1;
  positions.erase(positions.begin() + axis);
  if (label.empty()) label = positions;
  if (label != positions && label != one_class) {
    return fail("label: expected shape " + text(positions) + " or " + text(one_class) + " for pred of " +
                text(pred) + ", got " + text(label));
  }
  if (options.weighted) {
    Shape& weight = in->at(2);
    if (weight.empty()) weight = classes;
    if (weight != classes) {
      return fail("class_weight: expected shape " + text(classes) + ", one weight per class, got " +
                  text(weight));
    }
  }
  std::fill(out->begin(), out->end(), positions);
  return mxnet::ext::MX_SUCCESS;
}

// One call of the operator in a graph. `state` is what forward leaves to backward: nll, logsumexp and rest,
// neither weighted nor filled in. MXNet takes longer for another output than the operator for a small call.
class ClassTerms : public mxnet::ext::CustomStatefulOp {
  const Options options;
  std::vector<char> state;  // (3, positions)

 public:
  explicit ClassTerms(const Attributes& attributes) : options(attributes) {}

  mxnet::ext::MXReturnValue Forward(Tensors* in, Tensors* out, const mxnet::ext::OpResource&) override {
    switch (in->at(0).dtype) {
      case mxnet::ext::kFloat16: forward_as<Half, float>(options, *in, *out, &state); break;
      case mxnet::ext::kFloat32: forward_as<float, float>(options, *in, *out, &state); break;
      default: forward_as<double, double>(options, *in, *out, &state);
    }
    return mxnet::ext::MX_SUCCESS;
  }
  mxnet::ext::MXReturnValue Backward(Tensors* in, Tensors* out, const mxnet::ext::OpResource&) override {
    static const size_t sizes[] = {4, 8, 2, 1, 4, 1, 8};  // of a number, by dtype
    for (size_t i = 1; i < out->size(); i++) {            // label and class_weight have no gradient
      memset(out->at(i).data_ptr, 0, out->at(i).size() * sizes[out->at(i).dtype]);
    }
    switch (out->at(0).dtype) {
      case mxnet::ext::kFloat16: backward_as<Half, float>(options, *in, *out, state); break;
      case mxnet::ext::kFloat32: backward_as<float, float>(options, *in, *out, state); break;
      default: backward_as<double, double>(options, *in, *out, state);
    }
    return mxnet::ext::MX_SUCCESS;
  }
};

mxnet::ext::MXReturnValue create(const Attributes& attributes, const mxnet::ext::MXContext&,
                                 const std::vector<Shape>&, const std::vector<int>,
                                 mxnet::ext::CustomStatefulOp** op) {
  *op = mxnet::ext::CustomStatefulOp::create<ClassTerms>(attributes);
  return mxnet::ext::MX_SUCCESS;
}

REGISTER_OP(stable_ce_class_terms)
    .setCreateOpState(create, "cpu")
    .setParseAttrs(parse)
    .setInferType(infer_type)
    .setInferShape(infer_shape);

}  // namespace

mxnet::ext::MXReturnValue initialize(int version) {
  if (version >= 10900 && version < 11000) return mxnet::ext::MX_SUCCESS;
  return fail("expected MXNet 1.9");
}
