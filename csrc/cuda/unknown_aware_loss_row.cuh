// A row of the unknown-aware loss: what its classes give (an online softmax), its loss, and its gradient. Shared by the
// kernels of unknown_aware_loss.cu.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <climits>
#include <cmath>
#include <cstdint>

namespace uasparse {
namespace {

constexpr unsigned kAll = 0xffffffffu;
constexpr double kLeastKnown = 1e-7;  // 1 - u is at least this

__device__ inline float to_acc(float x) { return x; }
__device__ inline double to_acc(double x) { return x; }
__device__ inline float to_acc(__half x) { return __half2float(x); }
__device__ inline float to_acc(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ inline void assign(float& to, float x) { to = x; }
__device__ inline void assign(double& to, double x) { to = x; }
__device__ inline void assign(__half& to, float x) { to = __float2half(x); }
__device__ inline void assign(__nv_bfloat16& to, float x) { to = __float2bfloat16(x); }
__device__ inline float log_of(float x) { return logf(x); }
__device__ inline double log_of(double x) { return log(x); }
__device__ inline double exp_of(double x) { return exp(x); }
__device__ inline float exp_of(float x) { return expf(x); }

// Of the classes of a row of T: for 16-bit logits, which memory brings twice as fast, an exponential of three instructions;
// its error, 1e-7 near 0 and 7e-6 at -87, is far below their rounding.
template <typename T>
__device__ inline float exp_for(float x) {
  return sizeof(T) == 2 ? __expf(x) : expf(x);
}
template <typename T>
__device__ inline double exp_for(double x) {
  return exp(x);
}

template <typename Acc>
__device__ inline Acc minus_infinity() {
  return -static_cast<Acc>(INFINITY);
}

// Online softmax over some known classes: maximum, the first index that has it, and sum of exp(z - maximum).
template <typename Acc>
struct State {
  Acc max, sum;
  int first;
};

template <typename Acc>
__device__ inline State<Acc> nothing_seen() {
  return {minus_infinity<Acc>(), 0, INT_MAX};
}

// Takes in the classes j, j + stride and so on; -inf stands for none. Later calls bring higher indices.
template <typename T, int kCount, typename Acc>
__device__ inline void add(State<Acc>& state, const Acc (&z)[kCount], int j, int stride) {
  Acc max = state.max;
#pragma unroll
  for (int i = 0; i < kCount; ++i) max = z[i] > max ? z[i] : max;
  if (max > state.max) {
    state.sum *= exp_of(state.max - max);
    state.max = max;
#pragma unroll
    for (int i = kCount - 1; i >= 0; --i)
      if (z[i] == max) state.first = j + i * stride;
  }
  if (max == minus_infinity<Acc>()) {  // NaN comes here, and stays
#pragma unroll
    for (int i = 0; i < kCount; ++i)
      if (z[i] != max) state.sum += z[i];
    return;
  }
#pragma unroll
  for (int i = 0; i < kCount; ++i) state.sum += exp_for<T>(z[i] - max);
}

template <typename Acc>
__device__ inline State<Acc> combine(State<Acc> a, State<Acc> b) {
  if (b.max > a.max || (b.max == a.max && b.first < a.first)) {
    const State<Acc> swapped = a;
    a = b;
    b = swapped;
  }
  // Where b has seen nothing but -inf its sum is 0 (or NaN), to be added as it is.
  a.sum += b.max == minus_infinity<Acc>() ? b.sum : b.sum * exp_of(b.max - a.max);
  return a;
}

// The state of kLanes neighbouring lanes, in each of them.
template <int kLanes, typename Acc>
__device__ inline State<Acc> combine_lanes(State<Acc> state) {
  for (int step = kLanes / 2; step > 0; step /= 2) {
    State<Acc> other;
    other.max = __shfl_xor_sync(kAll, state.max, step);
    other.sum = __shfl_xor_sync(kAll, state.sum, step);
    other.first = __shfl_xor_sync(kAll, state.first, step);
    state = combine(state, other);
  }
  return state;
}

// What a row's target is, and its logits there and at the unknown class.
template <typename Acc>
struct Target {
  int target, unknown;
  Acc z, z_unknown;
};

// Loss, share of the threshold, and what a backward needs: the softmax is exp(z - base) / |sum|, and the sum is negative
// for a right prediction.
template <typename Acc>
struct Row {
  Acc loss, threshold, base, sum;
};

template <typename Acc>
__device__ inline Row<Acc> finish_row(const Target<Acc>& at, State<Acc> state, Acc alpha, Acc unknown_weight) {
  const Acc z_unknown = at.z_unknown, others_max = state.max;
  const Acc max = z_unknown > others_max ? z_unknown : others_max;
  const Acc base = max == minus_infinity<Acc>() ? Acc(0) : max;
  const Acc others = others_max == minus_infinity<Acc>() ? state.sum : state.sum * exp_of(others_max - base);
  const Acc unknown_share = exp_of(z_unknown - base);
  const Acc sum = others + unknown_share;  // NaN where the maximum is +inf, as in torch
  const Acc h = (base - at.z) + log_of(sum);
  if (at.target == at.unknown) return {unknown_weight * h, Acc(0), base, sum};
  const bool correct = state.first == at.target && !(z_unknown > others_max);
  const Acc share = others / sum, known = share < Acc(kLeastKnown) ? Acc(kLeastKnown) : share;
  // u too without cancellation: a large alpha meets a small u.
  const Acc p = unknown_share / sum, u = p > Acc(1 - kLeastKnown) ? Acc(1 - kLeastKnown) : p;
  const Acc w = correct ? Acc(1) : 1 + alpha / (1 + alpha * u);
  return {w * h, known * h, base, correct ? -sum : sum};
}

// The gradient of class j is scale * exp(z[j] - base), less at_target for the target, and more at_unknown for unknown.
template <typename Acc>
struct Gradient {
  Acc base, scale, at_target, at_unknown;
};

// g: the gradient of the row's loss.
template <typename Acc>
__device__ inline Gradient<Acc> gradient_of(const Target<Acc>& at, Acc base, Acc signed_sum, Acc alpha,
                                            Acc unknown_weight, Acc g) {
  constexpr Acc largest = Acc(1 - kLeastKnown);
  const Acc sum = signed_sum < 0 ? -signed_sum : signed_sum;
  Acc w = unknown_weight, through_u = 0;
  if (at.target != at.unknown) {
    w = 1;
    if (!(signed_sum < 0)) {
      const Acc h = (base - at.z) + log_of(sum), p = exp_of(at.z_unknown - base) / sum;
      const Acc u = p < largest ? p : largest, slope = alpha / (1 + alpha * u);
      w += slope;
      // At the clamp the gradient stops; where h is infinite, w counts as a constant (the loss says enough).
      if (u < largest && h != static_cast<Acc>(INFINITY)) through_u = -h * slope * slope * u;
    }
  }
  return {base, g * (w - through_u) / sum, g * w, g * through_u};
}

// The gradients of the classes j, j + stride and so on.
template <typename T, int kCount, typename Acc>
__device__ inline void to_gradients(Acc (&z)[kCount], int j, int stride, const Gradient<Acc>& row, int target,
                                    int unknown) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    const int class_i = j + i * stride;
    z[i] = row.scale * exp_for<T>(z[i] - row.base);
    if (class_i == target) z[i] -= row.at_target;
    if (class_i == unknown) z[i] += row.at_unknown;
  }
}

// A row of 16-byte chunks, with single classes before and after them: rows of odd length begin anywhere.
template <typename T>
struct alignas(16) Chunk {
  static constexpr int kCount = 16 / sizeof(T);
  T at[kCount];
};

template <typename T>
struct Span {
  int head, chunks, classes;  // the chunks hold classes head to head + chunks * kCount; unknown is never in them
  // `grad` (or null): written by chunks too, if it lies to the 16-byte boundaries as the logits do.
  __device__ Span(const T* z, const T* grad, int classes) : classes(classes) {
    constexpr int kCount = Chunk<T>::kCount;
    const uintptr_t at = reinterpret_cast<uintptr_t>(z), to = reinterpret_cast<uintptr_t>(grad);
    const int past = static_cast<int>(at / sizeof(T) % kCount), known = classes - 1;
    head = (kCount - past) % kCount;
    if (head > known || (grad != nullptr && at % 16 != to % 16)) head = known;
    chunks = (known - head) / kCount;
  }
  __device__ int singles() const { return classes - chunks * Chunk<T>::kCount; }
  __device__ int single(int i) const { return i < head ? i : i + chunks * Chunk<T>::kCount; }
  __device__ int chunk_begin(int c) const { return head + c * Chunk<T>::kCount; }
};

}  // namespace
}  // namespace uasparse
