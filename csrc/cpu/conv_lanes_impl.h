// Shuffles, transposes and sums of lanes for the kernels of masked_conv2d, for the instruction set in force.

#include "cpu/vec.h"

namespace uasparse::UASPARSE_ISA {

constexpr int kGroup = kConvGroup;

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

}  // namespace uasparse::UASPARSE_ISA
