// The loss and its gradient, row by row (uasparse_kernels/ops/unknown_aware_loss.py has the formula), for one instruction
// set (isa.h).
//
// A row is read once from memory: in chunks that stay in the L1 cache, a chunk's maximum and then its sum of
// exponentials, the sum so far being rescaled when the maximum rises (online softmax). For the backward a row leaves its
// maximum and its sum, the sign of the sum saying whether the prediction was right (negative: right).

#include "cpu/vec.h"

namespace uasparse::UASPARSE_ISA {

using Floats = Vec<float>;
using Ints = Vec<int32_t>;
constexpr int kFloats = kLanes<float>;

// The first n < kFloats floats, the rest -inf.
UASPARSE_INLINE Floats load_tail(const float* from, int64_t n, const float* end) {
  float padded[kFloats];
  Ints lane;
  for (int i = 0; i < kFloats; ++i) lane[i] = i;
  if (from + kFloats <= end) {
    __builtin_memcpy(padded, from, sizeof padded);
  } else {
    for (int64_t i = 0; i < kFloats; ++i) padded[i] = i < n ? from[i] : 0;
  }
  return lane < static_cast<int32_t>(n) ? load<float>(padded) : broadcast(-__builtin_inff());
}

// exp(r) for |r| <= ln(2) / 2, by Taylor's polynomial of degree 7 (its remainder is 5e-9).
UASPARSE_INLINE Floats exp_small(Floats r) {
  Floats p = broadcast(1.0f / 5040);
  p = p * r + 1.0f / 720;
  p = p * r + 1.0f / 120;
  p = p * r + 1.0f / 24;
  p = p * r + 1.0f / 6;
  p = p * r + 0.5f;
  p = p * r + 1.0f;
  return p * r + 1.0f;
}

// exp(x) for x <= 0 to about one unit in the last place: 2^n * exp(r). Far below, the result is 0; NaN stays NaN.
UASPARSE_INLINE Floats exp_nonpositive(Floats x) {
  constexpr float log2_e = 1.44269504f, ln2_high = 0.693359375f, ln2_low = -2.12194440e-4f;  // high: exact in few bits
#ifdef UASPARSE_ISA_AVX512  // masked with all ones: GCC 12 takes the plain intrinsics for uninitialised
  const Floats clamped = _mm512_maskz_max_ps(0xffff, broadcast(-110.0f), x);  // of a NaN it takes the second
  const Floats n = _mm512_maskz_roundscale_ps(0xffff, clamped * log2_e, 0);
  return _mm512_maskz_scalef_ps(0xffff, exp_small(clamped - n * ln2_high - n * ln2_low), n);
#else
  const float lowest = -87.3f;  // exp's normal range
  const Floats magic = broadcast(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer, left in the low bits
  const Floats clamped = x < lowest ? broadcast(lowest) : x;
  const Floats shifted = clamped * log2_e + magic;
  const Floats n = shifted - magic;
  const Floats scale = (Floats)(((Vec<uint32_t>)shifted << 23) + 0x3f800000u);
  return x < lowest ? broadcast(0.0f) : exp_small(clamped - n * ln2_high - n * ln2_low) * scale;
#endif
}

UASPARSE_INLINE double exp_nonpositive(double x) { return __builtin_exp(x); }
UASPARSE_INLINE float exp_nonpositive(float x) { return exp_nonpositive(broadcast(x))[0]; }
UASPARSE_INLINE double log_of(double x) { return __builtin_log(x); }
UASPARSE_INLINE float log_of(float x) { return __builtin_logf(x); }

// All lanes together, halves at a time: a shuffle and an operation each.
template <int H = kFloats / 2>
UASPARSE_INLINE float largest_lane(Floats x) {
  const Floats other = Stage<float, H>::template shuffle<Stage<float, H>::inner>(x, x), larger = other > x ? other : x;
  if constexpr (H > 1) return largest_lane<H / 2>(larger);
  else return larger[0];
}

UASPARSE_INLINE float row_max(const float* z, int64_t n, const float* end) {
  Floats max = broadcast(-__builtin_inff());
  int64_t i = 0;
  for (; i + kFloats <= n; i += kFloats) {
    const Floats x = load(z + i);
    max = x > max ? x : max;
  }
  if (i < n) {
    const Floats x = load_tail(z + i, n - i, end);
    max = x > max ? x : max;
  }
  return largest_lane(max);
}

UASPARSE_INLINE double row_max(const double* z, int64_t n, const double*) {
  double max = -__builtin_inf();
  for (int64_t i = 0; i < n; ++i) max = z[i] > max ? z[i] : max;
  return max;
}

UASPARSE_INLINE float exp_sum(const float* z, int64_t n, float base, const float* end) {
  Floats sum = broadcast(0.0f);
  int64_t i = 0;
  for (; i + kFloats <= n; i += kFloats) sum += exp_nonpositive(load(z + i) - base);
  if (i < n) sum += exp_nonpositive(load_tail(z + i, n - i, end) - base);
  return sum_of_lanes<float>(sum);
}

UASPARSE_INLINE double exp_sum(const double* z, int64_t n, double base, const double*) {
  double sum = 0;
  for (int64_t i = 0; i < n; ++i) sum += __builtin_exp(z[i] - base);
  return sum;
}

// out = scale * exp(z - base)
UASPARSE_INLINE void scaled_exp(const float* z, int64_t n, float base, float scale, float* out, const float* end) {
  int64_t i = 0;
  for (; i + kFloats <= n; i += kFloats) {
    const Floats e = exp_nonpositive(load(z + i) - base) * scale;
    __builtin_memcpy(out + i, &e, sizeof e);
  }
  if (i < n) {
    float lanes[kFloats];
    const Floats e = exp_nonpositive(load_tail(z + i, n - i, end) - base) * scale;
    __builtin_memcpy(lanes, &e, sizeof e);
    for (int64_t j = 0; i + j < n; ++j) out[i + j] = lanes[j];
  }
}

UASPARSE_INLINE void scaled_exp(const double* z, int64_t n, double base, double scale, double* out, const double*) {
  for (int64_t i = 0; i < n; ++i) out[i] = scale * __builtin_exp(z[i] - base);
}

template <typename T>
UASPARSE_INLINE bool contains(const T* z, int64_t n, T value) {
  int found = 0;
  for (int64_t i = 0; i < n; ++i) found |= z[i] == value;
  return found != 0;
}

// An output of -inf counts nothing, so a maximum of -inf must not be subtracted from it.
template <typename T>
UASPARSE_INLINE T exp_base(T max) {
  return max == -static_cast<T>(__builtin_inf()) ? T(0) : max;
}

constexpr double kLeastKnown = 1e-7;  // 1 - u is at least this
constexpr double kLargestUnknown = 1 - kLeastKnown;

template <typename T>
void loss_forward(const LossProblem<T>& problem, int64_t begin, int64_t end, T* losses, T* saved, LossSums* sums) {
  constexpr int64_t chunk = 1024;
  const int64_t unknown = problem.classes - 1;
  for (int64_t i = begin; i < end; ++i) {
    const T* z = problem.logits + i * problem.classes;
    const int64_t target = problem.target[i];
    T max = -static_cast<T>(__builtin_inf()), others = 0;  // others: sum over the K known classes
    for (int64_t j = 0; j < unknown; j += chunk) {
      const int64_t n = unknown - j < chunk ? unknown - j : chunk;
      const T top = row_max(z + j, n, problem.logits_end);
      if (top > max) {
        if (others != 0) others *= exp_nonpositive(exp_base(max) - exp_base(top));
        max = top;
      }
      others += exp_sum(z + j, n, exp_base(max), problem.logits_end);
    }
    const T known_max = max;
    if (z[unknown] > max) {
      max = z[unknown];
      if (others != 0) others *= exp_nonpositive(exp_base(known_max) - max);
    }
    const T base = exp_base(max);
    const T unknown_share = exp_nonpositive(z[unknown] - base), sum = others + unknown_share;
    const T h = (base - z[target]) + log_of(sum);
    T loss = problem.unknown_weight * h;
    bool correct = false;
    if (target != unknown) {
      correct = z[target] == max && !contains(z, target, max);
      // u and 1 - u without cancellation: a large alpha meets a small u.
      const T known = others / sum, v = known < kLeastKnown ? T(kLeastKnown) : known, p = unknown_share / sum;
      const T u = p > T(kLargestUnknown) ? T(kLargestUnknown) : p;
      loss = correct ? h : h * (1 + problem.alpha / (1 + problem.alpha * u));
      sums->threshold += static_cast<double>(v * h);
      sums->known += 1;
    }
    sums->loss += static_cast<double>(loss);
    if (losses != nullptr) losses[i] = loss;
    saved[2 * i] = base;
    saved[2 * i + 1] = correct ? -sum : sum;
  }
}

// grad (of the row begin first) = grad_loss[i * grad_stride] * scale * dloss_i/dlogits_i
template <typename T>
void loss_backward(const LossProblem<T>& problem, int64_t begin, int64_t end, const T* saved, const T* grad_loss,
                   int64_t grad_stride, T scale, T* grad) {
  const int64_t unknown = problem.classes - 1;
  for (int64_t i = begin; i < end; ++i) {
    const T* z = problem.logits + i * problem.classes;
    T* out = grad + i * problem.classes;
    const int64_t target = problem.target[i];
    const T base = saved[2 * i], sum = __builtin_fabs(saved[2 * i + 1]), g = grad_loss[i * grad_stride] * scale;
    T w = problem.unknown_weight, through_u = 0;
    if (target != unknown) {
      w = 1;
      if (!__builtin_signbit(saved[2 * i + 1])) {
        constexpr T largest = kLargestUnknown;
        const T h = (base - z[target]) + log_of(sum), p = exp_nonpositive(z[unknown] - base) / sum;
        const T u = p < largest ? p : largest, slope = problem.alpha / (1 + problem.alpha * u);
        w += slope;
        // At the clamp the gradient stops; where h is infinite, w counts as a constant (the loss says enough).
        if (u < largest && h != static_cast<T>(__builtin_inf())) through_u = -h * slope * slope * u;
      }
    }
    scaled_exp(z, problem.classes, base, g * (w - through_u) / sum, out, problem.logits_end);
    out[target] -= g * w;
    out[unknown] += g * through_u;
  }
}

template void loss_forward(const LossProblem<float>&, int64_t, int64_t, float*, float*, LossSums*);
template void loss_forward(const LossProblem<double>&, int64_t, int64_t, double*, double*, LossSums*);
template void loss_backward(const LossProblem<float>&, int64_t, int64_t, const float*, const float*, int64_t, float,
                            float*);
template void loss_backward(const LossProblem<double>&, int64_t, int64_t, const double*, const double*, int64_t, double,
                            double*);

}  // namespace uasparse::UASPARSE_ISA
