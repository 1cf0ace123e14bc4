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
// 32 indices are compared at once, so that the usual segment takes no branch that depends on its length.
UASPARSE_INLINE int64_t segment_end(const int32_t* idx, int64_t first, int64_t last, int64_t limit, int64_t total) {
  int64_t i = first;
#if UASPARSE_VECTOR_BYTES > 16
  typedef int Ints __attribute__((vector_size(32)));
  typedef float Floats __attribute__((vector_size(32)));
  for (; i < last && i + 32 <= total; i += 32) {
    uint32_t below = 0;
#pragma GCC unroll 4
    for (int part = 0; part < 4; ++part) {
      Ints v;
      __builtin_memcpy(&v, idx + i + 8 * part, sizeof v);
      const Ints less = v < static_cast<int>(limit);
      below |= static_cast<uint32_t>(__builtin_ia32_movmskps256(reinterpret_cast<Floats>(less))) << (8 * part);
    }
    if (below != 0xffffffffu) {
      i += __builtin_ctz(~below);
      return i < last ? i : last;
    }
  }
#else
  (void)total;
#endif
  while (i < last && idx[i] < limit) ++i;
  return i < last ? i : last;
}

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

// Calls visit(panel, row of the range, first, last, first column block?) for the nonzeros of each row in each column block. The
// segments are found once for all panels; that pass also fetches the values into a near cache.
template <typename P, typename Visit>
UASPARSE_INLINE void for_each_segment(const P& p, int64_t panel_step, Visit visit) {
  const int64_t rows = p.end - p.begin;
  int32_t *firsts = p.scratch, *lasts = p.scratch + rows;
  const int32_t* ptr = p.ptr + p.begin;
  if (rows == 0) return;
  const int64_t ahead = (ptr[rows] - ptr[0]) / rows * p.column_block / p.columns;
  for (int64_t r = 0; r < rows; ++r) lasts[r] = ptr[r];
  for (int64_t c = 0; c < p.columns; c += p.column_block) {
    const int64_t limit = c + p.column_block;
    if (limit >= p.columns) {
      for (int64_t r = 0; r < rows; ++r) firsts[r] = lasts[r], lasts[r] = ptr[r + 1];
    } else {
      for (int64_t r = 0; r < rows; ++r) {
        if (r + 4 < rows)
          for (int64_t i = 0; i <= ahead; i += 16) {
            __builtin_prefetch(p.idx + lasts[r + 4] + i);
            p.prefetch_values(lasts[r + 4] + i);
          }
        firsts[r] = lasts[r];
        lasts[r] = static_cast<int32_t>(segment_end(p.idx, firsts[r], ptr[r + 1], limit, p.blocks));
      }
    }
    for (int64_t panel = 0; panel < p.panels; panel += panel_step)
      for (int64_t r = 0; r < rows; ++r) visit(panel, r, firsts[r], lasts[r], c == 0);
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

// One input vector: bound by the stream of values and indices, so the numbers of `in` are put into vectors one by one
// (gather instructions are slower than that on many processors).
template <typename T>
void single(const int32_t* ptr, const int32_t* idx, const T* val, int64_t begin, int64_t end, const T* in,
            const T* bias, T* out) {
  constexpr int L = 16 / sizeof(T), U = 4;
  typedef T Short __attribute__((vector_size(16)));
  for (int64_t r = begin; r < end; ++r) {
    Short acc[U] = {};
    const int64_t last = ptr[r + 1];
    int64_t i = ptr[r];
    for (; i + L * U <= last; i += L * U) {
#pragma GCC unroll 4
      for (int u = 0; u < U; ++u) {
        Short x, w;
#pragma GCC unroll 4
        for (int l = 0; l < L; ++l) x[l] = in[static_cast<uint32_t>(idx[i + u * L + l])];
        __builtin_memcpy(&w, val + i + u * L, sizeof w);
        acc[u] += w * x;
      }
    }
    const Short four = (acc[0] + acc[1]) + (acc[2] + acc[3]);
    T total = bias ? bias[r] : 0, rest = 0;
    for (; i < last; ++i) rest += val[i] * in[static_cast<uint32_t>(idx[i])];
    for (int l = 0; l < L; ++l) rest += four[l];
    out[r] = total + rest;
  }
}

// ---- gradient of the weight -------------------------------------------------------------------------------------

// N dot products y . x[idx[j * S]] over NV vectors, as N groups of L / N partial sums in the order of j: a tree that
// folds two vectors into one on every level. x is `split` vectors of one panel, then the next panel's, `next` apart.
template <typename T, int NV, int N, int S>
struct Dots {
  static UASPARSE_INLINE Vec<T> run(const Vec<T>* y, const T* const* x, int64_t next) {
    if constexpr (N == 1) {
      Vec<T> acc = y[0] * load(x[0]);
#pragma GCC unroll 16
      for (int v = 1; v < NV; ++v)
        acc += y[v] * load(x[0] + (v < kPanelVectors ? 0 : next) + v % kPanelVectors * kLanes<T>);
      return acc;
    } else {
      using Fold = Stage<T, kLanes<T> / N>;
      const Vec<T> a = Dots<T, NV, N / 2, 2 * S>::run(y, x, next);
      const Vec<T> b = Dots<T, NV, N / 2, 2 * S>::run(y, x + S, next);
      return Fold::template shuffle<Fold::outer>(a, b) + Fold::template shuffle<Fold::inner>(a, b);
    }
  }
};

// Every group of 2 * H lanes summed, in all its lanes.
template <typename T, int H>
UASPARSE_INLINE Vec<T> sum_groups(Vec<T> v) {
  if constexpr (H == 0) {
    return v;
  } else {
    using Fold = Stage<T, H>;
    return sum_groups<T, H / 2>(v + Fold::template shuffle<Fold::inner>(v, v));
  }
}

// Lanes 0, G, 2G, ... first.
template <typename T, int G>
UASPARSE_INLINE Vec<T> every(Vec<T> v) {
  Vec<T> r = v;
#pragma GCC unroll 16
  for (int i = 0; i < kLanes<T> / G; ++i) r[i] = v[i * G];
  return r;
}

// A row held in registers against a list of others: at(j) is the j-th. Pairs of panels are hold_next and list_next apart.
template <typename T>
struct DotList {
  const T* hold;
  int64_t hold_next, list_next, width;
  T* grad;
  bool accumulate;

  // grad[j] (+)= hold . at(j) for j in [first, first + count), 0 < count <= N.
  template <int NV, int N, typename At>
  UASPARSE_INLINE void few(const Vec<T>* y, At at, int64_t first, int64_t count) const {
    constexpr int G = kLanes<T> / N;
    const T* x[N];
#pragma GCC unroll 16
    for (int j = 0; j < N; ++j) x[j] = at(first + (j < count ? j : count - 1));
    Vec<T> sums = every<T, G>(sum_groups<T, G / 2>(Dots<T, NV, N, 1>::run(y, x, list_next)));
    if (accumulate) sums += load_first<T>(grad + first, count);
    store_first<T>(grad + first, sums, count);
  }

  // All of the list, one strip of NV vectors.
  template <int NV, typename At>
  UASPARSE_INLINE void strip(At at, int64_t count) const {
    constexpr int L = kLanes<T>;
    Vec<T> y[NV];
#pragma GCC unroll 16
    for (int v = 0; v < NV; ++v) y[v] = load(hold + (v < kPanelVectors ? 0 : hold_next) + v % kPanelVectors * L);
    int64_t i = 0;
    for (; i + L <= count; i += L) {
      const T* x[L];
#pragma GCC unroll 16
      for (int j = 0; j < L; ++j) x[j] = at(i + j);
      Vec<T> sums = Dots<T, NV, L, 1>::run(y, x, list_next);
      if (accumulate) sums += load(grad + i);
      store<T>(grad + i, sums);
    }
    const int64_t rest = count - i;
    if (rest == 0) return;
    if (L > 4 && rest <= 4)
      few<NV, (L > 4 ? 4 : L)>(y, at, i, rest);
    else if (L > 8 && rest <= 8)
      few<NV, (L > 8 ? 8 : L)>(y, at, i, rest);
    else
      few<NV, L>(y, at, i, rest);
  }

  // All of the list over one panel's width, or over two panels' where registers allow.
  template <typename At>
  UASPARSE_INLINE void run(bool pair, At at, int64_t count) {
    constexpr int L = kLanes<T>;
    if (pair) return strip<(kPanelVectors <= 4 ? 2 * kPanelVectors : 1)>(at, count);
    int64_t lane = 0;
    const auto shifted = [&](int64_t j) UASPARSE_LAMBDA { return at(j) + lane; };
    for (; lane + kStrip * L <= width; lane += kStrip * L, hold += kStrip * L, accumulate = true)
      strip<kStrip>(shifted, count);
    for (; lane + 2 * L <= width; lane += 2 * L, hold += 2 * L, accumulate = true) strip<2>(shifted, count);
    for (; lane < width; lane += L, hold += L, accumulate = true) strip<1>(shifted, count);
  }
};

// The list of a row of grad_output is the inputs of its nonzeros or of a block; in r x 1 blocks an input's list is the
// block's rows of grad_output. Either way the list's results lie side by side in grad.
template <typename T>
void sddmm(const Sddmm<T>& p) {
  // With 32 registers two panels go together: half the trees.
  const bool pairs = kPanelVectors <= 4 && p.width == kPanelVectors * kLanes<T>;
  const int64_t width = p.width;
  for_each_segment(p, pairs ? 2 : 1, [&](int64_t panel, int64_t r, int64_t first, int64_t last, bool) UASPARSE_LAMBDA {
    if (first == last) return;
    const T* dy = p.grad_output + panel * p.grad_panel + (p.begin + r) * p.bh * width;
    const T* in = p.input + panel * p.input_panel;
    const bool accumulate = p.accumulate || panel > 0, pair = pairs && panel + 1 < p.panels;
    if (p.bh == 1) {
      prefetch(dy + width, sizeof(T) * width);
      const int32_t* idx = p.idx + first;
      DotList<T> dots{dy, p.grad_panel, p.input_panel, width, p.grad + first, accumulate};
      dots.run(pair, [=](int64_t j) { return in + static_cast<uint32_t>(idx[j]) * width; }, last - first);
      return;
    }
    for (int64_t i = first; i < last; ++i) {
      const T* x = in + static_cast<uint32_t>(p.idx[i]) * p.bw * width;
      T* grad = p.grad + i * p.bh * p.bw;
      if (p.bw == 1) {
        DotList<T> dots{x, p.input_panel, p.grad_panel, width, grad, accumulate};
        dots.run(pair, [=](int64_t j) { return dy + j * width; }, p.bh);
        continue;
      }
      for (int64_t y = 0; y < p.bh; ++y) {
        DotList<T> dots{dy + y * width, p.grad_panel, p.input_panel, width, grad + y * p.bw, accumulate};
        dots.run(pair, [=](int64_t j) { return x + j * width; }, p.bw);
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
    &product<float>,          &sddmm<float>,         &single<float>,         &row_sums<float>};
const LinearKernels<double> linear_double = {
    &pack<double, double>, &unpack<double, double>, nullptr, nullptr,
    &product<double>, &sddmm<double>, &single<double>, &row_sums<double>};

}  // namespace uasparse::UASPARSE_ISA
