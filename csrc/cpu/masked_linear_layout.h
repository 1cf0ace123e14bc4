// Activations between rows [batch][channels] and panels [channels][width], for one instruction set: L x L tiles are
// transposed in registers (L lanes), log2(L) stages of shuffles. Part of masked_linear_impl.h.

namespace uasparse::UASPARSE_ISA {
namespace {

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
// Vectors at a time: conversions one by one would take longer than a product.
typedef uint16_t Halves __attribute__((vector_size(UASPARSE_VECTOR_BYTES / 2)));
typedef uint32_t Bits32 __attribute__((vector_size(UASPARSE_VECTOR_BYTES)));

template <typename T>
UASPARSE_INLINE Vec<T> load_numbers(const uint16_t* from) {
  static_assert(sizeof(T) == 4);
  Halves halves;
  __builtin_memcpy(&halves, from, sizeof halves);
  return reinterpret_cast<Vec<T>>(__builtin_convertvector(halves, Bits32) << 16);
}
template <typename T>
UASPARSE_INLINE void store_numbers(T* to, Vec<T> v) {
  store<T>(to, v);
}
template <typename T>
UASPARSE_INLINE void store_numbers(uint16_t* to, Vec<T> v) {
  static_assert(sizeof(T) == 4);
  const Bits32 bits = reinterpret_cast<Bits32>(v), is_nan = reinterpret_cast<Bits32>(v != v);
  const Bits32 rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16, quiet = (bits >> 16) | 0x40;
  const Halves halves = __builtin_convertvector((quiet & is_nan) | (rounded & ~is_nan), Halves);
  __builtin_memcpy(to, &halves, sizeof halves);
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

}  // namespace
}  // namespace uasparse::UASPARSE_ISA
