// Inner loops for weights in blocks, in planes whose rows follow each other (contracts: masked_conv2d.h; planes:
// conv_quads_by_space.cpp). AVX-512 and float32 alone: 24 sums stay in registers, and a load with a mask costs no more
// than one without.
//
// plane_quad_product: six vectors of a plane times four channels: an entry is six loads, which may cross cache lines,
//   four broadcasts and 24 multiply-adds, which are what takes the time.
// plane_quad_dots: four channels of grad_output times six columns.

namespace uasparse::UASPARSE_ISA {

#if UASPARSE_VECTOR_BYTES == 64

UASPARSE_INLINE Vec<float> load_inside(const float* from, __mmask16 inside) {
  return Vec<float>(_mm512_maskz_loadu_ps(inside, from));
}

template <int kVectors>
void plane_quad_tile(const ConvPlaneQuadProduct& p) {
  constexpr int L = kLanes<float>;
  const int64_t step = p.out_channel;
  for (int64_t quad = p.begin; quad < p.end; ++quad) {
    const ConvPlaneQuad* entry = p.entries + p.first[quad];
    const ConvPlaneQuad* const end = p.entries + p.first[quad + 1];
    float* const out = p.out + 4 * quad * step;
    if (!p.start && entry == end) continue;
    // The next quad's place is in L2 or, where `out` is the output itself, farther away.
    if (quad + 1 < p.end)
      for (int q = 4; q < 8; ++q)
        for (int v = 0; v < kVectors; ++v) __builtin_prefetch(out + q * step + v * L, 1);
    Vec<float> sum[4][kVectors];
    for (int q = 0; q < 4; ++q) {
      const Vec<float> bias = broadcast<float>(p.start && p.bias ? p.bias[4 * quad + q] : 0.0f);
      for (int v = 0; v < kVectors; ++v) sum[q][v] = p.start ? bias : load(out + q * step + v * L);
    }
    for (; entry != end; ++entry) {
      const float* const from = p.source + entry->column.offset;
      const __mmask16 even = entry->column.inside[0], odd = entry->column.inside[1];
      Vec<float> x[kVectors];
      for (int v = 0; v < kVectors; ++v) x[v] = load_inside(from + v * L, v % 2 == 0 ? even : odd);
#pragma GCC unroll 4
      for (int q = 0; q < 4; ++q) {
        const Vec<float> value = broadcast<float>(entry->value[q]);
        for (int v = 0; v < kVectors; ++v) sum[q][v] += value * x[v];
      }
    }
    for (int q = 0; q < 4; ++q)
      for (int v = 0; v < kVectors; ++v) store(out + q * step + v * L, sum[q][v]);
  }
}

template <int kVectors = kQuadVectors<float>>
void plane_quad_product(const ConvPlaneQuadProduct& p) {
  if constexpr (kVectors > 0) {
    if (p.vectors == kVectors) return plane_quad_tile<kVectors>(p);
    plane_quad_product<kVectors - 1>(p);
  }
}

// Sums of neighbouring groups of H lanes, alternately of a and of b.
template <int H>
UASPARSE_INLINE Vec<float> fold(Vec<float> a, Vec<float> b) {
  using S = Stage<float, H>;
  return S::template shuffle<S::outer>(a, b) + S::template shuffle<S::inner>(a, b);
}

template <int kColumns>
UASPARSE_INLINE void plane_dots_of(const ConvPlaneQuadDots& p, const float* grad_output, const ConvPlaneColumn* column,
                                   float* grad) {
  constexpr int L = kLanes<float>;
  Vec<float> sum[kColumns][4] = {};
  const float* input[kColumns];
  for (int k = 0; k < kColumns; ++k) input[k] = p.input + column[k].offset;
  const float* const last = grad_output + 3 * p.grad_channel;
  for (int parity = 0; parity < p.period; ++parity) {
    __mmask16 inside[kColumns];
#pragma GCC unroll 8
    for (int k = 0; k < kColumns; ++k) inside[k] = column[k].inside[parity];
    for (int64_t x = parity * L; x < p.vectors * L; x += p.period * L) {
      const Vec<float> g[4] = {load(grad_output + x), load(grad_output + p.grad_channel + x),
                               load(grad_output + 2 * p.grad_channel + x), load(last + x)};
#pragma GCC unroll 8
      for (int k = 0; k < kColumns; ++k) {
        const Vec<float> v = load_inside(input[k] + x, inside[k]);
#pragma GCC unroll 4
        for (int q = 0; q < 4; ++q) sum[k][q] += g[q] * v;
      }
    }
  }
  Vec<float> quad[8] = {};  // in each 128 bits a partial sum of each of sum[k]
#pragma GCC unroll 8
  for (int k = 0; k < kColumns; ++k) quad[k] = fold<2>(fold<1>(sum[k][0], sum[k][1]), fold<1>(sum[k][2], sum[k][3]));
#pragma GCC unroll 2
  for (int k = 0; k < kColumns; k += 4) {
    const Vec<float> total = fold<8>(fold<4>(quad[k], quad[k + 1]), fold<4>(quad[k + 2], quad[k + 3]));
    const __mmask16 wanted = kColumns - k >= 4 ? 0xffff : (1 << 4 * (kColumns - k)) - 1;
    float* const to = grad + 4 * k;
    _mm512_mask_storeu_ps(to, wanted, __m512(load_inside(to, wanted) + total));
  }
}

// The columns that are left, fewer than kColumns + 1.
template <int kColumns>
UASPARSE_INLINE void plane_dots_of_rest(int64_t count, const ConvPlaneQuadDots& p, const float* grad_output,
                                        const ConvPlaneColumn* column, float* grad) {
  if constexpr (kColumns > 0) {
    if (count == kColumns) return plane_dots_of<kColumns>(p, grad_output, column, grad);
    plane_dots_of_rest<kColumns - 1>(count, p, grad_output, column, grad);
  }
}

inline void plane_quad_dots(const ConvPlaneQuadDots& p) {
  constexpr int kColumns = 6;
  for (int64_t quad = p.begin; quad < p.end; ++quad) {
    const float* const grad_output = p.grad_output + 4 * quad * p.grad_channel;
    // The next quad's grad_output comes from L2 or beyond.
    if (quad + 1 < p.end)
      for (int q = 4; q < 8; ++q)
        for (int64_t v = 0; v < p.vectors; ++v)
          __builtin_prefetch(grad_output + q * p.grad_channel + v * kLanes<float>);
    int64_t i = p.first[quad];
    const int64_t end = p.first[quad + 1];
    for (; i + kColumns <= end; i += kColumns) plane_dots_of<kColumns>(p, grad_output, p.columns + i, p.grad + 4 * i);
    plane_dots_of_rest<kColumns - 1>(end - i, p, grad_output, p.columns + i, p.grad + 4 * i);
  }
}

#endif

template <typename T>
constexpr auto plane_quad_product_or_null() -> void (*)(const ConvPlaneQuadProduct&) {
#if UASPARSE_VECTOR_BYTES == 64
  if constexpr (sizeof(T) == 4) return plane_quad_product<>;
#endif
  return nullptr;
}
template <typename T>
constexpr auto plane_quad_dots_or_null() -> void (*)(const ConvPlaneQuadDots&) {
#if UASPARSE_VECTOR_BYTES == 64
  if constexpr (sizeof(T) == 4) return plane_quad_dots;
#endif
  return nullptr;
}

}  // namespace uasparse::UASPARSE_ISA
