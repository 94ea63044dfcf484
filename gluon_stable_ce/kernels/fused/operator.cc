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
#include <type_traits>
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
const int kLines = 64;  // classes of kTile positions that fit into the second cache

// Logits are (outer, C, inner). Many classes next to each other are `rows`, read along the classes; all else
// is read in lines, one class of many positions. The cut depends on the shape alone, so the results do not on
// the number of threads.
struct Work {
  int64_t classes, inner = 1, positions;
  bool rows, lines_in_place;
  int64_t segment, tile, tiles_per_segment, tiles;  // no tile is in two segments of positions
  int64_t split, splits;                            // of the classes

  Work(const std::vector<int64_t>& shape, int axis) : classes(shape[axis]) {
    int64_t outer = 1;
    for (int i = 0; i < axis; i++) outer *= shape[i];
    for (size_t i = axis + 1; i < shape.size(); i++) inner *= shape[i];
    positions = outer * inner;
    rows = inner == 1 && classes > 64;
    lines_in_place = inner >= 64;
    segment = lines_in_place ? inner : positions;
    tile = rows ? std::max<int64_t>(1, std::min<int64_t>(kTile, 16384 / classes)) : kTile;
    tiles_per_segment = ceil(segment, tile);
    tiles = (lines_in_place ? outer : 1) * tiles_per_segment;
    split = rows ? kRowSplit : kLineSplit;
    splits = ceil(classes, split);
  }
  static int64_t ceil(int64_t a, int64_t b) { return (a + b - 1) / b; }
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

using mxnet::ext::MXReturnValue;
using mxnet::ext::MXTensor;
typedef std::unordered_map<std::string, std::string> Attributes;
typedef std::vector<MXTensor> Tensors;

// Calls `f` with the numbers of a tensor.
template <typename F> void with_floats(MXTensor& tensor, F f) {
  switch (tensor.dtype) {
    case mxnet::ext::kFloat64: return f(tensor.data<double>());
    case mxnet::ext::kFloat32: return f(tensor.data<float>());
    default: return f(tensor.data<Half>());
  }
}
template <typename F> void with_numbers(MXTensor& tensor, F f) {
  switch (tensor.dtype) {
    case mxnet::ext::kInt64: return f(tensor.data<int64_t>());
    case mxnet::ext::kInt32: return f(tensor.data<int32_t>());
    case mxnet::ext::kInt8: return f(tensor.data<int8_t>());
    case mxnet::ext::kUint8: return f(tensor.data<uint8_t>());
    default: return with_floats(tensor, f);
  }
}

// The attributes of the operator
struct Options {
  int axis = -1;
  double ignore_label = NAN;  // NaN is equal to no label
  double fill_invalid = NAN, fill_ignored = 0;
  bool clip = false;  // whether invalid labels become the nearest class
  bool weighted = false, logsumexp = false, uniform = false;  // which inputs and outputs there are

  explicit Options(const Attributes& attributes) {
    for (const auto& attribute : attributes) {
      const std::string &name = attribute.first, &value = attribute.second;
      if (name == "axis") axis = std::stoi(value);
      else if (name == "ignore_label") ignore_label = std::stod(value);
      else if (name == "fill_invalid") fill_invalid = std::stod(value);
      else if (name == "fill_ignored") fill_ignored = std::stod(value);
      else if (name == "clip") clip = value != "0";
      else if (name == "weighted") weighted = value != "0";
      else if (name == "logsumexp") logsumexp = value != "0";
      else if (name == "uniform") uniform = value != "0";
    }
  }
  int outputs() const { return 1 + logsumexp + uniform; }
  int axis_of(size_t rank) const { return axis < 0 ? axis + int(rank) : axis; }
};

// Adds the gaps of more classes of a position, whose weights are `more_weight` in all.
void add_gaps(int t, double more_top, double more, double more_weight, Sums* sums) {
  const double top = std::max(sums->top[t], more_top), weight = sums->weight;
  sums->gaps[t] += more + (weight == 0 ? 0. : weight * (top - sums->top[t])) +
                   (more_weight == 0 ? 0. : more_weight * (top - more_top));
  sums->top[t] = top;
}

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

// Logits in S, and what is computed of them in T. `state` is what forward leaves to backward.
template <typename S> class Reduction {
  typedef typename std::conditional<std::is_same<S, double>::value, double, float>::type T;
  const Options& options;
  MXTensor* const inputs;
  const Work work;
  const S* const pred;
  std::vector<char>& state;  // (3, positions)
  std::vector<T> weights;    // (C,); empty if no class has one, and no term needs them
  Constants<T> constants;

 public:
  Reduction(const Options& options, MXTensor* inputs, std::vector<char>& state)
      : options(options), inputs(inputs), work(inputs->shape, options.axis_of(inputs->shape.size())),
        pred(inputs->data<S>()), state(state) {
    if (options.weighted || options.uniform) weights.assign(work.classes, T(1));
    if (options.weighted) with_floats(inputs[2], [&](const auto* given) {
      for (size_t j = 0; j < weights.size(); j++) weights[j] = T(value(given[j]));
    });
    constants.total_weight = options.uniform ? std::accumulate(weights.begin(), weights.end(), 0.) : 0;
    constants.classes = double(work.classes);
    constants.fill_invalid = T(options.fill_invalid);
    constants.fill_ignored = T(options.fill_ignored);
  }

  // -> nll[, logsumexp][, uniform_nll]
  void forward(Tensors& out) {
    state.resize(3 * work.positions * sizeof(T));
    std::unique_ptr<Sums[]> partial(work.splits > 1 ? new Sums[work.tiles * work.splits] : nullptr);
    for_each(work.tiles * work.splits, work.positions * work.classes, [&](int64_t i) {
      const Tile<T> tile = tile_at(i / work.splits, i % work.splits);
      if (partial) return reduce(tile, &partial[i]);
      Sums sums;
      reduce(tile, &sums);
      write_terms(tile, &sums, out);
    });
    if (!partial) return;
    for_each(work.tiles, work.positions * work.splits, [&](int64_t i) {
      const Tile<T> tile = tile_at(i, 0);
      Sums* const sums = &partial[i * work.splits];
      for (int64_t split = 1; split < work.splits; split++) add_split(tile, sums[split], sums);
      write_terms(tile, sums, out);
    });
  }

  // Gradients of the terms -> the gradient of the logits
  void backward(Tensors& g_terms, S* out) {
    ask_for_large_pages(out, work.positions * work.classes * sizeof(S));
    for_each(work.tiles * work.splits, work.positions * work.classes, [&](int64_t i) {
      const Tile<T> tile = tile_at(i / work.splits, i % work.splits);
      Gradient<T> gradient;
      gradient_of_tile(&tile, constants, kept_of(tile), terms_of(tile, g_terms), &gradient);
      if (!work.rows) write_lines(tile, gradient, out);
      for (int t = 0; t < tile.n; t++) {
        if (work.rows) write_row(tile, gradient, t, out + tile.at[t]);
        const bool has_label = tile.y[t] >= tile.j_begin && tile.y[t] < tile.j_end;
        if (has_label) put(gradient.at_label[t], out + tile.at[t] + tile.y[t] * work.inner);
      }
    });
  }

 private:
  Tile<T> tile_at(int64_t index, int64_t split) const {
    Tile<T> tile;
    const int64_t i = index % work.tiles_per_segment * work.tile;
    tile.begin = index / work.tiles_per_segment * work.segment + i;
    tile.n = int(std::min(work.tile, work.segment - i));
    tile.j_begin = split * work.split;
    tile.j_end = std::min(work.classes, tile.j_begin + work.split);
    int64_t in_line = tile.begin % work.inner, at = (tile.begin - in_line) * work.classes + in_line;
    for (int t = 0; t < tile.n; t++, at++) {
      tile.at[t] = at;
      if (++in_line == work.inner) in_line = 0, at += (work.classes - 1) * work.inner;
    }
    read_labels(&tile);
    return tile;
  }

  // double tells all labels from each other that matter: an integer up to 2^53 - 1, which is the limit of
  // ignore_label, is no other one rounded.
  void read_labels(Tile<T>* tile) const {
    const double last = constants.classes - 1;
    with_numbers(inputs[1], [&](const auto* label) {
      for (int t = 0; t < tile->n; t++) {
        const double given = double(value(label[tile->begin + t]));
        const Int<T> nearest = given >= 0 ? Int<T>(given < last ? given : last) : 0;  // 0 for NaN
        const bool is_valid = options.clip || double(nearest) == given;
        tile->y[t] = given == options.ignore_label ? kIgnored : is_valid ? nearest : kInvalid;
      }
    });
    std::fill_n(tile->w_label, tile->n, T(1));
    if (!options.weighted) return;
    for (int t = 0; t < tile->n; t++) {
      if (tile->y[t] >= 0) tile->w_label[t] = weights[tile->y[t]];
    }
  }

  Kept<T> kept_of(const Tile<T>& tile) const {
    T* const nll = reinterpret_cast<T*>(state.data()) + tile.begin;
    return {nll, nll + work.positions, nll + 2 * work.positions};
  }

  Terms<T> terms_of(const Tile<T>& tile, Tensors& tensors) const {
    const auto at = [&](int i) { return tensors[i].template data<T>() + tile.begin; };
    return {at(0), options.logsumexp ? at(1) : nullptr,
            options.uniform ? at(options.outputs() - 1) : nullptr};
  }

  // Forward

  void reduce(const Tile<T>& tile, Sums* sums) const {
    for (double* zeros : {sums->log_reference, sums->sum, sums->z_label, sums->gaps}) {
      std::fill_n(zeros, tile.n, 0);
    }
    std::fill_n(sums->top, tile.n, -INFINITY);
    sums->weight = 0;
    if (std::all_of(tile.y, tile.y + tile.n, [](Int<T> y) { return y < 0; })) return;
    if (!work.rows) return add_lines(tile, sums);
    for (int t = 0; t < tile.n; t++) {
      if (tile.y[t] >= 0) add_row(tile, t, sums);
    }
  }

  void add_row(const Tile<T>& tile, int t, Sums* sums) const {
    T buffer[kBlock];
    RunningSum<T> others;
    sums->weight = 0;
    for (int64_t j = tile.j_begin; j < tile.j_end; j += kBlock) {
      const int n = int(std::min<int64_t>(kBlock, tile.j_end - j));
      const int64_t y = tile.y[t] - j;
      const T* x = load(pred + tile.at[t] + j, n, buffer);
      if (options.uniform) {
        const T top = std::max(largest_of_row(x, n), std::numeric_limits<T>::lowest());
        double weight;
        const double gaps = weighted_gaps_of_row(x, &weights[j], n, top, &weight);
        add_gaps(t, top, gaps, weight, sums);
        sums->weight += weight;
      }
      if (y < 0 || y >= n) {
        others.add(x, n);
      } else {  // but the label's
        sums->z_label[t] = x[y];
        if (y > 0) others.add(x, int(y));
        if (y + 1 < n) others.add(x + y + 1, int(n - (y + 1)));
      }
    }
    sums->log_reference[t] = log_reference_of(others.ref);
    sums->sum[t] = others.sum;
  }

  // They are read once, into a buffer: lines of images are often powers of 2 apart, and so few of them fit
  // into a cache.
  void add_lines(const Tile<T>& tile, Sums* sums) const {
    T x[kLines][kTile];
    double log_reference[kTile], sum[kTile];
    for (int64_t j = tile.j_begin; j < tile.j_end; j += kLines) {
      const int classes = int(std::min<int64_t>(kLines, tile.j_end - j));
      for (int i = 0; i < classes; i++) {
        const T* line = load_line(tile, j + i, x[i]);
        if (line != x[i]) std::copy_n(line, tile.n, x[i]);
      }
      if (options.uniform) add_gaps_of_lines(x, classes, tile.n, &weights[j], sums);
      for (int t = 0; t < tile.n; t++) {
        const int64_t y = tile.y[t] - j;
        if (y < 0 || y >= classes) continue;
        sums->z_label[t] = x[y][t];
        x[y][t] = -INFINITY;  // all but the label's
      }
      sum_exp_of_lines(x, classes, tile.n, log_reference, sum);
      add_sums_of_tile(&tile, log_reference, sum, sums);
    }
  }

  static void add_gaps_of_lines(const T (*x)[kTile], int classes, int n, const T* w, Sums* sums) {
    T top[kTile];
    double gaps[kTile];
    std::fill_n(top, n, std::numeric_limits<T>::lowest());
    largest_of_lines(x, classes, n, top);
    weighted_gaps_of_lines(x, w, classes, n, top, gaps);
    const double weight = std::accumulate(w, w + classes, 0.);
    for (int t = 0; t < n; t++) add_gaps(t, top[t], gaps[t], weight, sums);
    sums->weight += weight;
  }

  static void add_split(const Tile<T>& tile, const Sums& more, Sums* sums) {
    add_sums_of_tile(&tile, more.log_reference, more.sum, sums);
    for (int t = 0; t < tile.n; t++) {
      add_gaps(t, more.top[t], more.gaps[t], more.weight, sums);
      sums->z_label[t] += more.z_label[t];  // which is 0 in all parts but one
    }
    sums->weight += more.weight;
  }

  void write_terms(const Tile<T>& tile, Sums* sums, Tensors& out) const {
    for (int t = 0; t < tile.n; t++) {
      if (sums->log_reference[t] == INFINITY) sums->sum[t] = nan_or_1(pred + tile.at[t]);
    }
    terms_of_tile(&tile, sums, constants, kept_of(tile), terms_of(tile, out));
  }

  // inf - inf made a NaN of every sum with a logit of inf in it; but the sum is infinite, if no logit is NaN
  double nan_or_1(const S* x) const {
    for (int64_t j = 0; j < work.classes; j++) {
      if (std::isnan(value(x[j * work.inner]))) return NAN;
    }
    return 1;
  }

  // Backward

  void write_row(const Tile<T>& tile, const Gradient<T>& gradient, int t, S* out) const {
    const T q = gradient.q[t], u = gradient.u[t];
    if (q == 0 && u == 0 && gradient.at_label[t] == 0) {  // whatever the logits are
      memset(static_cast<void*>(out + tile.j_begin), 0, (tile.j_end - tile.j_begin) * sizeof(S));
      return;
    }
    const Reference<T> ref = {gradient.shift[t], gradient.k[t]};
    T buffer[kBlock], result[kBlock];
    for (int64_t j = tile.j_begin; j < tile.j_end; j += kBlock) {
      const int n = int(std::min<int64_t>(kBlock, tile.j_end - j));
      T* const to = target(out + j, result);
      gradient_of_row(load(pred + tile.at[t] + j, n, buffer), weights.data() + j, n, ref, q, u, to);
      store(to, n, out + j);
    }
  }

  void write_lines(const Tile<T>& tile, const Gradient<T>& gradient, S* out) const {
    T buffer[kTile], result[kTile];
    for (int64_t j = tile.j_begin; j < tile.j_end; j++) {
      const T w = options.uniform ? weights[j] : T(0);
      gradient_of_line(load_line(tile, j, buffer), w, tile.n, &gradient, result);
      store_line(result, tile, out + j * work.inner);
    }
  }

  void store_line(const T* line, const Tile<T>& tile, S* out) const {
    if (work.lines_in_place) return store(line, tile.n, out + tile.at[0]);
    for (int t = 0; t < tile.n; t++) put(line[t], out + tile.at[t]);
  }

  // One class of the tile's positions: in place, or in `buffer`
  const T* load_line(const Tile<T>& tile, int64_t j, T* buffer) const {
    const S* const x = pred + j * work.inner;
    if (work.lines_in_place) return load(x + tile.at[0], tile.n, buffer);
    for (int t = 0; t < tile.n; t++) buffer[t] = value(x[tile.at[t]]);
    return buffer;
  }
};

MXReturnValue fail(const std::string& message) {
  MX_ERROR_MSG << message;
  return mxnet::ext::MX_FAIL;
}

MXReturnValue parse(const Attributes& attributes, int* num_in, int* num_out) {
  const Options options(attributes);
  *num_in = 2 + options.weighted;
  *num_out = options.outputs();
  return mxnet::ext::MX_SUCCESS;
}

MXReturnValue infer_type(const Attributes&, std::vector<int>* in, std::vector<int>* out) {
  static const char* const expected[] = {"pred: expected float16, float32 or float64",
                                         "label: expected integers or floats",
                                         "class_weight: expected floats"};
  const int pred = in->at(0), terms = pred == mxnet::ext::kFloat64 ? pred : int(mxnet::ext::kFloat32);
  if (pred == -1) return mxnet::ext::MX_SUCCESS;
  for (size_t i = 0; i < in->size(); i++) {
    int& type = in->at(i);
    if (type == -1) type = terms;
    const int last = i == 1 ? mxnet::ext::kInt64 : mxnet::ext::kFloat16;  // floats come first, then integers
    if (type > last) return fail(std::string(expected[i]) + ", got dtype " + std::to_string(type));
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

MXReturnValue infer_shape(const Attributes& attributes, std::vector<Shape>* in, std::vector<Shape>* out) {
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
  if (options.weighted && in->at(2).empty()) in->at(2) = classes;
  if (options.weighted && in->at(2) != classes) {
    return fail("class_weight: expected shape " + text(classes) + ", one weight per class, got " +
                text(in->at(2)));
  }
  std::fill(out->begin(), out->end(), positions);
  return mxnet::ext::MX_SUCCESS;
}

// One call of the operator in a graph. `state` is what forward leaves to backward: MXNet takes longer for
// another output than the operator for a small call.
class ClassTerms : public mxnet::ext::CustomStatefulOp {
  const Options options;
  std::vector<char> state;

 public:
  explicit ClassTerms(const Attributes& attributes) : options(attributes) {}

  // pred, label[, class_weight]
  MXReturnValue Forward(Tensors* in, Tensors* out, const mxnet::ext::OpResource&) override {
    with_floats(in->at(0), [&](auto* pred) { reduction_of(pred, &in->at(0)).forward(*out); });
    return mxnet::ext::MX_SUCCESS;
  }

  // gradients of the outputs, inputs, outputs -> gradients of the inputs
  MXReturnValue Backward(Tensors* in, Tensors* out, const mxnet::ext::OpResource&) override {
    MXTensor* const inputs = &in->at(options.outputs());
    with_floats(out->at(0), [&](auto* to) { reduction_of(to, inputs).backward(*in, to); });
    for (size_t i = 1; i < out->size(); i++) {  // label and class_weight have no gradient
      MXTensor& zero = out->at(i);
      with_numbers(zero, [&](auto* to) { memset(to, 0, zero.size() * sizeof(*to)); });
    }
    return mxnet::ext::MX_SUCCESS;
  }

 private:
  template <typename S> Reduction<S> reduction_of(const S*, MXTensor* inputs) {
    return Reduction<S>(options, inputs, state);
  }
};

MXReturnValue create(const Attributes& attributes, const mxnet::ext::MXContext&, const std::vector<Shape>&,
                     const std::vector<int>, mxnet::ext::CustomStatefulOp** op) {
  *op = mxnet::ext::CustomStatefulOp::create<ClassTerms>(attributes);
  return mxnet::ext::MX_SUCCESS;
}

REGISTER_OP(stable_ce_class_terms)
    .setCreateOpState(create, "cpu")
    .setParseAttrs(parse)
    .setInferType(infer_type)
    .setInferShape(infer_shape);

}  // namespace

MXReturnValue initialize(int version) {
  if (version >= 10900 && version < 11000) return mxnet::ext::MX_SUCCESS;
  return fail("expected MXNet 1.9");
}
