/*
 * The facts that a call relies on of its arrays, for one call from Python.
 *
 * To ask MXNet from Python for each fact by itself takes longer than the loss of a small batch. The functions of
 * MXNet come from Python, as its library is loaded in a way that hides them from other libraries.
 */
#include <algorithm>
#include <cstdint>
#include <cstring>
#include <string>

namespace {

typedef void* Handle;

// As they are named in `signature.py`, in the same order. All return 0 if nothing fails.
struct MXNet {
  int (*context)(Handle, int* device_type, int* id);
  int (*dtype)(Handle, int*);
  int (*shape)(Handle, int* rank, const int** sizes);
  int (*is_recording)(bool*);
  int (*symbol)(Handle array, Handle* symbol);
  int (*attributes)(Handle symbol, uint32_t* pairs, const char*** names_and_values);
  int (*name)(Handle symbol, const char** name, int* is_named);
  int (*outputs)(Handle symbol, uint32_t* size, const char*** names);
  int (*atomic_symbol)(Handle symbol, Handle* atomic);
  int (*print)(Handle symbol, const char** text);
  int (*free_symbol)(Handle);
};
MXNet mxnet;

struct Symbol {
  Handle handle = nullptr;
  ~Symbol() {
    if (handle) mxnet.free_symbol(handle);
  }
};

// Operators without attributes that make a gradient of their own
const char* const kReaders[] = {"_copy", "broadcast_add", "dot", "_npi_add", "_np_dot"};

bool has_attributes(const Symbol& symbol) {
  uint32_t pairs = 0;
  const char** names;
  if (mxnet.attributes(symbol.handle, &pairs, &names)) return false;
  for (uint32_t i = 0; i < pairs; i++) {
    const std::string name = names[2 * i];
    if (name.compare(0, 2, "__") && name != "num_args") return true;
  }
  return false;
}

// The name of the operator that made an output. MXNet crashes if it is a variable.
std::string operator_of(const Symbol& symbol) {
  Symbol atomic;
  const char* text;
  if (mxnet.atomic_symbol(symbol.handle, &atomic.handle) || mxnet.print(atomic.handle, &text)) return "";
  const std::string printed = text;  // "AtomicFunctor  Op:dot\n"
  const size_t begin = printed.find("Op:") + 3;
  return printed.substr(begin, printed.find_first_of(" \n", begin) - begin);
}

// Whether `pred` needs an operator in front that can add into a gradient, as `fused._guarded` describes: unless it
// is known that another operator reads the gradient of `pred`. MXNet's elemwise_add and add_n hand their
// gradient array on, also to a variable. They have no attributes but num_args. A compiled graph has no attributes
// either, but its outputs have names of their own.
bool needs_guard(Handle pred) {
  bool is_recording = false;
  Symbol symbol;
  if (mxnet.is_recording(&is_recording) || !is_recording) return false;
  if (mxnet.symbol(pred, &symbol.handle)) return false;  // it is in no graph
  if (has_attributes(symbol)) return false;
  uint32_t size;
  const char *name, **outputs;
  int is_named;
  if (mxnet.name(symbol.handle, &name, &is_named) || mxnet.outputs(symbol.handle, &size, &outputs)) return true;
  const std::string output = outputs[0];
  if (output == name) return true;  // a variable
  if (output != std::string(name) + "_output") return false;
  return std::find(std::begin(kReaders), std::end(kReaders), operator_of(symbol)) == std::end(kReaders);
}

}  // namespace

extern "C" {

void stable_ce_use(const MXNet* functions) { mxnet = *functions; }

// Writes whether `pred` needs a guard, and for each array its context, dtype, rank and sizes. Returns whether
// MXNet tells them. `sample_weight` may be null.
bool stable_ce_signature(Handle pred, Handle label, Handle sample_weight, int* out) {
  int* next = out + 1;
  for (Handle array : {pred, label, sample_weight}) {
    if (!array) continue;
    int rank;
    const int* sizes;
    if (mxnet.context(array, next, next + 1) || mxnet.dtype(array, next + 2) ||
        mxnet.shape(array, &rank, &sizes) || rank < 0 || rank > 32) {
      return false;
    }
    next[3] = rank;
    next = std::copy_n(sizes, rank, next + 4);
  }
  *out = needs_guard(pred);
  return true;
}
}
