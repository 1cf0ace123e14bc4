// Inner loops for weights in blocks (contracts: masked_conv2d.h; what quads are: conv_quads.h), for the instruction set in
// force.
//
// quad_product: four sums for each vector of a tile stay in registers; an entry loads the tile's sources once and
//   broadcasts four numbers. With AVX-512 that is 10 loads for 24 multiply-adds, where `product` has a load for each.
// quad_sddmm: the same from the other side: four channels of grad_output times up to kQuadColumns columns.

namespace uasparse::UASPARSE_ISA {

template <typename T>
constexpr int kQuadVectors = UASPARSE_VECTOR_BYTES == 64 ? 6 : UASPARSE_VECTOR_BYTES == 32 ? 3 : 2;
template <typename T>
constexpr int kQuadColumns = UASPARSE_VECTOR_BYTES == 64 ? 4 : 2;

// Adds the entries [entry, end) to kVectors vectors of the quad's channels, which lie `step` apart.
template <typename T, int kVectors>
UASPARSE_INLINE void quad_tile(const ConvQuadEntry<T>* entry, const ConvQuadEntry<T>* end, const T* source, T* out,
                               int64_t step, int64_t last, bool start, const T (&bias)[4]) {
  constexpr int L = kLanes<T>;
  const auto at = [last](int v) UASPARSE_LAMBDA { return v + 1 < kVectors ? int64_t(v * L) : last; };
  Vec<T> sum[4][kVectors];
  for (int q = 0; q < 4; ++q)
    for (int v = 0; v < kVectors; ++v) sum[q][v] = start ? broadcast<T>(bias[q]) : load(out + q * step + at(v));
  for (; entry != end; ++entry) {
    const T* const from = source + entry->offset;
    Vec<T> x[kVectors];
    for (int v = 0; v < kVectors; ++v) x[v] = load(from + at(v));
#pragma GCC unroll 4
    for (int q = 0; q < 4; ++q) {
      const Vec<T> value = broadcast<T>(entry->value[q]);
      for (int v = 0; v < kVectors; ++v) sum[q][v] += value * x[v];
    }
  }
  for (int q = 0; q < 4; ++q)
    for (int v = 0; v < kVectors; ++v) store(out + q * step + at(v), sum[q][v]);
}

// Calls quad_tile for `vectors` <= kVectors.
template <typename T, int kVectors = kQuadVectors<T>, typename... Args>
UASPARSE_INLINE void quad_tile_of(int64_t vectors, Args&&... args) {
  if constexpr (kVectors > 0) {
    if (vectors == kVectors) return quad_tile<T, kVectors>(args...);
    quad_tile_of<T, kVectors - 1>(vectors, args...);
  }
}

template <typename T>
void quad_product(const ConvQuadProduct<T>& p) {
  constexpr int L = kLanes<T>;
  const int64_t step = p.out_channel * p.phases;  // from a channel of the quad to the next
  // Tiles of a row differ by at most a vector, and the last is no smaller: where its last vector overlaps the one before,
  // both are in one tile.
  const int64_t tiles = (p.vectors + kQuadVectors<T> - 1) / kQuadVectors<T>;
  const auto out_of = [&](int64_t key) UASPARSE_LAMBDA {
    const int64_t quad = key / p.phases;
    return p.out + 4 * quad * step + (key - quad * p.phases) * p.out_channel;
  };
  AskAhead<T> ahead(p.ahead, p.end - p.begin);
  for (int64_t key = p.begin; key < p.end; ++key) {
    const ConvQuadEntry<T>* const entry = p.entries + p.first[key];
    const ConvQuadEntry<T>* const end = p.entries + p.first[key + 1];
    ahead.step();
    if (asks_for_out(p) && key + 1 < p.end)
      for (int q = 0; q < 4; ++q)
        for (int r = 0; r < p.rows; ++r)
          for (int v = 0; v < p.vectors; ++v)
            __builtin_prefetch(out_of(key + 1) + q * step + r * p.out_row + v * L, 1);
    if (!p.start && entry == end) continue;
    T* const out = out_of(key);
    T bias[4] = {};
    if (p.bias != nullptr) __builtin_memcpy(bias, p.bias + key / p.phases * 4, sizeof bias);
    for (int r = 0; r < p.rows; ++r)
      for (int64_t t = 0; t < tiles; ++t) {
        const int64_t v = p.vectors * t / tiles, vectors = p.vectors * (t + 1) / tiles - v;
        const int64_t last = t + 1 < tiles ? (vectors - 1) * L : p.last - v * L;
        quad_tile_of<T>(vectors, entry, end, p.source + r * p.source_row + v * L, out + r * p.out_row + v * L, step, last,
                        p.start, bias);
      }
  }
}

template <typename T, int kColumns>
UASPARSE_INLINE void quad_dots(const ConvQuadSddmm<T>& p, const T* grad_output, const int32_t* offset, T* grad) {
  constexpr int L = kLanes<T>;
  Vec<T> sum[kColumns][4] = {};
  const T* input[kColumns];
  for (int k = 0; k < kColumns; ++k) input[k] = p.input + offset[k];
  alignas(64) T fresh[L];
  for (int l = 0; l < L; ++l) fresh[l] = l < p.known ? T(0) : T(1);
  const auto add = [&](int64_t grad_at, int64_t input_at, bool masked) UASPARSE_LAMBDA {
    Vec<T> x[kColumns];
#pragma GCC unroll 4
    for (int k = 0; k < kColumns; ++k) x[k] = load(input[k] + input_at);
#pragma GCC unroll 4
    for (int q = 0; q < 4; ++q) {
      Vec<T> g = load(grad_output + q * p.grad_channel + grad_at);
      if (masked) g = keep<T>(g, load(fresh));
#pragma GCC unroll 4
      for (int k = 0; k < kColumns; ++k) sum[k][q] += g * x[k];
    }
  };
  for (int64_t r = 0; r < p.rows; ++r) {
    const int64_t g = r * p.grad_row, x = r * p.input_row;
    for (int64_t v = 0; v + 1 < p.vectors; ++v) add(g + v * L, x + v * L, false);
    p.known > 0 ? add(g + p.last, x + p.last, true) : add(g + p.last, x + p.last, false);
  }
#pragma GCC unroll 4
  for (int k = 0; k < kColumns; ++k) add_four_sums<T>(sum[k], grad + 4 * k);
}

template <typename T>
void quad_sddmm(const ConvQuadSddmm<T>& p) {
  constexpr int C = kQuadColumns<T>;
  for (int64_t quad = p.begin; quad < p.end; ++quad) {
    const T* const grad_output = p.grad_output + 4 * quad * p.grad_channel;
    int64_t i = p.first[quad * p.first_stride];
    const int64_t end = p.first[quad * p.first_stride + 1];
    for (; i + C <= end; i += C) quad_dots<T, C>(p, grad_output, p.offset + i, p.grad + 4 * i);
    for (; i < end; ++i) quad_dots<T, 1>(p, grad_output, p.offset + i, p.grad + 4 * i);
  }
}

}  // namespace uasparse::UASPARSE_ISA
