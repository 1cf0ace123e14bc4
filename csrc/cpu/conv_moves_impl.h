// Moves of masked_conv2d between images and what its kernels read (contracts: masked_conv2d.h), for the instruction set in
// force.
//
// pack, unpack: lanes x lanes transposes in registers between images and packed vectors.
// copy_planes: rows of images side by side.
// split_columns, join_columns: the same between a map and planes of its even and of its odd columns.

namespace uasparse::UASPARSE_ISA {

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
template <typename T, int kBytes>
UASPARSE_INLINE bool copy_chunks(const T* from, T* to, int64_t width) {
  constexpr int64_t kChunk = kBytes / sizeof(T);
  if (width < kChunk) return false;
  for (int64_t x = 0; x + kChunk < width; x += kChunk) __builtin_memcpy(to + x, from + x, kBytes);
  __builtin_memcpy(to + width - kChunk, from + width - kChunk, kBytes);
  return true;
}
template <typename T>
UASPARSE_INLINE void copy_run(const T* from, T* to, int64_t width) {
  if (UASPARSE_VECTOR_BYTES == 64 && copy_chunks<T, 64>(from, to, width)) return;
  if (copy_chunks<T, 32>(from, to, width) || copy_chunks<T, 16>(from, to, width)) return;
  for (int64_t x = 0; x < width; ++x) to[x] = from[x];
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

#if UASPARSE_VECTOR_BYTES == 64
struct EvenLanes {
  static constexpr int of(int i) { return 2 * i; }
};
struct OddLanes {
  static constexpr int of(int i) { return 2 * i + 1; }
};

// What is left of rows beyond whole vectors of both planes.
struct ColumnsRest {
  int64_t begin;  // in a plane
  __mmask16 even, odd, lower, upper;  // lower and upper: of the map

  ColumnsRest(int64_t even_width, int64_t odd_width)
      : begin((even_width < odd_width ? even_width : odd_width) / 16 * 16),
        even(lanes_below(even_width - begin)),
        odd(lanes_below(odd_width - begin)) {
    const int64_t width = even_width > odd_width ? 2 * even_width - 1 : 2 * odd_width;
    lower = lanes_below(width - 2 * begin);
    upper = lanes_below(width - 2 * begin - 16);
  }
  static __mmask16 lanes_below(int64_t n) { return __mmask16(n >= 16 ? 0xffff : n <= 0 ? 0 : (1 << n) - 1); }
};

// Calls visit(map row, even row, odd row) for all rows. The next channel, pages away, is asked for meanwhile.
template <int kWrite, typename T, typename Map, typename Visit>
UASPARSE_INLINE void for_each_row(const ConvColumns<T, Map>& p, Visit visit) {
  const int64_t width = p.even_width + p.odd_width;
  for (int64_t c = 0; c < p.channels; ++c)
    for (int64_t i = 0; i < p.images; ++i) {
      Map* map = p.map + c * p.map_channel + i * p.map_image;
      T* even = p.even + c * p.channel + i * p.image;
      T* odd = p.odd + c * p.channel + i * p.image;
      for (int64_t r = 0; r < p.rows; ++r, map += p.map_row, even += p.row, odd += p.row) {
        for (int64_t x = 0; x < width; x += 16) __builtin_prefetch(map + p.map_channel + x, kWrite);
        visit(map, even, odd);
      }
    }
}

inline void split_columns(const ConvColumns<float, const float>& p) {
  const ColumnsRest rest(p.even_width, p.odd_width);
  for_each_row<0>(p, [&](const float* map, float* even, float* odd) UASPARSE_LAMBDA {
    for (int64_t x = 0; x < rest.begin; x += 16) {
      const Vec<float> a = load(map + 2 * x), b = load(map + 2 * x + 16);
      store(even + x, shuffle<float, EvenLanes>(a, b));
      store(odd + x, shuffle<float, OddLanes>(a, b));
    }
    if (!rest.lower) return;
    const float* const from = map + 2 * rest.begin;
    const Vec<float> a = Vec<float>(_mm512_maskz_loadu_ps(rest.lower, from));
    const Vec<float> b = rest.upper ? Vec<float>(_mm512_maskz_loadu_ps(rest.upper, from + 16)) : a;
    _mm512_mask_storeu_ps(even + rest.begin, rest.even, __m512(shuffle<float, EvenLanes>(a, b)));
    _mm512_mask_storeu_ps(odd + rest.begin, rest.odd, __m512(shuffle<float, OddLanes>(a, b)));
  });
}

inline void join_columns(const ConvColumns<const float, float>& p) {
  const ColumnsRest rest(p.even_width, p.odd_width);
  for_each_row<1>(p, [&](float* map, const float* even, const float* odd) UASPARSE_LAMBDA {
    for (int64_t x = 0; x < rest.begin; x += 16) {
      Vec<float> a = load(even + x), b = load(odd + x);
      interleave<float, 16, 1>(a, b);
      store(map + 2 * x, a);
      store(map + 2 * x + 16, b);
    }
    if (!rest.lower) return;
    Vec<float> a = Vec<float>(_mm512_maskz_loadu_ps(rest.even, even + rest.begin));
    Vec<float> b = Vec<float>(_mm512_maskz_loadu_ps(rest.odd, odd + rest.begin));
    interleave<float, 16, 1>(a, b);
    _mm512_mask_storeu_ps(map + 2 * rest.begin, rest.lower, __m512(a));
    if (rest.upper) _mm512_mask_storeu_ps(map + 2 * rest.begin + 16, rest.upper, __m512(b));
  });
}
#endif

}  // namespace uasparse::UASPARSE_ISA
