// Vectors of the instruction set in force (isa_begin.h): GCC/Clang vector extensions behind a few names.
// The including file includes <utility> before isa_begin.h. Arithmetic is the built-in one; `a * b + c` contracts to a fused multiply-add where the set has one.

namespace uasparse::UASPARSE_ISA {

template <typename T>
struct VecOf {
  typedef T type __attribute__((vector_size(UASPARSE_VECTOR_BYTES)));
  static constexpr int lanes = UASPARSE_VECTOR_BYTES / sizeof(T);
};
template <typename T>
using Vec = typename VecOf<T>::type;
template <typename T>
constexpr int kLanes = VecOf<T>::lanes;

// The lambdas of kernels are inlined too: as functions of their own they would lose the registers' contents.
#define UASPARSE_INLINE inline __attribute__((always_inline))
#define UASPARSE_LAMBDA __attribute__((always_inline))

template <typename T>
UASPARSE_INLINE Vec<T> load(const T* from) {
  Vec<T> v;
  __builtin_memcpy(&v, from, sizeof v);
  return v;
}

template <typename T>
UASPARSE_INLINE void store(T* to, Vec<T> v) {
  __builtin_memcpy(to, &v, sizeof v);
}

template <typename T>
UASPARSE_INLINE Vec<T> broadcast(T x) {
  return x - Vec<T>{};
}

template <typename T>
UASPARSE_INLINE T sum(Vec<T> v) {
  T total = 0;
  for (int i = 0; i < kLanes<T>; ++i) total += v[i];
  return total;
}

// What one stage of a transpose or of a reduction does to lanes in groups of 2 * H. With a = [a0 a1], b = [b0 b1] in
// each group (halves of H lanes):   low = [a0 b0]   high = [a1 b1]   outer = [a0 b1]   inner = [a1 b0].
template <typename T, int H>
struct Stage {
  typedef decltype(Vec<T>{} < Vec<T>{}) Mask;
  enum Kind { low, high, outer, inner };

  // The lane of [a b] that goes to `lane`.
  static constexpr int from(Kind kind, int lane) {
    const bool first = lane % (2 * H) < H;
    if (kind == low && !first) return lane - H + kLanes<T>;
    if (kind == high && first) return lane + H;
    if (kind == inner) return first ? lane + H : lane - H + kLanes<T>;
    return first ? lane : lane + kLanes<T>;
  }

  static UASPARSE_INLINE Mask mask(Kind kind) {
    Mask m{};
#pragma GCC unroll 16
    for (int lane = 0; lane < kLanes<T>; ++lane) m[lane] = from(kind, lane);
    return m;
  }

  template <Kind kind>
  static UASPARSE_INLINE Vec<T> shuffle(Vec<T> a, Vec<T> b) {
#ifdef __clang__
    return shuffle_lanes<kind>(a, b, std::make_integer_sequence<int, kLanes<T>>{});
#else
    return __builtin_shuffle(a, b, mask(kind));
#endif
  }

#ifdef __clang__
  template <Kind kind, int... lane>
  static UASPARSE_INLINE Vec<T> shuffle_lanes(Vec<T> a, Vec<T> b, std::integer_sequence<int, lane...>) {
    return __builtin_shufflevector(a, b, from(kind, lane)...);
  }
#endif
};

// All lanes together, halves at a time: a shuffle and an addition each.
template <typename T, int H = kLanes<T> / 2>
UASPARSE_INLINE T sum_of_lanes(Vec<T> x) {
  const Vec<T> both = x + Stage<T, H>::template shuffle<Stage<T, H>::inner>(x, x);
  if constexpr (H > 1) return sum_of_lanes<T, H / 2>(both);
  else return both[0];
}

}  // namespace uasparse::UASPARSE_ISA
