// Dot products of masked_conv2d (contracts: masked_conv2d.h), for the instruction set in force.
//
// sddmm: kGroup entries of one output channel take the dot product of the same grad_output positions with their input
//   positions together, one accumulator each; a tree adds the lanes of all of them at the end.
// piece_sddmm: a piece of grad_output stays in registers while the entries of its channel pass, several at once: the sum of
//   one of them alone would wait for each multiply-add.
// shifted_dots: the same for planes without columns of padding, where the piece is shifted by whole columns once for all
//   entries that need it.

namespace uasparse::UASPARSE_ISA {

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

// Held in registers while entries pass: vectors of grad_output, and the sums of four entries or, beside a small piece, eight.
template <typename T>
constexpr int kMaxPiece = UASPARSE_VECTOR_BYTES == 64 ? 24 : 10;
constexpr bool kHasEightSums = UASPARSE_VECTOR_BYTES == 64;

// sums[k] = dot product of the piece with the input at offset[k].
template <typename T, int kImages, int kVectors, int kCount>
UASPARSE_INLINE void piece_dots(const ConvPieceSddmm<T>& p, const Vec<T> (&piece)[kImages][kVectors],
                                const int32_t* offset, Vec<T> (&sums)[kCount]) {
  const int64_t last = p.last;
  const T* input[kCount];
#pragma GCC unroll 8
  for (int k = 0; k < kCount; ++k) {
    input[k] = p.input + offset[k];
    sums[k] = Vec<T>{};
  }
#pragma GCC unroll 4
  for (int n = 0; n < kImages; ++n)
#pragma GCC unroll 32
    for (int v = 0; v < kVectors; ++v)
#pragma GCC unroll 8
      for (int k = 0; k < kCount; ++k)
        sums[k] += piece[n][v] * load(input[k] + n * p.input_image + (v + 1 < kVectors ? int64_t(v * kLanes<T>) : last));
}

template <typename T, int kImages, int kVectors>
void piece_sddmm_of(const ConvPieceSddmm<T>& p) {
  constexpr int L = kLanes<T>;
  const int64_t last = p.last;
  const auto at = [last](int v) UASPARSE_LAMBDA { return v + 1 < kVectors ? int64_t(v * L) : last; };
  alignas(64) T fresh[L];
  for (int l = 0; l < L; ++l) fresh[l] = l < p.known ? T(0) : T(1);
  for (int64_t c = p.begin; c < p.end; ++c) {
    int64_t i = p.first[c * p.first_stride];
    const int64_t end = p.first[c * p.first_stride + 1];
    // The pieces of the next channels come from L2 or beyond: one ahead is too late for memory.
    constexpr int kAhead = 2;
    if (c + kAhead < p.end)
      for (int n = 0; n < kImages; ++n)
        for (int64_t x = 0; x < kVectors * L; x += 64 / sizeof(T))
          __builtin_prefetch(p.grad_output + (c + kAhead) * p.grad_channel + n * p.grad_image + x);
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
    if constexpr (kHasEightSums && kImages * kVectors <= kSmallPiece)
      for (; i + kGroup <= end; i += kGroup) {
        Vec<T> sums[kGroup];
        piece_dots<T, kImages, kVectors>(p, grad_output, p.offset + i, sums);
        add_lane_sums<T>(sums, p.grad + i, kGroup);
      }
    for (; i + 4 <= end; i += 4) {
      Vec<T> sums[4];
      piece_dots<T, kImages, kVectors>(p, grad_output, p.offset + i, sums);
      add_four_sums<T>(sums, p.grad + i);
    }
    for (; i < end; ++i) {
      Vec<T> sum[1];
      piece_dots<T, kImages, kVectors>(p, grad_output, p.offset + i, sum);
      p.grad[i] += sum_of_lanes<T>(sum[0]);
    }
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

// --- planes without columns of padding

// sums[k] = dot product of the piece with the input at offset[k].
template <typename T, int kVectors, int kCount>
UASPARSE_INLINE void plane_dots(const Vec<T> (&piece)[kVectors], const T* input, const int32_t* offset,
                                Vec<T> (&sums)[kCount]) {
  const T* from[kCount];
#pragma GCC unroll 8
  for (int k = 0; k < kCount; ++k) {
    from[k] = input + offset[k];
    sums[k] = Vec<T>{};
  }
#pragma GCC unroll 32
  for (int v = 0; v < kVectors; ++v)
#pragma GCC unroll 8
    for (int k = 0; k < kCount; ++k) sums[k] += piece[v] * load(from[k] + v * kLanes<T>);
}

template <typename T, int kVectors, int kPeriod>
void shifted_dots_of(const ConvShiftedDots<T>& p) {
  constexpr int L = kLanes<T>;
  const Edge<T, kPeriod> left_edge(p.edges.from_left), right_edge(p.edges.from_right);
  for (int64_t c = p.begin; c < p.end; ++c) {
    const T* const grad_output = p.grad_output + c * p.grad_channel;
    // The next channel's piece comes from L2 or beyond.
    if (c + 1 < p.end)
      for (int v = 0; v < kVectors; ++v) __builtin_prefetch(grad_output + p.grad_channel + v * L);
    for (int64_t s = 0; s < p.segments; ++s) {
      const int32_t* const first = p.first + c * p.segments + s;
      int64_t i = first[0];
      const int64_t end = first[1];
      if (i == end) continue;
      Vec<T> piece[kVectors];
      for (int v = 0; v < kVectors; ++v) piece[v] = load(grad_output + v * L);
      for (int64_t k = p.zero; k < s; ++k) shift_right<T>(piece, left_edge);
      for (int64_t k = s; k < p.zero; ++k) shift_left<T>(piece, right_edge);
      for (; i + kGroup <= end; i += kGroup) {
        Vec<T> sums[kGroup];
        plane_dots<T, kVectors>(piece, p.input, p.offset + i, sums);
        add_lane_sums<T>(sums, p.grad + i, kGroup);
      }
      // Four at a time: those that are too many are the last one again.
      for (; i < end; i += 4) {
        int32_t offset[4];
        for (int k = 0; k < 4; ++k) offset[k] = p.offset[i + k < end ? i + k : end - 1];
        Vec<T> sums[4];
        plane_dots<T, kVectors>(piece, p.input, offset, sums);
        T totals[4] = {};
        add_four_sums<T>(sums, totals);
        for (int k = 0; k < 4 && i + k < end; ++k) p.grad[i + k] += totals[k];
      }
    }
  }
}

template <typename T, int kVectors = kSmallPiece>
void shifted_dots(const ConvShiftedDots<T>& p) {
  if constexpr (kVectors > 0) {
    constexpr int kPeriod = kHasBits<T> ? 2 : kVectors;
    if (p.vectors == kVectors && p.edges.repeat) return shifted_dots_of<T, kVectors, kPeriod>(p);
    if (p.vectors == kVectors) return shifted_dots_of<T, kVectors, kVectors>(p);
    shifted_dots<T, kVectors - 1>(p);
  }
}

}  // namespace uasparse::UASPARSE_ISA
