// Kernels of masked_linear for one instruction set (included by masked_linear_<isa>.cpp; see masked_linear.h).
//
// Tiling. A call works on one panel (a tile of the batch, [channels][width]) and a range of grid rows. Grid columns are
// taken `column_block` at a time so that their part of the input panel stays in L1 while all rows of the range pass over
// it; `cursor` remembers how far each row has come. Inside, the width is cut into strips of NV vectors, held in registers
// while a row's nonzeros of this column block go by.

#include "cpu/vec.h"

namespace uasparse::UASPARSE_ISA {
namespace {

// ---- layout -----------------------------------------------------------------------------------------------------

UASPARSE_INLINE float to_number(uint16_t bf16) {
  const uint32_t bits = static_cast<uint32_t>(bf16) << 16;
  float x;
  __builtin_memcpy(&x, &bits, sizeof x);
  return x;
}
UASPARSE_INLINE float to_number(float x) { return x; }
UASPARSE_INLINE double to_number(double x) { return x; }

UASPARSE_INLINE void from_number(float x, float* to) { *to = x; }
UASPARSE_INLINE void from_number(double x, double* to) { *to = x; }
UASPARSE_INLINE void from_number(float x, uint16_t* to) {
  uint32_t bits;
  __builtin_memcpy(&bits, &x, sizeof x);
  // Round to nearest even; a NaN keeps its sign and becomes quiet.
  *to = x != x ? static_cast<uint16_t>((bits >> 16) | 0x40)
               : static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

template <typename S, typename T>
void pack(const S* from, int64_t stride, int64_t batch, int64_t channels, T* to, int64_t width) {
  for (int64_t c0 = 0; c0 < channels; c0 += 16) {
    const int64_t c1 = c0 + 16 < channels ? c0 + 16 : channels;
    for (int64_t b = 0; b < batch; ++b)
      for (int64_t c = c0; c < c1; ++c) to[c * width + b] = to_number(from[b * stride + c]);
    for (int64_t c = c0; c < c1; ++c)
      for (int64_t b = batch; b < width; ++b) to[c * width + b] = 0;
  }
}

template <typename T, typename S>
void unpack(const T* from, int64_t width, int64_t channels, S* to, int64_t stride, int64_t batch) {
  for (int64_t c0 = 0; c0 < channels; c0 += 16) {
    const int64_t c1 = c0 + 16 < channels ? c0 + 16 : channels;
    for (int64_t b = 0; b < batch; ++b)
      for (int64_t c = c0; c < c1; ++c) from_number(from[c * width + b], to + b * stride + c);
  }
}

// ---- product ----------------------------------------------------------------------------------------------------

// One output row of blocks, one strip of NV vectors: OB outputs x NV vectors of accumulators.
template <typename T, int OB, int NV>
UASPARSE_INLINE void product_tile(const Product<T>& p, int64_t first, int64_t last, const T* val, T* out, const T* bias,
                                  int64_t lane) {
  constexpr int L = kLanes<T>;
  Vec<T> acc[OB][NV];
#pragma GCC unroll 16
  for (int o = 0; o < OB; ++o)
#pragma GCC unroll 16
    for (int v = 0; v < NV; ++v)
      acc[o][v] = bias ? broadcast<T>(bias[o]) : load(out + o * p.width + v * L);
  const int64_t step = p.block_out * p.block_in, width = p.width;
  for (int64_t i = first; i < last; ++i) {
    const T* x = p.in + p.idx[i] * p.block_in * width + lane;
    const T* w = val + i * step;
    for (int64_t k = 0; k < p.block_in; ++k, x += width, w += p.stride_in) {
#pragma GCC unroll 16
      for (int o = 0; o < OB; ++o) {
        const T scale = w[o * p.stride_out];
#pragma GCC unroll 16
        for (int v = 0; v < NV; ++v) acc[o][v] += scale * load(x + v * L);
      }
    }
  }
#pragma GCC unroll 16
  for (int o = 0; o < OB; ++o)
#pragma GCC unroll 16
    for (int v = 0; v < NV; ++v) store<T>(out + o * width + v * L, acc[o][v]);
}

// All strips of OB output rows.
template <typename T, int OB, int NV>
UASPARSE_INLINE void product_rows(const Product<T>& p, int64_t first, int64_t last, const T* val, T* out,
                                  const T* bias) {
  constexpr int L = kLanes<T>;
  int64_t lane = 0;
  for (; lane + NV * L <= p.width; lane += NV * L) product_tile<T, OB, NV>(p, first, last, val, out + lane, bias, lane);
  if constexpr (NV > 4)
    for (; lane + 4 * L <= p.width; lane += 4 * L) product_tile<T, OB, 4>(p, first, last, val, out + lane, bias, lane);
  for (; lane < p.width; lane += L) product_tile<T, OB, 1>(p, first, last, val, out + lane, bias, lane);
}

template <typename T>
void product(const Product<T>& p) {
  constexpr T zeros[4] = {};
  for (int64_t r = p.begin; r < p.end; ++r) p.cursor[r - p.begin] = p.ptr[r];
  for (int64_t c0 = 0; c0 < p.columns; c0 += p.column_block) {
    const int64_t limit = c0 + p.column_block;
    for (int64_t r = p.begin; r < p.end; ++r) {
      const int64_t first = p.cursor[r - p.begin];
      int64_t last = p.ptr[r + 1];
      if (limit < p.columns) {
        int64_t i = first;
        while (i < last && p.idx[i] < limit) ++i;
        p.cursor[r - p.begin] = static_cast<int32_t>(last = i);
      }
      if (first == last && c0 > 0) continue;
      int64_t o = 0;
      T* out = p.out + (r - p.begin) * p.block_out * p.width;
      const T* bias = p.bias ? p.bias + (r - p.begin) * p.block_out : nullptr;
      for (; o + 4 <= p.block_out; o += 4)
        product_rows<T, 4, 2>(p, first, last, p.val + o * p.stride_out, out + o * p.width,
                              c0 > 0 ? nullptr : bias ? bias + o : zeros);
      for (; o < p.block_out; ++o)
        product_rows<T, 1, 8>(p, first, last, p.val + o * p.stride_out, out + o * p.width,
                              c0 > 0 ? nullptr : bias ? bias + o : zeros);
    }
  }
}

// ---- gradient of the weight -------------------------------------------------------------------------------------

template <typename T>
void sddmm(const Sddmm<T>& p) {
  constexpr int L = kLanes<T>;
  for (int64_t r = p.begin; r < p.end; ++r) p.cursor[r - p.begin] = p.ptr[r];
  for (int64_t c0 = 0; c0 < p.columns; c0 += p.column_block) {
    const int64_t limit = c0 + p.column_block;
    for (int64_t r = p.begin; r < p.end; ++r) {
      const int64_t first = p.cursor[r - p.begin];
      int64_t last = p.ptr[r + 1];
      if (limit < p.columns) {
        int64_t i = first;
        while (i < last && p.idx[i] < limit) ++i;
        p.cursor[r - p.begin] = static_cast<int32_t>(last = i);
      }
      for (int64_t i = first; i < last; ++i) {
        T* grad = p.grad + i * p.bh * p.bw;
        for (int64_t y = 0; y < p.bh; ++y) {
          const T* dy = p.grad_output + (r * p.bh + y) * p.width;
          for (int64_t x = 0; x < p.bw; ++x, ++grad) {
            const T* in = p.input + (p.idx[i] * p.bw + x) * p.width;
            Vec<T> acc = {};
            for (int64_t lane = 0; lane < p.width; lane += L) acc += load(dy + lane) * load(in + lane);
            *grad = sum<T>(acc) + (p.accumulate ? *grad : 0);
          }
        }
      }
    }
  }
}

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
    &product<float>, &sddmm<float>,         &row_sums<float>};
const LinearKernels<double> linear_double = {
    &pack<double, double>, &unpack<double, double>, nullptr, nullptr,
    &product<double>, &sddmm<double>,          &row_sums<double>};

}  // namespace uasparse::UASPARSE_ISA
