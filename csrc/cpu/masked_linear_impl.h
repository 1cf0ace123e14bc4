// Kernels of masked_linear for one instruction set (included by masked_linear_<isa>.cpp; see masked_linear.h).
//
// Tiling. A call works on one panel (a tile of the batch, [channels][width]) and a range of grid rows. Grid columns are
// taken `column_block` at a time so that their part of the input panel stays in L1 while all rows of the range pass over
// it; `cursor` remembers how far each row has come. Inside, the width is cut into strips of NV vectors, held in registers
// while a row's nonzeros of this column block go by. A strip that is a whole panel wide takes 8 AVX2 or 4 AVX-512
// vectors; the weight's gradient holds the strip of grad_output in registers and folds L dot products (L lanes) at once.

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

// A vector of numbers from and to memory of any of the storage types.
template <typename T>
UASPARSE_INLINE Vec<T> load_numbers(const T* from) {
  return load(from);
}
template <typename T>
UASPARSE_INLINE Vec<T> load_numbers(const uint16_t* from) {
  Vec<T> v{};
#pragma GCC unroll 16
  for (int i = 0; i < kLanes<T>; ++i) v[i] = to_number(from[i]);
  return v;
}
template <typename T>
UASPARSE_INLINE void store_numbers(T* to, Vec<T> v) {
  store<T>(to, v);
}
template <typename T>
UASPARSE_INLINE void store_numbers(uint16_t* to, Vec<T> v) {
#pragma GCC unroll 16
  for (int i = 0; i < kLanes<T>; ++i) from_number(v[i], to + i);
}

template <typename T, int H>
UASPARSE_INLINE void transpose_stages(Vec<T>* m) {
  if constexpr (H > 0) {
#pragma GCC unroll 16
    for (int i = 0; i < kLanes<T>; ++i) {
      if (i & H) continue;
      using S = Stage<T, H>;
      const Vec<T> a = m[i], b = m[i + H];
      m[i] = S::template shuffle<S::low>(a, b);
      m[i + H] = S::template shuffle<S::high>(a, b);
    }
    transpose_stages<T, H / 2>(m);
  }
}

// An L x L tile, rows `from_stride` apart, transposed to rows `to_stride` apart.
template <typename T, typename From, typename To>
UASPARSE_INLINE void transpose_tile(const From* from, int64_t from_stride, To* to, int64_t to_stride) {
  constexpr int L = kLanes<T>;
  Vec<T> m[L];
#pragma GCC unroll 16
  for (int i = 0; i < L; ++i) m[i] = load_numbers<T>(from + i * from_stride);
  transpose_stages<T, L / 2>(m);
#pragma GCC unroll 16
  for (int i = 0; i < L; ++i) store_numbers<T>(to + i * to_stride, m[i]);
}

// Tiles of L x L, channels innermost so that rows are read (pack) and written (unpack) by whole cache lines.
template <typename S, typename T>
void pack(const S* from, int64_t stride, int64_t batch, int64_t channels, T* to, int64_t width) {
  constexpr int L = kLanes<T>;
  for (int64_t b = 0; b < width; b += L) {
    int64_t c = 0;
    if (b + L <= batch)
      for (; c + L <= channels; c += L) transpose_tile<T>(from + b * stride + c, stride, to + c * width + b, width);
    for (; c < channels; ++c)
      for (int64_t i = b; i < b + L; ++i) to[c * width + i] = i < batch ? to_number(from[i * stride + c]) : T(0);
  }
}

template <typename T, typename S>
void unpack(const T* from, int64_t width, int64_t channels, S* to, int64_t stride, int64_t batch) {
  constexpr int L = kLanes<T>;
  for (int64_t b = 0; b < batch; b += L) {
    int64_t c = 0;
    if (b + L <= batch)
      for (; c + L <= channels; c += L) transpose_tile<T>(from + c * width + b, width, to + b * stride + c, stride);
    for (int64_t i = b; i < b + L && i < batch; ++i)
      for (int64_t k = c; k < channels; ++k) from_number(from[k * width + i], to + i * stride + k);
  }
}

// ---- product ----------------------------------------------------------------------------------------------------

// The first of [first, last) whose index is not below limit; indices ascend. `total` bounds what may be read.
UASPARSE_INLINE int64_t segment_end(const int32_t* idx, int64_t first, int64_t last, int64_t limit, int64_t total) {
  int64_t i = first;
#if UASPARSE_VECTOR_BYTES > 16
  typedef int Ints __attribute__((vector_size(32)));
  typedef float Floats __attribute__((vector_size(32)));
  for (; i < last && i + 8 <= total; i += 8) {
    Ints v;
    __builtin_memcpy(&v, idx + i, sizeof v);
    const Ints below = v < static_cast<int>(limit);
    const unsigned mask = __builtin_ia32_movmskps256(reinterpret_cast<Floats>(below));
    if (mask != 0xff) {
      i += __builtin_ctz(~mask);
      return i < last ? i : last;
    }
  }
#else
  (void)total;
#endif
  while (i < last && idx[i] < limit) ++i;
  return i < last ? i : last;
}

UASPARSE_INLINE void prefetch(const void* from, int64_t bytes) {
  for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(static_cast<const char*>(from) + i);
}

// Unstructured: one output, one strip of NV vectors. U nonzeros go together, each with accumulators of its own where NV
// alone would not cover the latency of a multiply-add.
template <typename T, int NV>
UASPARSE_INLINE void single_tile(const Product<T>& p, int64_t first, int64_t last, T* out, const T* bias,
                                 int64_t lane) {
  constexpr int L = kLanes<T>, U = NV >= 8 ? 1 : 8 / NV;
  Vec<T> acc[U][NV] = {};
#pragma GCC unroll 16
  for (int v = 0; v < NV; ++v) acc[0][v] = bias ? broadcast<T>(*bias) : load(out + v * L);
  const int64_t width = p.width;
  const T* in = p.in + lane;
  int64_t i = first;
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
UASPARSE_INLINE void block_tile(const Product<T>& p, int64_t first, int64_t last, const T* val, T* out, const T* bias,
                                int64_t lane) {
  constexpr int L = kLanes<T>;
  Vec<T> acc[OB][NV];
  const int64_t step = p.block_out * p.block_in, width = p.width;
#pragma GCC unroll 16
  for (int o = 0; o < OB; ++o)
#pragma GCC unroll 16
    for (int v = 0; v < NV; ++v) acc[o][v] = bias ? broadcast<T>(bias[o]) : load(out + o * width + v * L);
  for (int64_t i = first; i < last; ++i) {
    const T* x = p.in + p.idx[i] * p.block_in * width + lane;
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
UASPARSE_INLINE void single_row(const Product<T>& p, int64_t first, int64_t last, T* out, const T* bias) {
  constexpr int L = kLanes<T>;
  int64_t lane = 0;
  for (; lane + kStrip * L <= p.width; lane += kStrip * L) single_tile<T, kStrip>(p, first, last, out + lane, bias, lane);
  if constexpr (kStrip > 4)
    for (; lane + 4 * L <= p.width; lane += 4 * L) single_tile<T, 4>(p, first, last, out + lane, bias, lane);
  for (; lane + 2 * L <= p.width; lane += 2 * L) single_tile<T, 2>(p, first, last, out + lane, bias, lane);
  for (; lane < p.width; lane += L) single_tile<T, 1>(p, first, last, out + lane, bias, lane);
}

template <typename T, int OB>
UASPARSE_INLINE void block_rows(const Product<T>& p, int64_t first, int64_t last, const T* val, T* out,
                                const T* bias) {
  constexpr int L = kLanes<T>;
  int64_t lane = 0;
  for (; lane + kBlockStrip * L <= p.width; lane += kBlockStrip * L)
    block_tile<T, OB, kBlockStrip>(p, first, last, val, out + lane, bias, lane);
  for (; lane < p.width; lane += L) block_tile<T, OB, 1>(p, first, last, val, out + lane, bias, lane);
}

// Calls visit(grid row, first, last, first column block?) for the nonzeros of each row in each column block.
template <typename P, typename Visit>
UASPARSE_INLINE void for_each_segment(const P& p, Visit visit) {
  for (int64_t r = p.begin; r < p.end; ++r) p.cursor[r - p.begin] = p.ptr[r];
  for (int64_t c = 0; c < p.columns; c += p.column_block) {
    const int64_t limit = c + p.column_block;
    for (int64_t r = p.begin; r < p.end; ++r) {
      int32_t* cursor = p.cursor + (r - p.begin);
      const int64_t first = *cursor;
      int64_t last = p.ptr[r + 1];
      if (limit < p.columns) *cursor = static_cast<int32_t>(last = segment_end(p.idx, first, last, limit, p.blocks));
      if (r + 2 < p.end) {
        __builtin_prefetch(p.idx + cursor[2] + 8);
        p.prefetch_values(cursor[2] + 8);
      }
      visit(r, first, last, c == 0);
    }
  }
}

template <typename T>
void product(const Product<T>& p) {
  static constexpr T zeros[4] = {};
  const int64_t step = p.block_out * p.width;
  if (p.block_out == 1 && p.block_in == 1) {
    for_each_segment(p, [&](int64_t r, int64_t first, int64_t last, bool start) __attribute__((always_inline)) {
      T* out = p.out + (r - p.begin) * p.width;
      if (r + 1 < p.end) prefetch(out + p.width, sizeof(T) * p.width);
      const T* bias = p.bias ? p.bias + (r - p.begin) : zeros;
      if (start || first < last) single_row(p, first, last, out, start ? bias : nullptr);
    });
    return;
  }
  for_each_segment(p, [&](int64_t r, int64_t first, int64_t last, bool start) __attribute__((always_inline)) {
    if (!start && first == last) return;
    T* out = p.out + (r - p.begin) * step;
    int64_t o = 0;
    for (; o < p.block_out; o += o + 4 <= p.block_out ? 4 : 1) {
      const T* bias = !start ? nullptr : p.bias ? p.bias + (r - p.begin) * p.block_out + o : zeros;
      const T* val = p.val + o * p.stride_out;
      if (o + 4 <= p.block_out)
        block_rows<T, 4>(p, first, last, val, out + o * p.width, bias);
      else
        block_rows<T, 1>(p, first, last, val, out + o * p.width, bias);
    }
  });
}

// ---- gradient of the weight -------------------------------------------------------------------------------------

// N dot products y . x[idx[j * S]] over NV vectors, as N groups of L / N partial sums in the order of j: a tree that
// folds two vectors into one on every level.
template <typename T, int NV, int N, int S>
struct Dots {
  static UASPARSE_INLINE Vec<T> run(const Vec<T>* y, const T* const* x) {
    if constexpr (N == 1) {
      Vec<T> acc = y[0] * load(x[0]);
#pragma GCC unroll 16
      for (int v = 1; v < NV; ++v) acc += y[v] * load(x[0] + v * kLanes<T>);
      return acc;
    } else {
      using Fold = Stage<T, kLanes<T> / N>;
      const Vec<T> a = Dots<T, NV, N / 2, 2 * S>::run(y, x);
      const Vec<T> b = Dots<T, NV, N / 2, 2 * S>::run(y, x + S);
      return Fold::template shuffle<Fold::outer>(a, b) + Fold::template shuffle<Fold::inner>(a, b);
    }
  }
};

// grad[i] (+)= y . x[idx[i]] for `count` <= N nonzeros from i on.
template <typename T, int NV, int N>
UASPARSE_INLINE void few_dots(const Vec<T>* y, const T* in, const int32_t* idx, int64_t width, int64_t count, T* grad,
                              bool accumulate) {
  constexpr int G = kLanes<T> / N;
  const T* x[N];
#pragma GCC unroll 16
  for (int j = 0; j < N; ++j) x[j] = in + static_cast<uint32_t>(idx[j < count ? j : count - 1]) * width;
  T sums[kLanes<T>];
  store<T>(sums, Dots<T, NV, N, 1>::run(y, x));
  for (int64_t j = 0; j < count; ++j) {
    T total = accumulate ? grad[j] : 0;
#pragma GCC unroll 16
    for (int g = 0; g < G; ++g) total += sums[j * G + g];
    grad[j] = total;
  }
}

// All nonzeros of a segment, one strip of NV vectors.
template <typename T, int NV>
UASPARSE_INLINE void dot_strip(const Sddmm<T>& p, const T* grad_output, const T* in, int64_t first, int64_t last,
                               bool accumulate) {
  constexpr int L = kLanes<T>;
  Vec<T> y[NV];
#pragma GCC unroll 16
  for (int v = 0; v < NV; ++v) y[v] = load(grad_output + v * L);
  int64_t i = first;
  for (; i + L <= last; i += L) {
    const T* x[L];
#pragma GCC unroll 16
    for (int j = 0; j < L; ++j) x[j] = in + static_cast<uint32_t>(p.idx[i + j]) * p.width;
    Vec<T> sums = Dots<T, NV, L, 1>::run(y, x);
    if (accumulate) sums += load(p.grad + i);
    store<T>(p.grad + i, sums);
  }
  if (L > 8 && last - i > 4 && last - i <= 8) {
    few_dots<T, NV, (L > 8 ? 8 : L)>(y, in, p.idx + i, p.width, last - i, p.grad + i, accumulate);
  } else if (L > 4 && last - i <= 4 && last > i) {
    few_dots<T, NV, (L > 4 ? 4 : L)>(y, in, p.idx + i, p.width, last - i, p.grad + i, accumulate);
  } else if (last > i) {
    few_dots<T, NV, L>(y, in, p.idx + i, p.width, last - i, p.grad + i, accumulate);
  }
}

template <typename T>
UASPARSE_INLINE void dot_row(const Sddmm<T>& p, const T* grad_output, int64_t first, int64_t last) {
  constexpr int L = kLanes<T>;
  int64_t lane = 0;
  bool accumulate = p.accumulate;
  for (; lane + kStrip * L <= p.width; lane += kStrip * L, accumulate = true)
    dot_strip<T, kStrip>(p, grad_output + lane, p.input + lane, first, last, accumulate);
  for (; lane + 2 * L <= p.width; lane += 2 * L, accumulate = true)
    dot_strip<T, 2>(p, grad_output + lane, p.input + lane, first, last, accumulate);
  for (; lane < p.width; lane += L, accumulate = true)
    dot_strip<T, 1>(p, grad_output + lane, p.input + lane, first, last, accumulate);
}

// Blocks: Y x X dot products of one block together.
template <typename T, int Y, int X>
UASPARSE_INLINE void dot_tile(const T* dy, const T* in, int64_t width, T* grad, int64_t stride, bool accumulate) {
  constexpr int L = kLanes<T>;
  Vec<T> acc[Y][X] = {};
  for (int64_t lane = 0; lane < width; lane += L) {
    Vec<T> xs[X];
#pragma GCC unroll 16
    for (int x = 0; x < X; ++x) xs[x] = load(in + x * width + lane);
#pragma GCC unroll 16
    for (int y = 0; y < Y; ++y) {
      const Vec<T> d = load(dy + y * width + lane);
#pragma GCC unroll 16
      for (int x = 0; x < X; ++x) acc[y][x] += d * xs[x];
    }
  }
#pragma GCC unroll 16
  for (int y = 0; y < Y; ++y)
#pragma GCC unroll 16
    for (int x = 0; x < X; ++x) {
      T* to = grad + y * stride + x;
      *to = sum<T>(acc[y][x]) + (accumulate ? *to : 0);
    }
}

template <typename T>
void sddmm(const Sddmm<T>& p) {
  if (p.bh == 1 && p.bw == 1) {
    for_each_segment(p, [&](int64_t r, int64_t first, int64_t last, bool) __attribute__((always_inline)) {
      dot_row(p, p.grad_output + r * p.width, first, last);
    });
    return;
  }
  for_each_segment(p, [&](int64_t r, int64_t first, int64_t last, bool) __attribute__((always_inline)) {
    for (int64_t i = first; i < last; ++i) {
      const T* in = p.input + static_cast<uint32_t>(p.idx[i]) * p.bw * p.width;
      for (int64_t y = 0; y < p.bh; y += y + 4 <= p.bh ? 4 : 1) {
        const T* dy = p.grad_output + (r * p.bh + y) * p.width;
        T* grad = p.grad + (i * p.bh + y) * p.bw;
        for (int64_t x = 0; x < p.bw; x += x + 2 <= p.bw ? 2 : 1) {
          const T* from = in + x * p.width;
          if (y + 4 <= p.bh && x + 2 <= p.bw)
            dot_tile<T, 4, 2>(dy, from, p.width, grad + x, p.bw, p.accumulate);
          else if (y + 4 <= p.bh)
            dot_tile<T, 4, 1>(dy, from, p.width, grad + x, p.bw, p.accumulate);
          else if (x + 2 <= p.bw)
            dot_tile<T, 1, 2>(dy, from, p.width, grad + x, p.bw, p.accumulate);
          else
            dot_tile<T, 1, 1>(dy, from, p.width, grad + x, p.bw, p.accumulate);
        }
      }
    }
  });
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
