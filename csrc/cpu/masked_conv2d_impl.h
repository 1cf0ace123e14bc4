// Inner loops of masked_conv2d (contracts: masked_conv2d.h), for the instruction set in force.
//
// product: a tile of rows x vectors output positions of one output channel stays in registers while the channel's
//   entries stream by; an entry is one broadcast and one multiply-add with a memory operand a vector. The tile is as
//   large as the registers allow, because the entry's own cost (two loads) is spread over it.
// shifted_product: the same for planes without columns of padding, where the sums are shifted by whole columns once for all
//   entries that need it, instead of the source once for each column of the kernel.
// sddmm: kGroup entries of one output channel take the dot product of the same grad_output positions with their input
//   positions together, one accumulator each; a tree adds the lanes of all of them at the end.
// pack, unpack: lanes x lanes transposes in registers between images and packed vectors.

#include "cpu/vec.h"

namespace uasparse::UASPARSE_ISA {

template <typename T>
constexpr int kMaxVectors = UASPARSE_VECTOR_BYTES == 64 ? 16 : UASPARSE_VECTOR_BYTES == 32 ? 12 : 8;
constexpr int kMaxRows = 4;
constexpr int kGroup = kConvGroup;

// --- product

template <typename T, int kRows, int kVectors>
void product_tile(const ConvProduct<T>& p) {
  constexpr int L = kLanes<T>;
  const int64_t last = p.last;
  const auto at = [last](int v) UASPARSE_LAMBDA { return v + 1 < kVectors ? int64_t(v * L) : last; };
  for (int64_t c = p.begin; c < p.end; ++c) {
    const ConvEntry<T>* entry = p.entries + p.first[c];
    const ConvEntry<T>* const end = p.entries + p.first[c + 1];
    T* const out = p.out + c * p.out_channel;
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

// --- shuffles

template <typename T>
struct SameSizeInt;
template <>
struct SameSizeInt<float> {
  using type = int32_t;
};
template <>
struct SameSizeInt<double> {
  using type = int64_t;
};

#ifndef __has_builtin
#define __has_builtin(x) 0
#endif

template <typename T, typename Index, int... I>
UASPARSE_INLINE Vec<T> shuffle_by(Vec<T> a, Vec<T> b, Index, std::integer_sequence<int, I...>) {
#if __has_builtin(__builtin_shufflevector)
  return __builtin_shufflevector(a, b, Index::of(I)...);
#else
  return __builtin_shuffle(a, b, Vec<typename SameSizeInt<T>::type>{Index::of(I)...});
#endif
}

// Lane i of the result is lane Index::of(i) of a and b, one after the other.
template <typename T, typename Index>
UASPARSE_INLINE Vec<T> shuffle(Vec<T> a, Vec<T> b) {
  return shuffle_by<T>(a, b, Index{}, std::make_integer_sequence<int, kLanes<T>>{});
}

// Within chunks of kChunk lanes: runs of kRun lanes of the lower (kUpper = 0) or upper half of a and b alternate.
template <typename T, int kChunk, int kRun, int kUpper>
struct Interleave {
  static constexpr int of(int i) {
    const int chunk = i / kChunk, lane = i % kChunk, run = lane / kRun;
    return (run % 2) * kLanes<T> + chunk * kChunk + kUpper * kChunk / 2 + run / 2 * kRun + lane % kRun;
  }
};

template <typename T, int kChunk, int kRun>
UASPARSE_INLINE void interleave(Vec<T>& a, Vec<T>& b) {
  const Vec<T> lower = shuffle<T, Interleave<T, kChunk, kRun, 0>>(a, b);
  b = shuffle<T, Interleave<T, kChunk, kRun, 1>>(a, b);
  a = lower;
}

// v[i] lane j <-> v[j] lane i, in log2(lanes) rounds; the first ones stay inside 128 bits, where shuffles are cheap.
template <typename T>
UASPARSE_INLINE void transpose(Vec<T> (&v)[kLanes<T>]) {
  constexpr int L = kLanes<T>, S = 16 / sizeof(T), G = L / S;
  // S x S blocks inside the 128-bit lanes, for each S consecutive vectors.
  for (int g = 0; g < L; g += S) {
    if constexpr (S == 2) {
      interleave<T, 2, 1>(v[g], v[g + 1]);
    } else {
      interleave<T, 4, 1>(v[g], v[g + 2]);      // a0c0a1c1, a2c2a3c3
      interleave<T, 4, 1>(v[g + 1], v[g + 3]);  // b0d0b1d1, b2d2b3d3
      interleave<T, 4, 1>(v[g], v[g + 1]);      // a0b0c0d0, a1b1c1d1
      interleave<T, 4, 1>(v[g + 2], v[g + 3]);
    }
  }
  // The G x G blocks among the 128-bit lanes.
  for (int i = 0; i < S; ++i) {
    if constexpr (G == 2) {
      interleave<T, L, S>(v[i], v[S + i]);
    } else if constexpr (G == 4) {
      interleave<T, L, S>(v[i], v[2 * S + i]);
      interleave<T, L, S>(v[S + i], v[3 * S + i]);
      interleave<T, L, S>(v[i], v[S + i]);
      interleave<T, L, S>(v[2 * S + i], v[3 * S + i]);
    }
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

// Keeps the numbers where `edge` is all ones.
template <typename T>
UASPARSE_INLINE Vec<T> inside(Vec<T> v, const T* edge) {
  using Bits = Vec<typename SameSizeInt<T>::type>;
  return Vec<T>(Bits(v) & Bits(load(edge)));
}

// One column to the right: each number takes the place of its right neighbour.
template <typename T, int kVectors>
UASPARSE_INLINE void shift_right(Vec<T> (&v)[kVectors], const T* from_left) {
  for (int i = kVectors - 1; i >= 0; --i)
    v[i] = inside<T>(shuffle<T, FromLeft<T>>(i > 0 ? v[i - 1] : Vec<T>{}, v[i]), from_left + i * kLanes<T>);
}
template <typename T, int kVectors>
UASPARSE_INLINE void shift_left(Vec<T> (&v)[kVectors], const T* from_right) {
  for (int i = 0; i < kVectors; ++i)
    v[i] = inside<T>(shuffle<T, FromRight<T>>(v[i], i + 1 < kVectors ? v[i + 1] : Vec<T>{}), from_right + i * kLanes<T>);
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

template <typename T, int kVectors>
void shifted_product_tile(const ConvShiftedProduct<T>& p) {
  constexpr int L = kLanes<T>;
  const int64_t zero = p.zero, segments = p.segments;
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
    const bool has_right = first[zero + 1] != first[segments];
    Vec<T> sum[kVectors] = {};
    if (has_right) {
      for (int64_t s = segments - 1; s > zero; --s) {
        add(s, sum);
        shift_left<T, kVectors>(sum, p.edges.from_right);
      }
      for (int v = 0; v < kVectors; ++v) {
        store(right + v * L, sum[v]);
        sum[v] = Vec<T>{};
      }
    }
    if (first[0] != first[zero])
      for (int64_t s = 0; s < zero; ++s) {
        add(s, sum);
        shift_right<T, kVectors>(sum, p.edges.from_left);
      }
    if (p.start) {
      const Vec<T> bias = broadcast<T>(p.bias ? p.bias[c] : T(0));
      for (int v = 0; v < kVectors; ++v) sum[v] += bias;
    } else {
      for (int v = 0; v < kVectors; ++v) sum[v] += load(out + v * L);
    }
    add(zero, sum);
    if (has_right)
      for (int v = 0; v < kVectors; ++v) sum[v] += load(right + v * L);
    for (int v = 0; v < kVectors; ++v) store(out + v * L, sum[v]);
  }
}

template <typename T, int kVectors = kMaxVectors<T>>
void shifted_product(const ConvShiftedProduct<T>& p) {
  if constexpr (kVectors > 0) {
    if (p.vectors == kVectors) return shifted_product_tile<T, kVectors>(p);
    shifted_product<T, kVectors - 1>(p);
  }
}

// --- sddmm

// to[0 ... 3] += the numbers at from.
template <typename T>
UASPARSE_INLINE void add_four(const T* from, T* to) {
  typedef T Four __attribute__((vector_size(4 * sizeof(T))));
  Four a, b;
  __builtin_memcpy(&a, from, sizeof a);
  __builtin_memcpy(&b, to, sizeof b);
  a += b;
  __builtin_memcpy(to, &a, sizeof a);
}

// to[i] += sum of the lanes of v[i], i < count.
template <typename T>
UASPARSE_INLINE void add_lane_sums(Vec<T> (&v)[kGroup], T* to, int count) {
  static_assert(kGroup == 8);
  constexpr int L = kLanes<T>;
  T lanes[2 * kGroup];
  constexpr int kUpper = sizeof(T) == 4 && L > 8 ? L / 2 : 4;  // where the sums of v[4 ... 7] begin
  if constexpr (sizeof(T) == 4) {
    for (int g = 0; g < kGroup; g += 4) {
      for (int i = 0; i < 2; ++i) {
        interleave<T, 4, 1>(v[g + i], v[g + i + 2]);
        v[g + i] += v[g + i + 2];
      }
      interleave<T, 4, 1>(v[g], v[g + 1]);
      v[g] += v[g + 1];  // in each 128 bits a partial sum of v[g] ... v[g + 3]
    }
    if constexpr (L == 4) {
      store(lanes, v[0]);
      store(lanes + 4, v[4]);
    } else {
      interleave<T, L, L / 2>(v[0], v[4]);
      v[0] += v[4];
      if constexpr (L == 16) {
        // Two partial sums are left of each: [v0-3, v0-3, v4-7, v4-7].
        v[1] = v[0];
        interleave<T, L / 2, 4>(v[0], v[1]);
        v[0] += v[1];
      }
      store(lanes, v[0]);
    }
  } else {
    for (int i = 0; i < kGroup; ++i) lanes[i] = sum<T>(v[i]);
  }
  if (count == kGroup) {
    add_four(lanes, to);
    add_four(lanes + kUpper, to + 4);
  } else {
    for (int i = 0; i < count; ++i) to[i] += lanes[i < 4 ? i : i - 4 + kUpper];
  }
}

// to[i] += sum of the lanes of v[i].
template <typename T>
UASPARSE_INLINE void add_four_sums(Vec<T> (&v)[4], T* to) {
  constexpr int L = kLanes<T>;
  T sums[4];
  if constexpr (sizeof(T) == 4) {
    interleave<T, 4, 1>(v[0], v[2]);
    interleave<T, 4, 1>(v[1], v[3]);
    v[0] += v[2];
    v[1] += v[3];
    interleave<T, 4, 1>(v[0], v[1]);
    v[0] += v[1];  // in each 128 bits a partial sum of each
    T parts[L];
    store(parts, v[0]);
    typedef T Four __attribute__((vector_size(4 * sizeof(T))));
    Four total, part;
    __builtin_memcpy(&total, parts, sizeof total);
    for (int k = 4; k < L; k += 4) {
      __builtin_memcpy(&part, parts + k, sizeof part);
      total += part;
    }
    __builtin_memcpy(sums, &total, sizeof total);
  } else {
    for (int i = 0; i < 4; ++i) sums[i] = sum_of_lanes<T>(v[i]);
  }
  add_four(sums, to);
}

// The numbers of v where `wanted` is one, zero where it is zero.
template <typename T>
UASPARSE_INLINE Vec<T> keep(Vec<T> v, Vec<T> wanted) {
  using Bits = Vec<typename SameSizeInt<T>::type>;
  return Vec<T>(Bits(v) & Bits(wanted != Vec<T>{}));
}

template <typename T, int kCount>
UASPARSE_INLINE void sddmm_group(const ConvSddmm<T>& p, const T* grad_output, const int32_t* offset, T* grad) {
  constexpr int L = kLanes<T>;
  // Few entries: several sums each, so that the latency of the multiply-add does not bound the loop.
  constexpr int kChains = kCount <= 2 ? 4 : kCount <= 4 ? 2 : 1;
  Vec<T> sum[kCount][kChains] = {};
  const T* input[kCount];
  for (int i = 0; i < kCount; ++i) input[i] = p.input + offset[i];
  for (int64_t r = 0; r < p.rows; ++r) {
    const T* g = grad_output + r * p.grad_row;
    int64_t at = r * p.input_row;
    const int64_t end = at + p.vectors * L;
    for (; at + (kChains - 1) * L < end; at += kChains * L, g += kChains * L)
      for (int k = 0; k < kChains; ++k) {
        const Vec<T> v = load(g + k * L);
        for (int i = 0; i < kCount; ++i) sum[i][k] += v * load(input[i] + at + k * L);
      }
    for (; at < end; at += L, g += L) {
      const Vec<T> v = load(g);
      for (int i = 0; i < kCount; ++i) sum[i][0] += v * load(input[i] + at);
    }
  }
  Vec<T> total[kGroup] = {};
  for (int i = 0; i < kCount; ++i) {
    total[i] = sum[i][0];
    for (int k = 1; k < kChains; ++k) total[i] += sum[i][k];
  }
  add_lane_sums<T>(total, grad, kCount);
}

template <typename T>
void sddmm(const ConvSddmm<T>& p) {
  static_assert(kGroup == 8);
  for (int64_t c = p.begin; c < p.end; ++c) {
    const T* grad_output = p.grad_output + c * p.grad_channel;
    if (c + 1 < p.end) {
      // What the next channel needs comes from L2 or beyond, as other channels passed since.
      const int64_t next = p.first[(c + 1) * p.first_stride];
      __builtin_prefetch(p.offset + next);
      __builtin_prefetch(p.grad + next, 1);
      for (int64_t r = 0; r < p.rows; ++r)
        for (int64_t x = 0; x < p.vectors * kLanes<T>; x += 64 / sizeof(T))
          __builtin_prefetch(grad_output + p.grad_channel + r * p.grad_row + x);
    }
    int64_t i = p.first[c * p.first_stride];
    const int64_t end = p.first[c * p.first_stride + 1];
    for (; i + kGroup <= end; i += kGroup) sddmm_group<T, kGroup>(p, grad_output, p.offset + i, p.grad + i);
    switch (end - i) {
      case 7: sddmm_group<T, 7>(p, grad_output, p.offset + i, p.grad + i); break;
      case 6: sddmm_group<T, 6>(p, grad_output, p.offset + i, p.grad + i); break;
      case 5: sddmm_group<T, 5>(p, grad_output, p.offset + i, p.grad + i); break;
      case 4: sddmm_group<T, 4>(p, grad_output, p.offset + i, p.grad + i); break;
      case 3: sddmm_group<T, 3>(p, grad_output, p.offset + i, p.grad + i); break;
      case 2: sddmm_group<T, 2>(p, grad_output, p.offset + i, p.grad + i); break;
      case 1: sddmm_group<T, 1>(p, grad_output, p.offset + i, p.grad + i); break;
      default: break;
    }
  }
}

// Held in registers while entries pass: vectors of grad_output.
template <typename T>
constexpr int kMaxPiece = UASPARSE_VECTOR_BYTES == 64 ? 24 : 10;

template <typename T, int kImages, int kVectors>
void piece_sddmm_of(const ConvPieceSddmm<T>& p) {
  constexpr int L = kLanes<T>, kTogether = 4;
  const int64_t last = p.last;
  const auto at = [last](int v) UASPARSE_LAMBDA { return v + 1 < kVectors ? int64_t(v * L) : last; };
  alignas(64) T fresh[L];
  for (int l = 0; l < L; ++l) fresh[l] = l < p.known ? T(0) : T(1);
  for (int64_t c = p.begin; c < p.end; ++c) {
    int64_t i = p.first[c * p.first_stride];
    const int64_t end = p.first[c * p.first_stride + 1];
    // The next channel's piece comes from L2 or beyond.
    if (c + 1 < p.end)
      for (int n = 0; n < kImages; ++n)
        for (int64_t x = 0; x < kVectors * L; x += 64 / sizeof(T))
          __builtin_prefetch(p.grad_output + (c + 1) * p.grad_channel + n * p.grad_image + x);
    if (i == end) continue;
    Vec<T> grad_output[kImages][kVectors] = {};
#pragma GCC unroll 4
    for (int n = 0; n < kImages; ++n) {
#pragma GCC unroll 32
      for (int v = 0; v < kVectors; ++v)
        grad_output[n][v] = load(p.grad_output + c * p.grad_channel + n * p.grad_image + at(v));
      // Not by a product: what is no number would stay none.
      if (p.known > 0) grad_output[n][kVectors - 1] = keep<T>(grad_output[n][kVectors - 1], load(fresh));
    }
    const auto dot = [&](const T* input) UASPARSE_LAMBDA {
      Vec<T> sum = {};
#pragma GCC unroll 4
      for (int n = 0; n < kImages; ++n)
#pragma GCC unroll 32
        for (int v = 0; v < kVectors; ++v) sum += grad_output[n][v] * load(input + n * p.input_image + at(v));
      return sum;
    };
    for (; i + kTogether <= end; i += kTogether) {
      Vec<T> sums[kTogether];
#pragma GCC unroll 4
      for (int k = 0; k < kTogether; ++k) sums[k] = dot(p.input + p.offset[i + k]);
      add_four_sums<T>(sums, p.grad + i);
    }
    for (; i < end; ++i) p.grad[i] += sum_of_lanes<T>(dot(p.input + p.offset[i]));
  }
}

template <typename T, int kImages, int kVectors = kMaxPiece<T> / kImages>
void piece_sddmm_vectors(const ConvPieceSddmm<T>& p) {
  if constexpr (kVectors > 0) {
    if (p.vectors == kVectors) return piece_sddmm_of<T, kImages, kVectors>(p);
    piece_sddmm_vectors<T, kImages, kVectors - 1>(p);
  }
}

template <typename T>
void piece_sddmm(const ConvPieceSddmm<T>& p) {
  switch (p.images) {
    case 1: return piece_sddmm_vectors<T, 1>(p);
    case 2: return piece_sddmm_vectors<T, 2>(p);
    case 3: return piece_sddmm_vectors<T, 3>(p);
    default: return piece_sddmm_vectors<T, kMaxRows>(p);
  }
}

// --- pack and unpack

template <typename T>
UASPARSE_INLINE T to_number(T x) {
  return x;
}
template <typename T>
UASPARSE_INLINE T to_number(BFloat16 x) {
  const uint32_t bits = uint32_t(x.bits) << 16;
  float value;
  __builtin_memcpy(&value, &bits, sizeof value);
  return value;
}

UASPARSE_INLINE void from_number(float x, float* to) { *to = x; }
UASPARSE_INLINE void from_number(double x, double* to) { *to = x; }
UASPARSE_INLINE void from_number(float x, BFloat16* to) {
  uint32_t bits;
  __builtin_memcpy(&bits, &x, sizeof bits);
  // To nearest, ties to even; a NaN stays one.
  to->bits = x != x ? uint16_t(0x7fc0) : uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}
UASPARSE_INLINE void from_number(double x, BFloat16* to) { from_number(float(x), to); }

template <typename T, typename S>
UASPARSE_INLINE Vec<T> load_as(const S* from) {
  T numbers[kLanes<T>];
  for (int i = 0; i < kLanes<T>; ++i) numbers[i] = to_number<T>(from[i]);
  return load(numbers);
}
template <>
UASPARSE_INLINE Vec<float> load_as<float, float>(const float* from) {
  return load(from);
}
template <>
UASPARSE_INLINE Vec<double> load_as<double, double>(const double* from) {
  return load(from);
}

template <typename T, typename S>
UASPARSE_INLINE void store_as(S* to, Vec<T> v) {
  T numbers[kLanes<T>];
  store(numbers, v);
  for (int i = 0; i < kLanes<T>; ++i) from_number(numbers[i], to + i);
}
template <>
UASPARSE_INLINE void store_as<float, float>(float* to, Vec<float> v) {
  store(to, v);
}
template <>
UASPARSE_INLINE void store_as<double, double>(double* to, Vec<double> v) {
  store(to, v);
}

template <typename T, typename S>
bool all_present(S* const* images) {
  bool all = true;
  for (int l = 0; l < kLanes<T>; ++l) all = all && images[l] != nullptr;
  return all;
}

template <typename T, typename S, bool kAll>
void pack_lanes(const ConvMove<T>& m, const S* const* images) {
  constexpr int L = kLanes<T>;
  for (int64_t i = 0; i < m.outer; ++i) {
    if (m.outer_offset[i] < 0) continue;
    T* const to = m.packed + m.outer_offset[i];
    const int64_t from = i * m.outer_stride;
    int64_t j = 0;
    if (m.inner_stride == 1) {
      for (; j + L <= m.inner; j += L) {
        Vec<T> v[L];
        for (int l = 0; l < L; ++l)
          v[l] = kAll || images[l] != nullptr ? load_as<T, S>(images[l] + from + j) : Vec<T>{};
        transpose<T>(v);
        for (int k = 0; k < L; ++k)
          if (m.inner_offset[j + k] >= 0) store(to + m.inner_offset[j + k], v[k]);
      }
    }
    for (; j < m.inner; ++j) {
      if (m.inner_offset[j] < 0) continue;
      T numbers[L];
      for (int l = 0; l < L; ++l)
        numbers[l] = kAll || images[l] != nullptr ? to_number<T>(images[l][from + j * m.inner_stride]) : T(0);
      store(to + m.inner_offset[j], load(numbers));
    }
  }
}

template <typename T, typename S>
void pack(const ConvMove<T>& m, const S* const* images) {
  all_present<T>(images) ? pack_lanes<T, S, true>(m, images) : pack_lanes<T, S, false>(m, images);
}

template <typename T, typename S, bool kAll>
void unpack_lanes(const ConvMove<T>& m, S* const* images) {
  constexpr int L = kLanes<T>;
  for (int64_t i = 0; i < m.outer; ++i) {
    if (m.outer_offset[i] < 0) continue;
    const T* const from = m.packed + m.outer_offset[i];
    const int64_t to = i * m.outer_stride;
    int64_t j = 0;
    if (m.inner_stride == 1) {
      for (; j + L <= m.inner; j += L) {
        Vec<T> v[L];
        for (int k = 0; k < L; ++k) v[k] = load(from + m.inner_offset[j + k]);
        transpose<T>(v);
        for (int l = 0; l < L; ++l)
          if (kAll || images[l] != nullptr) store_as<T, S>(images[l] + to + j, v[l]);
      }
    }
    for (; j < m.inner; ++j) {
      const T* numbers = from + m.inner_offset[j];
      for (int l = 0; l < L; ++l)
        if (kAll || images[l] != nullptr) from_number(numbers[l], images[l] + to + j * m.inner_stride);
    }
  }
}

template <typename T, typename S>
void unpack(const ConvMove<T>& m, S* const* images) {
  all_present<T>(images) ? unpack_lanes<T, S, true>(m, images) : unpack_lanes<T, S, false>(m, images);
}

// --- planes

// Short rows of many lengths, so no call of memcpy.
template <typename T>
UASPARSE_INLINE void copy_run(const T* from, T* to, int64_t width) {
  constexpr int64_t kBytes = 32, kChunk = kBytes / sizeof(T);
  if (width >= kChunk) {
    for (int64_t x = 0; x + kChunk < width; x += kChunk) __builtin_memcpy(to + x, from + x, kBytes);
    __builtin_memcpy(to + width - kChunk, from + width - kChunk, kBytes);
  } else {
    for (int64_t x = 0; x < width; ++x) to[x] = from[x];
  }
}

template <typename T, int kWidth>
void copy_planes_as(const ConvPlanes<T>& p) {
  for (int64_t c = 0; c < p.channels; ++c)
    for (int64_t i = 0; i < p.images; ++i) {
      const T* from = p.from + c * p.from_channel + i * p.from_image;
      T* to = p.to + c * p.to_channel + i * p.to_image;
      for (int64_t r = 0; r < p.rows; ++r, from += p.from_row, to += p.to_row)
        copy_run<T>(from, to, kWidth ? kWidth : p.width);
    }
}

template <typename T>
void copy_planes(const ConvPlanes<T>& p) {
  switch (p.width) {
    case 4: return copy_planes_as<T, 4>(p);
    case 8: return copy_planes_as<T, 8>(p);
    default: return copy_planes_as<T, 0>(p);
  }
}

}  // namespace uasparse::UASPARSE_ISA

#include "cpu/conv_quads_impl.h"

namespace uasparse::UASPARSE_ISA {

template <typename T>
constexpr ConvKernels<T> kConvKernels = {
    kLanes<T>,       kMaxVectors<T>,     kMaxRows,       product<T>,   sddmm<T>,           kMaxPiece<T>,
    piece_sddmm<T>,  kQuadVectors<T>,    quad_product<T>, quad_sddmm<T>, shifted_product<T>, copy_planes<T>,
    pack<T, T>,      unpack<T, T>,       pack<T, BFloat16>, unpack<T, BFloat16>,
};

const ConvKernels<float> conv_float = kConvKernels<float>;
const ConvKernels<double> conv_double = kConvKernels<double>;

}  // namespace uasparse::UASPARSE_ISA
