// The kernels of masked_conv2d on bfloat16, with float32 sums (contracts: masked_conv2d.h).
//
// A packed vector is one position of 32 images (or strips). Its words are in this order: the first 16 images in the lower
// halves of the vector's 128-bit parts, the others in the upper halves.
//   product       two entries an instruction: unpacking the vectors of two sources pairs their words, and puts the sums of
//                 the first 16 images, and of the others, in order. Two loads, two shuffles and two products for what takes
//                 four loads and four multiply-adds in float32.
//   plane_product the same of 32 neighbouring positions: the sums are of the lower and of the upper halves of the 128-bit
//                 parts, which one permutation of the rounded words puts in order.
//   piece_sddmm   the words of grad_output and of the input are pairs as they lie: half of the loads and products.
//   pack, unpack  16 x 16 transposes of double words, two neighbouring positions each.

#include "cpu/masked_conv2d.h"

#include <utility>

#if defined(__x86_64__)
#include <immintrin.h>

#define UASPARSE_ISA_AVX512
#define UASPARSE_ISA_BF16
#include "cpu/isa_begin.h"

#include "cpu/conv_lanes_impl.h"

namespace uasparse::avx512bf16 {
namespace {

constexpr int kLanesOfWords = 32, kMaxVectors = 12, kMaxPiece = 16, kMaxRows = 4;
using Packed = const BFloat16*;

UASPARSE_INLINE __m512i load_words(const BFloat16* from) { return _mm512_loadu_si512(from); }

// acc += the pairs' products, two to a lane.
UASPARSE_INLINE __m512 add_pairs(__m512 acc, __m512i a, __m512i b) {
  return _mm512_dpbf16_ps(acc, reinterpret_cast<__m512bh>(a), reinterpret_cast<__m512bh>(b));
}

// The words of both values in each lane.
UASPARSE_INLINE __m512i both_values(const ConvEntry<float>* entries) {
  static_assert(sizeof(ConvEntry<float>) == 8);
  const __m512i upper_halves = _mm512_set1_epi32(0x0b0a0302);  // bytes of the value at 0, and of the one at 8
  // (Masked, for GCC 12 warns of the other one.)
  const __m128i both = _mm_loadu_si128(reinterpret_cast<const __m128i*>(entries));
  return _mm512_shuffle_epi8(_mm512_maskz_broadcast_i32x4(0xffff, both), upper_halves);
}
UASPARSE_INLINE __m512i one_value(const ConvEntry<float>* entry) {
  uint32_t bits;
  __builtin_memcpy(&bits, &entry->value, sizeof bits);
  return _mm512_set1_epi32(int(bits >> 16));
}

// --- product

// Rows are `row` words apart, and at(v) leads to a row's v-th vector.
template <int kRows, int kVectors, typename At>
UASPARSE_INLINE void add_entries(const ConvEntry<float>* entry, const ConvEntry<float>* end, Packed source, int64_t row,
                                 At at, __m512 (&sum)[kRows][2 * kVectors]) {
  const auto add = [&]<bool kTwo>(std::bool_constant<kTwo>, __m512i values, Packed first, Packed second) UASPARSE_LAMBDA {
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 12
      for (int v = 0; v < kVectors; ++v) {
        const __m512i a = load_words(first + r * row + at(v));
        __m512i b = _mm512_setzero_si512();
        if constexpr (kTwo) {
          b = load_words(second + r * row + at(v));
          asm("" : "+v"(b));  // loaded once: as an operand of both shuffles it would be loaded twice, and loads bound the loop
        }
        sum[r][2 * v] = add_pairs(sum[r][2 * v], _mm512_unpacklo_epi16(a, b), values);
        sum[r][2 * v + 1] = add_pairs(sum[r][2 * v + 1], _mm512_unpackhi_epi16(a, b), values);
      }
  };
  for (; entry + 2 <= end; entry += 2)
    add(std::true_type{}, both_values(entry), source + entry[0].offset, source + entry[1].offset);
  if (entry != end) add(std::false_type{}, one_value(entry), source + entry->offset, nullptr);
}

template <int kRows, int kVectors>
void product_tile(const ConvProduct<float, BFloat16>& p) {
  for (int64_t c = p.begin; c < p.end; ++c) {
    const ConvEntry<float>* const entry = p.entries + p.first[c];
    const ConvEntry<float>* const end = p.entries + p.first[c + 1];
    float* const out = p.out + c * p.out_channel;
    if (!p.start && entry == end) continue;
    __m512 sum[kRows][2 * kVectors];
    const __m512 bias = _mm512_set1_ps(p.bias ? p.bias[c] : 0);
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 24
      for (int v = 0; v < 2 * kVectors; ++v) sum[r][v] = p.start ? bias : _mm512_loadu_ps(out + r * p.out_row + 16 * v);
    const auto at = [](int v) UASPARSE_LAMBDA { return int64_t(v * kLanesOfWords); };
    add_entries<kRows, kVectors>(entry, end, p.source, p.source_row, at, sum);
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 24
      for (int v = 0; v < 2 * kVectors; ++v) _mm512_storeu_ps(out + r * p.out_row + 16 * v, sum[r][v]);
  }
}

template <int kRows, int kVectors>
void product_tile(const ConvBf16Product& p) {
  const int64_t last = p.last;
  const auto at = [last](int v) UASPARSE_LAMBDA { return v + 1 < kVectors ? int64_t(v * kLanesOfWords) : last; };
  const __m512i order = _mm512_setr_epi64(0, 4, 1, 5, 2, 6, 3, 7);  // of four words each
  for (int64_t c = p.begin; c < p.end; ++c) {
    __m512 sum[kRows][2 * kVectors];
    const __m512 bias = _mm512_set1_ps(p.bias ? p.bias[c] : 0);
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 24
      for (int v = 0; v < 2 * kVectors; ++v) sum[r][v] = bias;
    add_entries<kRows, kVectors>(p.entries + p.first[c], p.entries + p.first[c + 1], p.source, p.source_row, at, sum);
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 12
      for (int v = 0; v < kVectors; ++v) {
        const auto words = reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(sum[r][2 * v + 1], sum[r][2 * v]));
        _mm512_storeu_si512(p.out + c * p.out_channel + r * p.out_row + at(v),
                            _mm512_maskz_permutexvar_epi64(0xff, order, words));  // masked, as above
      }
  }
}

// Calls call.operator()<rows, vectors>(), of which `kMost` are in a tile.
template <int kRows, int kVectors, typename Call>
void with_vectors(int vectors, Call call) {
  if constexpr (kVectors > 0) {
    if (vectors == kVectors) return call.template operator()<kRows, kVectors>();
    with_vectors<kRows, kVectors - 1>(vectors, call);
  }
}
template <int kMost, typename Call>
void with_tile(int rows, int vectors, Call call) {
  switch (rows) {
    case 1: return with_vectors<1, kMost>(vectors, call);
    case 2: return with_vectors<2, kMost / 2>(vectors, call);
    case 3: return with_vectors<3, kMost / 3>(vectors, call);
    default: return with_vectors<kMaxRows, kMost / kMaxRows>(vectors, call);
  }
}

template <typename Product>
void product(const Product& p) {
  with_tile<kMaxVectors>(p.rows, p.vectors, [&]<int kRows, int kVectors>() { product_tile<kRows, kVectors>(p); });
}

// --- dot products

// The v-th vector of a piece. Of the last one of those that are not whole, the words that were not in the vector before: what
// is no number must not meet a zero.
template <bool kWhole, int kVectors>
UASPARSE_INLINE __m512i load_piece(Packed from, int v, int64_t last, __mmask32 fresh) {
  if (kWhole || v + 1 < kVectors) return load_words(from + v * kLanesOfWords);
  return _mm512_maskz_loadu_epi16(fresh, from + last);
}

// grad[k] += dot product of the piece with the input at offset[k], k < count <= kCount.
template <bool kWhole, int kRows, int kVectors, int kCount>
UASPARSE_INLINE void dots(const ConvPieceSddmm<float, BFloat16>& p, const __m512i (&piece)[kRows][kVectors],
                          __mmask32 fresh, const int32_t* offset, float* grad, int count) {
  Packed input[kCount];
  __m512 sum[kCount];
#pragma GCC unroll 8
  for (int k = 0; k < kCount; ++k) {
    input[k] = p.input + offset[k < count ? k : 0];
    sum[k] = _mm512_setzero_ps();
  }
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 16
    for (int v = 0; v < kVectors; ++v)
#pragma GCC unroll 8
      for (int k = 0; k < kCount; ++k)
        sum[k] = add_pairs(sum[k], piece[r][v],
                           load_piece<kWhole, kVectors>(input[k] + r * p.input_image, v, p.last, fresh));
  Vec<float> sums[kGroup] = {};
#pragma GCC unroll 8
  for (int k = 0; k < kCount; ++k) sums[k] = reinterpret_cast<Vec<float>>(sum[k]);
  add_lane_sums<float>(sums, grad, count);
}

template <bool kWhole, int kRows, int kVectors>
void piece_sddmm_of(const ConvPieceSddmm<float, BFloat16>& p) {
  const __mmask32 fresh = ~0u << p.known;
  for (int64_t c = p.begin; c < p.end; ++c) {
    int64_t i = p.first[c * p.first_stride];
    const int64_t end = p.first[c * p.first_stride + 1];
    Packed grad_output = p.grad_output + c * p.grad_channel;
    // The next channel's piece comes from L2 or beyond.
    if (c + 1 < p.end)
      for (int r = 0; r < kRows; ++r)
        for (int v = 0; v < kVectors; ++v)
          __builtin_prefetch(grad_output + p.grad_channel + r * p.grad_image + v * kLanesOfWords);
    if (i == end) continue;
    __m512i piece[kRows][kVectors];
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 16
      for (int v = 0; v < kVectors; ++v)
        piece[r][v] = load_piece<kWhole, kVectors>(grad_output + r * p.grad_image, v, p.last, fresh);
    for (; i + kGroup <= end; i += kGroup)
      dots<kWhole, kRows, kVectors, kGroup>(p, piece, fresh, p.offset + i, p.grad + i, kGroup);
    for (; i < end; i += 4)
      dots<kWhole, kRows, kVectors, 4>(p, piece, fresh, p.offset + i, p.grad + i, int(end - i < 4 ? end - i : 4));
  }
}

void piece_sddmm(const ConvPieceSddmm<float, BFloat16>& p) {
  with_tile<kMaxPiece>(p.images, p.vectors, [&]<int kRows, int kVectors>() {
    p.known == 0 ? piece_sddmm_of<true, kRows, kVectors>(p) : piece_sddmm_of<false, kRows, kVectors>(p);
  });
}

// --- moves

// Where image `lane` is in a packed vector.
constexpr int word_of(int lane) { return lane % 16 / 4 * 8 + lane / 16 * 4 + lane % 4; }

// Words of two vectors, those of the second from 32 on.
struct Words {
  alignas(64) uint16_t of[kLanesOfWords];
  __m512i load() const { return _mm512_load_si512(of); }
};
// From double words of 16 images and of 16 others: the packed vector of their lower or upper words.
constexpr Words packed_words(int upper) {
  Words words{};
  for (int lane = 0; lane < kLanesOfWords; ++lane)
    words.of[word_of(lane)] = uint16_t(lane / 16 * kLanesOfWords + lane % 16 * 2 + upper);
  return words;
}
// From 16 words and 16 others: double words.
constexpr Words alternating() {
  Words words{};
  for (int i = 0; i < kLanesOfWords; ++i) words.of[i] = uint16_t(i % 2 * 16 + i / 2);
  return words;
}
alignas(64) constexpr Words kLowerWords = packed_words(0), kUpperWords = packed_words(1), kAlternating = alternating();

UASPARSE_INLINE __mmask32 first_words(int64_t count) { return count >= kLanesOfWords ? ~0u : (1u << count) - 1; }

// Double words [16 positions, two each][16 images] of images from..., of which `mask` says how many words.
UASPARSE_INLINE void load_pairs(const BFloat16* const* images, int64_t at, __mmask32 mask, Vec<float> (&v)[16]) {
#pragma GCC unroll 16
  for (int l = 0; l < 16; ++l)
    v[l] = reinterpret_cast<Vec<float>>(
        images[l] ? _mm512_maskz_loadu_epi16(mask, images[l] + at) : _mm512_setzero_si512());
  transpose<float>(v);
}

void pack(const ConvMove<BFloat16>& m, const BFloat16* const* images) {
  const __m512i lower = kLowerWords.load(), upper = kUpperWords.load();
  for (int64_t i = 0; i < m.outer; ++i) {
    if (m.outer_offset[i] < 0) continue;
    BFloat16* const to = m.packed + m.outer_offset[i];
    const int64_t from = i * m.outer_stride;
    const auto put = [&](int64_t j, __m512i words) UASPARSE_LAMBDA {
      if (m.inner_offset[j] >= 0) _mm512_storeu_si512(to + m.inner_offset[j], words);
    };
    if (m.inner_stride == 1) {
      for (int64_t j = 0; j < m.inner; j += kLanesOfWords) {
        const int64_t count = m.inner - j < kLanesOfWords ? m.inner - j : kLanesOfWords;
        Vec<float> first[16], second[16];
        load_pairs(images, from + j, first_words(count), first);
        load_pairs(images + 16, from + j, first_words(count), second);
        for (int64_t k = 0; k < count; k += 2) {
          const auto a = reinterpret_cast<__m512i>(first[k / 2]), b = reinterpret_cast<__m512i>(second[k / 2]);
          put(j + k, _mm512_permutex2var_epi16(a, lower, b));
          if (k + 1 < count) put(j + k + 1, _mm512_permutex2var_epi16(a, upper, b));
        }
      }
    } else {
      for (int64_t j = 0; j < m.inner; ++j) {
        Words words;
        for (int l = 0; l < kLanesOfWords; ++l)
          words.of[word_of(l)] = images[l] ? images[l][from + j * m.inner_stride].bits : 0;
        put(j, words.load());
      }
    }
  }
}

// Sums of 16 images at two positions, rounded: double words.
UASPARSE_INLINE __m512i rounded(const float* first, const float* second) {
  return _mm512_permutexvar_epi16(
      kAlternating.load(), reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(_mm512_loadu_ps(second), _mm512_loadu_ps(first))));
}

void unpack(const ConvMove<float>& m, BFloat16* const* images) {
  for (int64_t i = 0; i < m.outer; ++i) {
    if (m.outer_offset[i] < 0) continue;
    const float* const from = m.packed + m.outer_offset[i];
    const int64_t to = i * m.outer_stride;
    for (int lane = 0; lane < kLanesOfWords; lane += 16)
      if (m.inner_stride == 1) {
        for (int64_t j = 0; j < m.inner; j += kLanesOfWords) {
          const int64_t last = m.inner - 1;
          const __mmask32 mask = first_words(m.inner - j);
          Vec<float> v[16];
#pragma GCC unroll 16
          for (int64_t k = 0; k < 16; ++k) {
            const int64_t a = j + 2 * k, b = a + 1;  // where there is none, any will do
            v[k] = reinterpret_cast<Vec<float>>(rounded(from + lane + m.inner_offset[a < last ? a : last],
                                                        from + lane + m.inner_offset[b < last ? b : last]));
          }
          transpose<float>(v);
#pragma GCC unroll 16
          for (int l = 0; l < 16; ++l)
            if (BFloat16* const image = images[lane + l])
              _mm512_mask_storeu_epi16(image + to + j, mask, reinterpret_cast<__m512i>(v[l]));
        }
      } else {
        for (int64_t j = 0; j < m.inner; ++j) {
          const float* const sums = from + lane + m.inner_offset[j];
          Words words;
          _mm512_store_si512(words.of, rounded(sums, sums));
          for (int l = 0; l < 16; ++l)
            if (BFloat16* const image = images[lane + l]) image[to + j * m.inner_stride].bits = words.of[2 * l];
        }
      }
  }
}

}  // namespace

const ConvBf16Kernels conv = {
    kLanesOfWords, kMaxVectors,  kMaxRows, &product<ConvProduct<float, BFloat16>>, &product<ConvBf16Product>,
    kMaxPiece,     &piece_sddmm, &pack,    &unpack,
};

}  // namespace uasparse::avx512bf16

#include "cpu/isa_end.h"
#undef UASPARSE_ISA_BF16
#endif
