// What transformers and single rows need beside convolutions, for one instruction set (included by serve_<isa>.cpp after
// serve_impl.h; see serve.h).
//
// Attention. Channels are planes and positions are vectors, so that scores are held with a vector of queries for each
// key: their maximum and sum go along vectors, lane by lane, and both products are the same loop, M numbers broadcast
// times NV vectors. A task is a tile of NV vectors of queries of one head, whose scores for all keys lie in L1 or L2.

namespace uasparse::UASPARSE_ISA {
namespace {

// Mean and variance over the channels, for NV vectors of positions from `at` on. Two passes for the two: exact enough
// whatever the mean.
template <typename T, int NV>
void norm_tile(const ServeNorm<T>& p, int64_t at) {
  constexpr int L = kLanes<T>;
  const T scale = T{1} / p.channels;
  Vec<T> mean[NV] = {}, factor[NV] = {};
  for (int64_t c = 0; c < p.channels; ++c)
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) mean[v] += load(p.x + c * p.x_plane + at + v * L);
#pragma GCC unroll 4
  for (int v = 0; v < NV; ++v) mean[v] *= scale;
  for (int64_t c = 0; c < p.channels; ++c)
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) {
      const Vec<T> d = load(p.x + c * p.x_plane + at + v * L) - mean[v];
      factor[v] += d * d;
    }
#pragma GCC unroll 4
  for (int v = 0; v < NV; ++v) {
    factor[v] = factor[v] * scale + p.epsilon;
    for (int i = 0; i < L; ++i) factor[v][i] = T{1} / __builtin_sqrt(factor[v][i]);
  }
  for (int64_t c = 0; c < p.channels; ++c) {
    const Vec<T> weight = broadcast<T>(p.weight ? p.weight[c] : T{1}), bias = broadcast<T>(p.bias ? p.bias[c] : T{0});
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) {
      const Vec<T> d = (load(p.x + c * p.x_plane + at + v * L) - mean[v]) * factor[v];
      store<T>(p.y + c * p.y_plane + at + v * L, masked<T>(d * weight + bias, p.mask + at + v * L));
    }
  }
}

// Vectors [first, last) of positions.
template <typename T>
void norm(const ServeNorm<T>& p, int64_t first, int64_t last) {
  constexpr int L = kLanes<T>;
  for (; first + 4 <= last; first += 4) norm_tile<T, 4>(p, first * L);
  for (; first < last; ++first) norm_tile<T, 1>(p, first * L);
}

// sum[m] += a[m * row + k * step] * b[k], for NV vectors b[k].
template <typename T, int M, int NV>
UASPARSE_INLINE void multiply(Vec<T> (&sum)[M][NV], const T* a, int64_t row, int64_t step, const T* b, int64_t count) {
  constexpr int L = kLanes<T>;
#pragma GCC unroll 8
  for (int m = 0; m < M; ++m)
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) sum[m][v] = Vec<T>{};
  for (int64_t k = 0; k < count; ++k, a += step, b += NV * L) {
    Vec<T> in[NV];
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) in[v] = load(b + v * L);
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) {
      const Vec<T> w = broadcast<T>(a[m * row]);
#pragma GCC unroll 4
      for (int v = 0; v < NV; ++v) sum[m][v] += w * in[v];
    }
  }
}

template <typename T, int M, int NV>
UASPARSE_INLINE void scores_of(const T* k, int64_t plane, int64_t dim, const T* q, T* scores, Vec<T> (&most)[NV]) {
  constexpr int L = kLanes<T>;
  Vec<T> sum[M][NV];
  multiply<T, M, NV>(sum, k, 1, plane, q, dim);
#pragma GCC unroll 8
  for (int m = 0; m < M; ++m)
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) {
      store<T>(scores + (m * NV + v) * L, sum[m][v]);
      most[v] = sum[m][v] > most[v] ? sum[m][v] : most[v];
    }
}

template <typename T, int M, int NV>
UASPARSE_INLINE void values_of(const T* v, int64_t plane, int64_t keys, const T* weights, const Vec<T> (&factor)[NV],
                               T* y, int64_t y_plane, int64_t queries) {
  constexpr int L = kLanes<T>;
  Vec<T> sum[M][NV];
  multiply<T, M, NV>(sum, v, plane, 1, weights, keys);
#pragma GCC unroll 8
  for (int m = 0; m < M; ++m)
#pragma GCC unroll 4
    for (int i = 0; i < NV; ++i) {
      const Vec<T> out = sum[m][i] * factor[i];
      T* to = y + m * y_plane + i * L;
      if ((i + 1) * L <= queries) store<T>(to, out);
      else if (i * L < queries) __builtin_memcpy(to, &out, (queries - i * L) * sizeof(T));
    }
}

// Queries [at, at + NV vectors) of one head, as far as there are; `room` holds (dim + keys) * NV vectors.
template <typename T, int NV>
void attention_tile(const ServeAttention<T>& p, const T* q, const T* k, const T* v, T* y, int64_t at, T* room) {
  constexpr int L = kLanes<T>;
  constexpr int M = UASPARSE_VECTOR_BYTES == 64 ? 8 : 4;
  const int64_t queries = p.queries - at < NV * L ? p.queries - at : NV * L;
  T* const scores = room + p.dim * NV * L;
  for (int64_t d = 0; d < p.dim; ++d) {
    T* to = room + d * NV * L;
    const T* from = q + d * p.q_plane + at;
    for (int64_t i = 0; i < queries; ++i) to[i] = from[i] * p.scale;
    for (int64_t i = queries; i < NV * L; ++i) to[i] = T{0};
  }
  Vec<T> most[NV], total[NV] = {};
#pragma GCC unroll 4
  for (int i = 0; i < NV; ++i) most[i] = broadcast<T>(-__builtin_inff());
  int64_t j = 0;
  for (; j + M <= p.keys; j += M) scores_of<T, M, NV>(k + j, p.k_plane, p.dim, room, scores + j * NV * L, most);
  for (; j < p.keys; ++j) scores_of<T, 1, NV>(k + j, p.k_plane, p.dim, room, scores + j * NV * L, most);
  for (j = 0; j < p.keys; ++j)
#pragma GCC unroll 4
    for (int i = 0; i < NV; ++i) {
      const Vec<T> e = exponential(load(scores + (j * NV + i) * L) - most[i]);
      total[i] += e;
      store<T>(scores + (j * NV + i) * L, e);
    }
#pragma GCC unroll 4
  for (int i = 0; i < NV; ++i) total[i] = T{1} / total[i];
  int64_t d = 0;
  for (; d + M <= p.value_dim; d += M)
    values_of<T, M, NV>(v + d * p.v_plane, p.v_plane, p.keys, scores, total, y + d * p.y_plane + at, p.y_plane, queries);
  for (; d < p.value_dim; ++d)
    values_of<T, 1, NV>(v + d * p.v_plane, p.v_plane, p.keys, scores, total, y + d * p.y_plane + at, p.y_plane, queries);
}

template <typename T>
int64_t attention_tiles(const ServeAttention<T>& p) {
  return (p.queries + 3 * kLanes<T> - 1) / (3 * kLanes<T>);
}

template <typename T>
int64_t attention_room(const ServeAttention<T>& p) {
  return (p.dim + p.keys) * 3 * kLanes<T>;
}

// One tile of the queries of one head of one image.
template <typename T>
void attention(const ServeAttention<T>& p, int64_t image, int64_t head, int64_t tile, T* room) {
  const int64_t vectors = (p.queries + kLanes<T> - 1) / kLanes<T>, tiles = attention_tiles(p);
  const int64_t first = vectors * tile / tiles, count = vectors * (tile + 1) / tiles - first;
  const T* q = p.q + image * p.q_image + head * p.q_head * p.q_plane;
  const T* k = p.k + image * p.k_image + head * p.k_head * p.k_plane;
  const T* v = p.v + image * p.v_image + head * p.v_head * p.v_plane;
  T* y = p.y + image * p.queries + head * p.value_dim * p.y_plane;
  if (count == 3) attention_tile<T, 3>(p, q, k, v, y, first * kLanes<T>, room);
  else if (count == 2) attention_tile<T, 2>(p, q, k, v, y, first * kLanes<T>, room);
  else attention_tile<T, 1>(p, q, k, v, y, first * kLanes<T>, room);
}

#if UASPARSE_VECTOR_BYTES == 64
// 16 numbers of a table of 128 in eight registers.
UASPARSE_INLINE __m512 look_up(const uint8_t* index, const __m512 (&table)[8]) {
  const __m512i i = _mm512_maskz_cvtepu8_epi32(0xffff, _mm_loadu_si128(reinterpret_cast<const __m128i*>(index)));
  const __mmask16 bit5 = _mm512_test_epi32_mask(i, _mm512_set1_epi32(32));
  const __mmask16 bit6 = _mm512_test_epi32_mask(i, _mm512_set1_epi32(64));
  const __m512 a = _mm512_mask_blend_ps(bit5, _mm512_permutex2var_ps(table[0], i, table[1]),
                                        _mm512_permutex2var_ps(table[2], i, table[3]));
  const __m512 b = _mm512_mask_blend_ps(bit5, _mm512_permutex2var_ps(table[4], i, table[5]),
                                        _mm512_permutex2var_ps(table[6], i, table[7]));
  return _mm512_mask_blend_ps(bit6, a, b);
}

// Windows [first, last) of kLookupRows rows.
inline void look_up_rows(const ServeLookup<float>& p, int64_t first, int64_t last) {
  constexpr int L = 16, G = kLookupRows / L;
  for (int64_t w = first; w < last; ++w) {
    alignas(64) float y[kLookupBatch][kLookupRows], sums[kLookupRows];
    const int64_t left = p.rows - w * kLookupRows, rows = left < kLookupRows ? left : kLookupRows;
    for (int64_t m = 0; m < p.batch; ++m) {
      __builtin_memset(y[m], 0, sizeof y[m]);
      __builtin_memcpy(y[m], p.bias + w * kLookupRows, rows * sizeof(float));
    }
    for (int64_t b = 0; b < p.blocks; ++b) {
      const int32_t* ptr = p.ptr + (w * p.blocks + b) * G;
      const uint8_t* place = p.place + (w * p.blocks + b) * kLookupRows;
      for (int64_t m = 0; m < p.batch; ++m) {
        const float* x = p.x + (m * p.blocks + b) * kLookupRows;
        __m512 table[8];
#pragma GCC unroll 8
        for (int i = 0; i < 8; ++i) table[i] = _mm512_loadu_ps(x + i * L);
        for (int g = 0; g < G; ++g) {
          __m512 sum = _mm512_setzero_ps();
          for (int64_t k = ptr[g]; k < ptr[g + 1]; ++k)
            sum = _mm512_fmadd_ps(_mm512_loadu_ps(p.val + k * L), look_up(p.index + k * L, table), sum);
          _mm512_store_ps(sums + g * L, sum);
        }
#pragma GCC unroll 8
        for (int i = 0; i < 8; ++i) table[i] = _mm512_load_ps(sums + i * L);
        for (int g = 0; g < G; ++g) {
          float* to = y[m] + g * L;
          _mm512_store_ps(to, _mm512_add_ps(_mm512_load_ps(to), look_up(place + g * L, table)));
        }
      }
    }
    for (int64_t m = 0; m < p.batch; ++m) {
      float* to = p.y + m * p.y_stride + w * kLookupRows;
      const float* residual = p.residual ? p.residual + m * p.y_stride + w * kLookupRows : nullptr;
      for (int64_t r = 0; r < rows; ++r) to[r] = residual ? y[m][r] + residual[r] : y[m][r];
      if (p.act.kind != Activation::none) activate<float>(to, rows, p.act);
    }
  }
}
#endif

template <typename T>
constexpr void (*kLookUp)(const ServeLookup<T>&, int64_t, int64_t) = nullptr;
#if UASPARSE_VECTOR_BYTES == 64
template <>
constexpr void (*kLookUp<float>)(const ServeLookup<float>&, int64_t, int64_t) = look_up_rows;
#endif

template <typename T>
constexpr ServeKernels<T> kServe = {tiles_of<T>,       conv<T>,    rows<T>,           pool<T>,
                                    load_planes<T>,    affine<T>,  store_rows<T>,     norm<T>,
                                    attention_tiles<T>, attention_room<T>, attention<T>, kLookUp<T>, kLanes<T>};

}  // namespace

const ServeKernels<float> serve_float = kServe<float>;
const ServeKernels<double> serve_double = kServe<double>;

}  // namespace uasparse::UASPARSE_ISA
