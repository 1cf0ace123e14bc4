// Inner loops of masked_conv2d (contracts: masked_conv2d.h), for the instruction set in force.
//
// product: a tile of rows x vectors output positions of one output channel stays in registers while the channel's
//   entries stream by; an entry is one broadcast and one multiply-add with a memory operand a vector. The tile is as
//   large as the registers allow, because the entry's own cost (two loads) is spread over it.
// shifted_product: the same for planes without columns of padding, where the sums are shifted by whole columns once for all
//   entries that need it, instead of the source once for each column of the kernel.
// Dot products: conv_dots_impl.h; copies and transposes: conv_moves_impl.h; weights in blocks: conv_quads_impl.h
// and conv_plane_quads_impl.h.

#include "cpu/conv_lanes_impl.h"

namespace uasparse::UASPARSE_ISA {

template <typename T>
constexpr int kMaxVectors = UASPARSE_VECTOR_BYTES == 64 ? 16 : UASPARSE_VECTOR_BYTES == 32 ? 12 : 8;
constexpr int kMaxRows = 4;

// --- product

// Asks for what the next call will read, into L2: memory would stand still while this call multiplies.
template <typename T>
class AskAhead {
 public:
  AskAhead(const ConvAhead<T>& ahead, int64_t steps)
      : ahead_(ahead), rows_(ahead.images * ahead.rows), steps_(steps) {}

  UASPARSE_INLINE void step() {
    for (due_ += rows_; due_ >= steps_; due_ -= steps_) {
      const T* const from = ahead_.from + image_ * ahead_.image + row_ * ahead_.row;
      for (int64_t i = 0; i < ahead_.numbers; i += kLine) __builtin_prefetch(from + i, 0, 2);
      if (++row_ == ahead_.rows) row_ = 0, ++image_;
    }
  }

 private:
  static constexpr int64_t kLine = 64 / sizeof(T);
  const ConvAhead<T>& ahead_;
  const int64_t rows_, steps_;
  int64_t due_ = 0, image_ = 0, row_ = 0;
};

// Whether to ask for the place of the next channel too: where `out` is a map it is in memory until the first sums are there.
template <typename Product>
UASPARSE_INLINE bool asks_for_out(const Product& p) {
  return p.start && p.ahead.from != nullptr;
}

template <typename T, int kRows, int kVectors>
void product_tile(const ConvProduct<T>& p) {
  constexpr int L = kLanes<T>;
  const int64_t last = p.last;
  const auto at = [last](int v) UASPARSE_LAMBDA { return v + 1 < kVectors ? int64_t(v * L) : last; };
  AskAhead<T> ahead(p.ahead, p.end - p.begin);
  for (int64_t c = p.begin; c < p.end; ++c) {
    const ConvEntry<T>* entry = p.entries + p.first[c];
    const ConvEntry<T>* const end = p.entries + p.first[c + 1];
    T* const out = p.out + c * p.out_channel;
    ahead.step();
    if (asks_for_out(p) && c + 1 < p.end)
      for (int r = 0; r < kRows; ++r)
        for (int v = 0; v < kVectors; ++v) __builtin_prefetch(out + p.out_channel + r * p.out_row + at(v), 1);
    Vec<T> sum[kRows][kVectors];
    if (p.start) {
      const Vec<T> bias = broadcast<T>(p.bias ? p.bias[c] : T(0));
      for (int r = 0; r < kRows; ++r)
        for (int v = 0; v < kVectors; ++v) sum[r][v] = bias;
    } else {
      if (entry == end) continue;
      for (int r = 0; r < kRows; ++r)
        for (int v = 0; v < kVectors; ++v) sum[r][v] = load(out + r * p.out_row + at(v));
    }
    for (; entry != end; ++entry) {
      const T* source = p.source + entry->offset;
      const Vec<T> value = broadcast<T>(entry->value);
      for (int r = 0; r < kRows; ++r)
        for (int v = 0; v < kVectors; ++v) sum[r][v] += value * load(source + r * p.source_row + at(v));
    }
    for (int r = 0; r < kRows; ++r)
      for (int v = 0; v < kVectors; ++v) store(out + r * p.out_row + at(v), sum[r][v]);
  }
}

template <typename T, int kRows, int kVectors = kMaxVectors<T> / kRows>
void product_rows(const ConvProduct<T>& p) {
  if constexpr (kVectors > 0) {
    if (p.vectors == kVectors) return product_tile<T, kRows, kVectors>(p);
    product_rows<T, kRows, kVectors - 1>(p);
  }
}

template <typename T>
void product(const ConvProduct<T>& p) {
  switch (p.rows) {
    case 1: return product_rows<T, 1>(p);
    case 2: return product_rows<T, 2>(p);
    case 3: return product_rows<T, 3>(p);
    default: return product_rows<T, kMaxRows>(p);
  }
}

// --- planes without columns of padding

template <typename T>
struct FromLeft {
  static constexpr int of(int i) { return kLanes<T> - 1 + i; }
};
template <typename T>
struct FromRight {
  static constexpr int of(int i) { return 1 + i; }
};

// What one direction of a shift leaves (ConvEdges), for the vectors of a tile, the same every kPeriod vectors.
template <typename T, int kPeriod>
struct Edge {
  const T* numbers;
  explicit Edge(const T* numbers) : numbers(numbers) {}
};

// One column to the right: the number left of v[i][0] is the last of `before`, or none.
template <typename T, int kPeriod>
UASPARSE_INLINE Vec<T> from_left(Vec<T> before, Vec<T> v, const Edge<T, kPeriod>& edge, int i) {
  using Bits = Vec<typename SameSizeInt<T>::type>;
  return Vec<T>(Bits(shuffle<T, FromLeft<T>>(before, v)) & Bits(load(edge.numbers + i * kLanes<T>)));
}
template <typename T, int kPeriod>
UASPARSE_INLINE Vec<T> from_right(Vec<T> v, Vec<T> after, const Edge<T, kPeriod>& edge, int i) {
  using Bits = Vec<typename SameSizeInt<T>::type>;
  return Vec<T>(Bits(shuffle<T, FromRight<T>>(v, after)) & Bits(load(edge.numbers + i * kLanes<T>)));
}

template <typename T>
constexpr bool kHasBits = UASPARSE_VECTOR_BYTES == 64 && sizeof(T) == 4;

#if UASPARSE_VECTOR_BYTES == 64
// One instruction: the edge is bits, made once a call, in registers where it repeats, and no permutation's indices are.
template <int kPeriod>
struct Edge<float, kPeriod> {
  __mmask16 bits[kPeriod];
  explicit Edge(const float* numbers) {
    for (int i = 0; i < kPeriod; ++i) bits[i] = _mm512_movepi32_mask(_mm512_loadu_si512(numbers + i * kLanes<float>));
  }
};
template <int kPeriod>
UASPARSE_INLINE Vec<float> from_left(Vec<float> before, Vec<float> v, const Edge<float, kPeriod>& edge, int i) {
  return Vec<float>(_mm512_maskz_alignr_epi32(edge.bits[i % kPeriod], __m512i(v), __m512i(before), 15));
}
template <int kPeriod>
UASPARSE_INLINE Vec<float> from_right(Vec<float> v, Vec<float> after, const Edge<float, kPeriod>& edge, int i) {
  return Vec<float>(_mm512_maskz_alignr_epi32(edge.bits[i % kPeriod], __m512i(after), __m512i(v), 1));
}
#endif

// One column to the right: each number takes the place of its right neighbour.
template <typename T, int kVectors, int kPeriod>
UASPARSE_INLINE void shift_right(Vec<T> (&v)[kVectors], const Edge<T, kPeriod>& edge) {
  for (int i = kVectors - 1; i >= 0; --i) v[i] = from_left(i > 0 ? v[i - 1] : Vec<T>{}, v[i], edge, i);
}
template <typename T, int kVectors, int kPeriod>
UASPARSE_INLINE void shift_left(Vec<T> (&v)[kVectors], const Edge<T, kPeriod>& edge) {
  for (int i = 0; i < kVectors; ++i) v[i] = from_right(v[i], i + 1 < kVectors ? v[i + 1] : Vec<T>{}, edge, i);
}

template <typename T, int kVectors>
UASPARSE_INLINE void add_entries(const ConvEntry<T>* entry, const ConvEntry<T>* end, const T* source,
                                 Vec<T> (&sum)[kVectors]) {
  for (; entry != end; ++entry) {
    const T* from = source + entry->offset;
    const Vec<T> value = broadcast<T>(entry->value);
    for (int v = 0; v < kVectors; ++v) sum[v] += value * load(from + v * kLanes<T>);
  }
}

template <typename T, int kVectors, int kPeriod>
void shifted_product_tile(const ConvShiftedProduct<T>& p) {
  constexpr int L = kLanes<T>;
  const int64_t zero = p.zero, segments = p.segments;
  const Edge<T, kPeriod> left_edge(p.edges.from_left), right_edge(p.edges.from_right);
  for (int64_t c = p.begin; c < p.end; ++c) {
    const int32_t* const first = p.first + c * segments;
    T* const out = p.out + c * p.out_channel;
    if (!p.start && first[0] == first[segments]) continue;
    // The next channel's place is in L2 or, where `out` is the output itself, farther away.
    if (c + 1 < p.end)
      for (int v = 0; v < kVectors; ++v) __builtin_prefetch(out + p.out_channel + v * L, 1);
    const auto add = [&](int64_t s, Vec<T>(&sum)[kVectors]) UASPARSE_LAMBDA {
      add_entries<T, kVectors>(p.entries + first[s], p.entries + first[s + 1], p.source, sum);
    };
    // Sources on the right of their outputs, the farthest first; then those on the left; then those in place.
    T right[kVectors * L];
    const bool has_left = first[0] != first[zero], has_right = first[zero + 1] != first[segments];
    Vec<T> sum[kVectors] = {};
    if (has_right) {
      for (int64_t s = segments - 1; s > zero; --s) {
        add(s, sum);
        shift_left<T>(sum, right_edge);
      }
      if (has_left)
        for (int v = 0; v < kVectors; ++v) {
          store(right + v * L, sum[v]);
          sum[v] = Vec<T>{};
        }
    }
    if (has_left)
      for (int64_t s = 0; s < zero; ++s) {
        add(s, sum);
        shift_right<T>(sum, left_edge);
      }
    if (p.start) {
      const Vec<T> bias = broadcast<T>(p.bias ? p.bias[c] : T(0));
      for (int v = 0; v < kVectors; ++v) sum[v] += bias;
    } else {
      for (int v = 0; v < kVectors; ++v) sum[v] += load(out + v * L);
    }
    add(zero, sum);
    if (has_left && has_right)
      for (int v = 0; v < kVectors; ++v) sum[v] += load(right + v * L);
    for (int v = 0; v < kVectors; ++v) store(out + v * L, sum[v]);
  }
}

template <typename T, int kVectors = kMaxVectors<T>>
void shifted_product(const ConvShiftedProduct<T>& p) {
  if constexpr (kVectors > 0) {
    constexpr int kPeriod = kHasBits<T> ? 2 : kVectors;
    if (p.vectors == kVectors && p.edges.repeat) return shifted_product_tile<T, kVectors, kPeriod>(p);
    if (p.vectors == kVectors) return shifted_product_tile<T, kVectors, kVectors>(p);
    shifted_product<T, kVectors - 1>(p);
  }
}

}  // namespace uasparse::UASPARSE_ISA

#include "cpu/conv_dots_impl.h"
#include "cpu/conv_moves_impl.h"
#include "cpu/conv_quads_impl.h"

#include "cpu/conv_plane_quads_impl.h"

namespace uasparse::UASPARSE_ISA {

template <typename T>
constexpr auto shifted_dots_or_null() -> void (*)(const ConvShiftedDots<T>&) {
  if constexpr (kHasEightSums)
    return shifted_dots<T>;
  else
    return nullptr;
}

template <typename T>
constexpr auto split_or_null() -> void (*)(const ConvColumns<T, const T>&) {
#if UASPARSE_VECTOR_BYTES == 64
  if constexpr (sizeof(T) == 4) return split_columns;
#endif
  return nullptr;
}
template <typename T>
constexpr auto join_or_null() -> void (*)(const ConvColumns<const T, T>&) {
#if UASPARSE_VECTOR_BYTES == 64
  if constexpr (sizeof(T) == 4) return join_columns;
#endif
  return nullptr;
}

template <typename T>
constexpr ConvKernels<T> kConvKernels = {
    kLanes<T>,       kMaxVectors<T>,     kMaxRows,       product<T>,   sddmm<T>,           kMaxPiece<T>,
    piece_sddmm<T>,  kQuadVectors<T>,    quad_product<T>, quad_sddmm<T>, shifted_product<T>, shifted_dots_or_null<T>(),
    plane_quad_product_or_null<T>(), plane_quad_dots_or_null<T>(),
    copy_planes<T>,  split_or_null<T>(), join_or_null<T>(),
    pack<T, T>,      unpack<T, T>,       pack<T, BFloat16>, unpack<T, BFloat16>,
};

const ConvKernels<float> conv_float = kConvKernels<float>;
const ConvKernels<double> conv_double = kConvKernels<double>;

}  // namespace uasparse::UASPARSE_ISA
