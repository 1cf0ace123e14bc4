// Vectors of the instruction set in force (isa_begin.h): GCC/Clang vector extensions behind a few names.
// Arithmetic is the built-in one; `a * b + c` contracts to a fused multiply-add where the set has one.

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

#define UASPARSE_INLINE inline __attribute__((always_inline))

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

}  // namespace uasparse::UASPARSE_ISA
