// The kernels of masked_linear_bf16.h.

#include "cpu/masked_linear_bf16.h"

#include <utility>

#if defined(__x86_64__)
#include <immintrin.h>

#define UASPARSE_ISA_AVX512
#define UASPARSE_ISA_BF16
#include "cpu/isa_begin.h"

#include "cpu/vec.h"
#include "cpu/masked_linear_layout.h"

namespace uasparse::avx512bf16 {
namespace {

typedef uint32_t Words __attribute__((vector_size(64)));

UASPARSE_INLINE __m512i load_words(const uint16_t* from) { return _mm512_loadu_si512(from); }

// acc += the pairs' products, two to a lane.
UASPARSE_INLINE __m512 add_pairs(__m512 acc, __m512i a, __m512i b) {
  return _mm512_dpbf16_ps(acc, reinterpret_cast<__m512bh>(a), reinterpret_cast<__m512bh>(b));
}

void pack(const uint16_t* from, int64_t stride, int64_t batch, int64_t channels, uint16_t* to, int64_t width) {
  for (int64_t b = 0; b < width; b += 32) {
    int64_t c = 0;
    if (b + 32 <= batch) {
      for (; c + 16 <= channels; c += 16) {
        Vec<float> first[16], second[16];
#pragma GCC unroll 16
        for (int i = 0; i < 16; ++i) {
          first[i] = load_numbers<float>(from + (b + i) * stride + c);
          second[i] = load_numbers<float>(from + (b + 16 + i) * stride + c);
        }
        transpose_stages<float, 8>(first);
        transpose_stages<float, 8>(second);
#pragma GCC unroll 16
        for (int i = 0; i < 16; ++i) {
          const Words low = reinterpret_cast<Words>(first[i]) >> 16, high = reinterpret_cast<Words>(second[i]) >> 16;
          _mm512_storeu_si512(to + (c + i) * width + b,
                              _mm512_packus_epi32(reinterpret_cast<__m512i>(low), reinterpret_cast<__m512i>(high)));
        }
      }
    }
    for (; c < channels; ++c)
      for (int64_t i = 0; i < 32; ++i)
        to[c * width + b + i % 16 / 4 * 8 + i / 16 * 4 + i % 4] = b + i < batch ? from[(b + i) * stride + c] : 0;
  }
}

// One output over V vectors of words: pairs of nonzeros together.
template <int V>
UASPARSE_INLINE void tile(const Product<float, uint16_t>& p, const uint16_t* in, int64_t first, int64_t last, float* out,
                          const float* bias) {
  __m512 acc[2 * V];
  const int64_t width = p.width;
#pragma GCC unroll 4
  for (int v = 0; v < 2 * V; ++v) acc[v] = bias ? _mm512_set1_ps(*bias) : _mm512_loadu_ps(out + 16 * v);
  const auto row = [&](int64_t i) UASPARSE_LAMBDA { return in + static_cast<uint32_t>(p.idx[i]) * width; };
  int64_t i = first;
  for (; i + 2 <= last; i += 2) {
    const uint16_t *x0 = row(i), *x1 = row(i + 1);
    int32_t pair;
    __builtin_memcpy(&pair, p.val + i, sizeof pair);
    const __m512i w = _mm512_set1_epi32(pair);
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) {
      const __m512i a = load_words(x0 + 32 * v), b = load_words(x1 + 32 * v);
      acc[2 * v] = add_pairs(acc[2 * v], _mm512_unpacklo_epi16(a, b), w);
      acc[2 * v + 1] = add_pairs(acc[2 * v + 1], _mm512_unpackhi_epi16(a, b), w);
    }
  }
  if (i < last) {
    const uint16_t* x0 = row(i);
    const __m512i w = _mm512_set1_epi32(p.val[i]), none = _mm512_setzero_si512();
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) {
      const __m512i a = load_words(x0 + 32 * v);
      acc[2 * v] = add_pairs(acc[2 * v], _mm512_unpacklo_epi16(a, none), w);
      acc[2 * v + 1] = add_pairs(acc[2 * v + 1], _mm512_unpackhi_epi16(a, none), w);
    }
  }
#pragma GCC unroll 4
  for (int v = 0; v < 2 * V; ++v) _mm512_storeu_ps(out + 16 * v, acc[v]);
}

void product(const Product<float, uint16_t>& p) {
  static constexpr float zero = 0;
  for (int64_t b = 0; b < p.column_blocks; ++b) {
    const int32_t *firsts = p.starts + b * p.stride + p.begin, *lasts = firsts + p.stride;
    for (int64_t panel = 0; panel < p.panels; ++panel) {
      const uint16_t* in = p.in + panel * p.in_panel;
      for (int64_t r = 0; r < p.end - p.begin; ++r) {
        if (b > 0 && firsts[r] == lasts[r]) continue;
        const float* bias = b > 0 ? nullptr : p.bias ? p.bias + r : &zero;
        float* out = p.out + panel * p.out_panel + r * p.width;
        if (p.width == 64)
          tile<2>(p, in, firsts[r], lasts[r], out, bias);
        else
          tile<1>(p, in, firsts[r], lasts[r], out, bias);
      }
    }
  }
}

template <int H>
UASPARSE_INLINE Vec<float> fold(Vec<float> a, Vec<float> b) {
  using Fold = Stage<float, H>;
  return Fold::template shuffle<Fold::outer>(a, b) + Fold::template shuffle<Fold::inner>(a, b);
}

// Four vectors' sums in the first four lanes.
UASPARSE_INLINE Vec<float> sums_of(const Vec<float>* of) {
  Vec<float> sums = fold<4>(fold<8>(of[0], of[2]), fold<8>(of[1], of[3]));
  sums += Stage<float, 2>::shuffle<Stage<float, 2>::inner>(sums, sums);
  sums += Stage<float, 1>::shuffle<Stage<float, 1>::inner>(sums, sums);
  return reinterpret_cast<Vec<float>>(_mm512_maskz_compress_ps(0x1111, reinterpret_cast<__m512>(sums)));
}

// grad[j] (+)= the dot products of a row of grad_output over V vectors a panel, P panels, with `count` inputs.
template <int V, int P>
UASPARSE_INLINE void dots(const Sddmm<float, uint16_t>& p, const uint16_t* dy, const uint16_t* in, int64_t first,
                          int64_t last, bool accumulate) {
  __m512i y[V * P];
#pragma GCC unroll 4
  for (int v = 0; v < V * P; ++v) y[v] = load_words(dy + v / V * p.grad_panel + v % V * 32);
  const int64_t width = p.width;
  for (int64_t i = first; i < last; i += 4) {
    const int64_t count = last - i < 4 ? last - i : 4;
    Vec<float> acc[4];
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
      const uint16_t* x = in + static_cast<uint32_t>(p.idx[i + (j < count ? j : 0)]) * width;
      __m512 dot = add_pairs(_mm512_setzero_ps(), y[0], load_words(x));
#pragma GCC unroll 4
      for (int v = 1; v < V * P; ++v) dot = add_pairs(dot, y[v], load_words(x + v / V * p.input_panel + v % V * 32));
      acc[j] = reinterpret_cast<Vec<float>>(dot);
    }
    __m512 sums = reinterpret_cast<__m512>(sums_of(acc));
    const auto mask = static_cast<__mmask16>((1 << count) - 1);
    if (accumulate) sums = _mm512_add_ps(sums, _mm512_maskz_loadu_ps(mask, p.grad + i));
    _mm512_mask_storeu_ps(p.grad + i, mask, sums);
  }
}

void sddmm(const Sddmm<float, uint16_t>& p) {
  const int64_t width = p.width;
  for (int64_t b = 0; b < p.column_blocks; ++b) {
    const int32_t *firsts = p.starts + b * p.stride, *lasts = firsts + p.stride;
    for (int64_t panel = 0; panel < p.panels;) {
      const bool accumulate = p.accumulate || panel > 0, pair = width == 64 && panel + 1 < p.panels;
      const uint16_t *dy = p.grad_output + panel * p.grad_panel, *in = p.input + panel * p.input_panel;
      for (int64_t r = p.begin; r < p.end; ++r) {
        if (pair)
          dots<2, 2>(p, dy + r * width, in, firsts[r], lasts[r], accumulate);
        else if (width == 64)
          dots<2, 1>(p, dy + r * width, in, firsts[r], lasts[r], accumulate);
        else
          dots<1, 1>(p, dy + r * width, in, firsts[r], lasts[r], accumulate);
      }
      panel += pair ? 2 : 1;
    }
  }
}

void row_sums(const uint16_t* panel, int64_t width, int64_t channels, float* sums, bool accumulate) {
  const __m512i ones = _mm512_set1_epi32(0x3f803f80);
  for (int64_t c = 0; c < channels; ++c) {
    __m512 acc = _mm512_setzero_ps();
    for (int64_t lane = 0; lane < width; lane += 32) acc = add_pairs(acc, load_words(panel + c * width + lane), ones);
    sums[c] = sum<float>(reinterpret_cast<Vec<float>>(acc)) + (accumulate ? sums[c] : 0);
  }
}

}  // namespace

const Bf16Kernels linear = {&pack, &product, &sddmm, &row_sums};

}  // namespace uasparse::avx512bf16

#include "cpu/isa_end.h"
#undef UASPARSE_ISA_BF16
#endif
