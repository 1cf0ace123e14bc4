// Kernels of masked_linear for one instruction set (included by masked_linear_<isa>.cpp; see masked_linear.h).
//
// Tiling. A call works on one panel (a tile of the batch, [channels][width]) and a range of grid rows. Grid columns are
// taken in blocks so that their part of the input panel stays in L1 while all rows of the range pass over it; where
// a row passes from one to the next is listed (segments.h). Inside, the width is cut into strips of NV vectors, held in registers
// while a row's nonzeros of this column block go by. A strip that is a whole panel wide takes 8 AVX2 or 4 AVX-512
// vectors; the weight's gradient holds the strip of grad_output in registers and folds L dot products (L lanes) at once.

#include "cpu/vec.h"
#include "cpu/masked_linear_layout.h"

namespace uasparse::UASPARSE_ISA {
namespace {

// ---- product ----------------------------------------------------------------------------------------------------

// The first `count` <= L lanes, from memory (zeros after them) and to memory.
template <typename T>
UASPARSE_INLINE Vec<T> load_first(const T* from, int64_t count) {
#if UASPARSE_VECTOR_BYTES == 64
  const unsigned mask = (1u << count) - 1;
  if constexpr (sizeof(T) == 4)
    return reinterpret_cast<Vec<T>>(_mm512_maskz_loadu_ps(static_cast<__mmask16>(mask), from));
  else
    return reinterpret_cast<Vec<T>>(_mm512_maskz_loadu_pd(static_cast<__mmask8>(mask), from));
#else
  T lanes[kLanes<T>] = {};
  for (int64_t i = 0; i < count; ++i) lanes[i] = from[i];
  return load(lanes);
#endif
}

template <typename T>
UASPARSE_INLINE void store_first(T* to, Vec<T> v, int64_t count) {
#if UASPARSE_VECTOR_BYTES == 64
  const unsigned mask = (1u << count) - 1;
  if constexpr (sizeof(T) == 4)
    _mm512_mask_storeu_ps(to, static_cast<__mmask16>(mask), reinterpret_cast<__m512>(v));
  else
    _mm512_mask_storeu_pd(to, static_cast<__mmask8>(mask), reinterpret_cast<__m512d>(v));
#else
  T lanes[kLanes<T>];
  store<T>(lanes, v);
  for (int64_t i = 0; i < count; ++i) to[i] = lanes[i];
#endif
}

UASPARSE_INLINE void prefetch(const void* from, int64_t bytes) {
  for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(static_cast<const char*>(from) + i);
}

// Unstructured: one output, one strip of NV vectors. Narrow strips take U nonzeros together, each with accumulators of
// its own, for NV alone would not cover the latency of a multiply-add.
template <typename T, int NV>
UASPARSE_INLINE void single_tile(const Product<T>& p, const T* in, int64_t first, int64_t last, T* out,
                                 const T* bias) {
  constexpr int L = kLanes<T>, U = NV >= 8 ? 1 : 8 / NV;
  Vec<T> acc[U][NV] = {};
#pragma GCC unroll 16
  for (int v = 0; v < NV; ++v) acc[0][v] = bias ? broadcast<T>(*bias) : load(out + v * L);
  const int64_t width = p.width;
  int64_t i = first;
  // 8 accumulators just cover the latency: two nonzeros together halve the chain, for an add beside the multiply-adds.
  for (; U == 1 && i + 2 <= last; i += 2) {
    const T* x0 = in + static_cast<uint32_t>(p.idx[i]) * width;
    const T* x1 = in + static_cast<uint32_t>(p.idx[i + 1]) * width;
    const T w0 = p.val[i], w1 = p.val[i + 1];
#pragma GCC unroll 16
    for (int v = 0; v < NV; ++v) {
      const Vec<T> second = w1 * load(x1 + v * L);
      acc[0][v] += w0 * load(x0 + v * L) + second;
    }
  }
  for (; i + U <= last; i += U) {
#pragma GCC unroll 16
    for (int u = 0; u < U; ++u) {
      const T* x = in + static_cast<uint32_t>(p.idx[i + u]) * width;
      const T scale = p.val[i + u];
#pragma GCC unroll 16
      for (int v = 0; v < NV; ++v) acc[u][v] += scale * load(x + v * L);
    }
  }
  for (; i < last; ++i) {
    const T* x = in + static_cast<uint32_t>(p.idx[i]) * width;
    const T scale = p.val[i];
#pragma GCC unroll 16
    for (int v = 0; v < NV; ++v) acc[0][v] += scale * load(x + v * L);
  }
#pragma GCC unroll 16
  for (int v = 0; v < NV; ++v) {
#pragma GCC unroll 16
    for (int u = 1; u < U; ++u) acc[0][v] += acc[u][v];
    store<T>(out + v * L, acc[0][v]);
  }
}

// Blocks: OB outputs share the inputs that they load; one strip of NV vectors.
template <typename T, int OB, int NV>
UASPARSE_INLINE void block_tile(const Product<T>& p, const T* in, int64_t first, int64_t last, const T* val,
                                T* out, const T* bias) {
  constexpr int L = kLanes<T>;
  Vec<T> acc[OB][NV];
  const int64_t step = p.block_out * p.block_in, width = p.width;
#pragma GCC unroll 16
  for (int o = 0; o < OB; ++o)
#pragma GCC unroll 16
    for (int v = 0; v < NV; ++v) acc[o][v] = bias ? broadcast<T>(bias[o]) : load(out + o * width + v * L);
  for (int64_t i = first; i < last; ++i) {
    const T* x = in + p.idx[i] * p.block_in * width;
    const T* w = val + i * step;
    for (int64_t k = 0; k < p.block_in; ++k, x += width, w += p.stride_in) {
      Vec<T> xs[NV];
#pragma GCC unroll 16
      for (int v = 0; v < NV; ++v) xs[v] = load(x + v * L);
#pragma GCC unroll 16
      for (int o = 0; o < OB; ++o)
#pragma GCC unroll 16
        for (int v = 0; v < NV; ++v) acc[o][v] += w[o * p.stride_out] * xs[v];
    }
  }
#pragma GCC unroll 16
  for (int o = 0; o < OB; ++o)
#pragma GCC unroll 16
    for (int v = 0; v < NV; ++v) store<T>(out + o * width + v * L, acc[o][v]);
}

constexpr int kPanelVectors = kTileBytes / UASPARSE_VECTOR_BYTES;  // of a full panel's width
constexpr int kStrip = kPanelVectors < 8 ? kPanelVectors : 8;      // accumulators of one output
constexpr int kBlockStrip = UASPARSE_VECTOR_BYTES == 64 ? 4 : 2;   // and of each of 4 outputs

template <typename T>
UASPARSE_INLINE void single_row(const Product<T>& p, const T* in, int64_t first, int64_t last, T* out, const T* bias) {
  constexpr int L = kLanes<T>;
  int64_t lane = 0;
  for (; lane + kStrip * L <= p.width; lane += kStrip * L) single_tile<T, kStrip>(p, in + lane, first, last, out + lane, bias);
  if constexpr (kStrip > 4)
    for (; lane + 4 * L <= p.width; lane += 4 * L) single_tile<T, 4>(p, in + lane, first, last, out + lane, bias);
  for (; lane + 2 * L <= p.width; lane += 2 * L) single_tile<T, 2>(p, in + lane, first, last, out + lane, bias);
  for (; lane < p.width; lane += L) single_tile<T, 1>(p, in + lane, first, last, out + lane, bias);
}

template <typename T, int OB>
UASPARSE_INLINE void block_rows(const Product<T>& p, const T* in, int64_t first, int64_t last, const T* val,
                                T* out, const T* bias) {
  constexpr int L = kLanes<T>;
  int64_t lane = 0;
  for (; lane + kBlockStrip * L <= p.width; lane += kBlockStrip * L)
    block_tile<T, OB, kBlockStrip>(p, in + lane, first, last, val, out + lane, bias);
  for (; lane < p.width; lane += L) block_tile<T, OB, 1>(p, in + lane, first, last, val, out + lane, bias);
}

// Calls visit(panel, row of the range, first, last, first column block?) for the nonzeros of each row in each column block.
// What the row after the next one has there is asked for: it lies where the processor does not expect it.
template <typename P, typename Visit>
UASPARSE_INLINE void for_each_segment(const P& p, int64_t panel_step, Visit visit) {
  const int64_t rows = p.end - p.begin;
  for (int64_t b = 0; b < p.column_blocks; ++b) {
    const int32_t *firsts = p.starts + b * p.stride + p.begin, *lasts = firsts + p.stride;
    for (int64_t panel = 0; panel < p.panels; panel += panel_step)
      for (int64_t r = 0; r < rows; ++r) {
        if (p.column_blocks > 1 && r + 2 < rows)
          for (int64_t i = firsts[r + 2]; i < lasts[r + 2] + 15; i += 16) {
            __builtin_prefetch(p.idx + i);
            p.prefetch_values(i);
          }
        visit(panel, r, firsts[r], lasts[r], b == 0);
      }
  }
}

template <typename T>
void product(const Product<T>& p) {
  static constexpr T zeros[4] = {};
  if (p.block_out == 1 && p.block_in == 1) {
    for_each_segment(p, 1, [&](int64_t panel, int64_t r, int64_t first, int64_t last, bool start) UASPARSE_LAMBDA {
      if (!start && first == last) return;
      const T* bias = !start ? nullptr : p.bias ? p.bias + r : zeros;
      T* out = p.out + panel * p.out_panel + r * p.width;
      prefetch(out + p.width, sizeof(T) * p.width);
      single_row(p, p.in + panel * p.in_panel, first, last, out, bias);
    });
    return;
  }
  for_each_segment(p, 1, [&](int64_t panel, int64_t r, int64_t first, int64_t last, bool start) UASPARSE_LAMBDA {
    if (!start && first == last) return;
    const T* in = p.in + panel * p.in_panel;
    T* out = p.out + panel * p.out_panel + r * p.block_out * p.width;
    for (int64_t o = 0; o < p.block_out; o += o + 4 <= p.block_out ? 4 : 1) {
      const T* bias = !start ? nullptr : p.bias ? p.bias + r * p.block_out + o : zeros;
      const T* val = p.val + o * p.stride_out;
      if (o + 4 <= p.block_out)
        block_rows<T, 4>(p, in, first, last, val, out + o * p.width, bias);
      else
        block_rows<T, 1>(p, in, first, last, val, out + o * p.width, bias);
    }
  });
}

}  // namespace
}  // namespace uasparse::UASPARSE_ISA

#include "cpu/masked_linear_dots.h"
#include "cpu/masked_linear_narrow.h"

namespace uasparse::UASPARSE_ISA {
namespace {

template <typename T>
void row_sums(const T* panel, int64_t width, int64_t channels, T* sums, bool accumulate) {
  for (int64_t c = 0; c < channels; ++c) {
    Vec<T> acc = {};
    for (int64_t lane = 0; lane < width; lane += kLanes<T>) acc += load(panel + c * width + lane);
    sums[c] = sum<T>(acc) + (accumulate ? sums[c] : 0);
  }
}

}  // namespace

extern const LinearKernels<float> linear_float;
extern const LinearKernels<double> linear_double;

const LinearKernels<float> linear_float = {
    &pack<float, float>,      &unpack<float, float>, &pack<uint16_t, float>, &unpack<float, uint16_t>,
    &product<float>,          &sddmm<float>,         &narrow<float>,         &pack_narrow<float>,
    &row_sums<float>};
const LinearKernels<double> linear_double = {
    &pack<double, double>, &unpack<double, double>, nullptr, nullptr,
    &product<double>, &sddmm<double>, &narrow<double>, &pack_narrow<double>, &row_sums<double>};

}  // namespace uasparse::UASPARSE_ISA
