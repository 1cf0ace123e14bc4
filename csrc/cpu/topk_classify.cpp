// The passes of topk_indices over scores and bits for each instruction set. The first runs at the speed of memory.

#include <bit>
#include <cmath>

#include "cpu/isa.h"
#include "cpu/topk_indices.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace uasparse {
namespace {

void classify_portable(const float* scores, int64_t n, float low, float high, float sign, bool magnitude,
                       uint64_t* above, uint64_t* maybe) {
  for (int64_t word = 0; word < n / 64; ++word) {
    uint64_t high_bits = 0, low_bits = 0;
    for (int64_t i = 0; i < 64; ++i) {
      const float score = scores[word * 64 + i], x = (magnitude ? std::fabs(score) : score) * sign;
      high_bits |= static_cast<uint64_t>(x > high) << i;
      low_bits |= static_cast<uint64_t>(x >= low) << i;
    }
    above[word] = high_bits;
    maybe[word] = low_bits & ~high_bits;
  }
}

// Eight indices at once, needed or not (those too many are overwritten by the next word's), while there is room: branches
// on the number of bits would be mispredicted.
inline __attribute__((always_inline)) void write_any(const uint64_t* words, int64_t n, int64_t first, int64_t* to,
                                                     const int64_t* last) {
  int64_t w = 0;
  for (; w < n && last - to >= 64; ++w) {
    uint64_t bits = words[w];
    int64_t* const next = to + __builtin_popcountll(bits);
    do {
      for (int i = 0; i < 8; ++i, bits &= bits - 1) to[i] = first + w * 64 + std::countr_zero(bits);
      to += 8;
    } while (bits != 0);
    to = next;
  }
  for (; w < n; ++w)
    for (uint64_t bits = words[w]; bits != 0; bits &= bits - 1) *to++ = first + w * 64 + std::countr_zero(bits);
}

inline __attribute__((always_inline)) int64_t count_any(const uint64_t* words, int64_t n) {
  int64_t count = 0;
  for (int64_t w = 0; w < n; ++w) count += __builtin_popcountll(words[w]);
  return count;
}

#if defined(__x86_64__)
__attribute__((target("avx2,bmi,popcnt"))) void write_bmi(const uint64_t* words, int64_t n, int64_t first, int64_t* to,
                                                          const int64_t* last) {
  write_any(words, n, first, to, last);
}

__attribute__((target("avx2,bmi,popcnt"))) int64_t count_bmi(const uint64_t* words, int64_t n) {
  return count_any(words, n);
}

// keep clears the sign bit for magnitudes, flip then negates for the smallest.
__attribute__((target("avx2"))) void classify_avx2(const float* scores, int64_t n, float low, float high, int32_t keep,
                                                   int32_t flip, uint64_t* above, uint64_t* maybe) {
  const __m256 keeps = _mm256_castsi256_ps(_mm256_set1_epi32(keep)), flips = _mm256_castsi256_ps(_mm256_set1_epi32(flip));
  const __m256 lows = _mm256_set1_ps(low), highs = _mm256_set1_ps(high);
  for (int64_t word = 0; word < n / 64; ++word) {
    uint64_t high_bits = 0, low_bits = 0;
    for (int i = 0; i < 8; ++i) {
      const __m256 x = _mm256_xor_ps(_mm256_and_ps(_mm256_loadu_ps(scores + word * 64 + i * 8), keeps), flips);
      high_bits |= static_cast<uint64_t>(_mm256_movemask_ps(_mm256_cmp_ps(x, highs, _CMP_GT_OQ))) << (8 * i);
      low_bits |= static_cast<uint64_t>(_mm256_movemask_ps(_mm256_cmp_ps(x, lows, _CMP_GE_OQ))) << (8 * i);
    }
    above[word] = high_bits;
    maybe[word] = low_bits & ~high_bits;
  }
}

__attribute__((target("avx512f,avx512dq"))) void classify_avx512(const float* scores, int64_t n, float low, float high,
                                                                 int32_t keep, int32_t flip, uint64_t* above,
                                                                 uint64_t* maybe) {
  const __m512i keeps = _mm512_set1_epi32(keep), flips = _mm512_set1_epi32(flip);
  const __m512 lows = _mm512_set1_ps(low), highs = _mm512_set1_ps(high);
  for (int64_t word = 0; word < n / 64; ++word) {
    uint64_t high_bits = 0, low_bits = 0;
    for (int i = 0; i < 4; ++i) {
      const __m512i bits = _mm512_loadu_si512(scores + word * 64 + i * 16);
      const __m512 x = _mm512_castsi512_ps(_mm512_xor_si512(_mm512_and_si512(bits, keeps), flips));
      high_bits |= static_cast<uint64_t>(_mm512_cmp_ps_mask(x, highs, _CMP_GT_OQ)) << (16 * i);
      low_bits |= static_cast<uint64_t>(_mm512_cmp_ps_mask(x, lows, _CMP_GE_OQ)) << (16 * i);
    }
    above[word] = high_bits;
    maybe[word] = low_bits & ~high_bits;
  }
}
#endif

}  // namespace

void classify_scores(const float* scores, int64_t n, float low, float high, bool largest, bool magnitude,
                     uint64_t* above, uint64_t* maybe) {
#if defined(__x86_64__)
  const int32_t keep = magnitude ? 0x7fffffff : -1, flip = largest ? 0 : INT32_MIN;
  if (cpu_isa() == Isa::avx512) return classify_avx512(scores, n, low, high, keep, flip, above, maybe);
  if (cpu_isa() == Isa::avx2) return classify_avx2(scores, n, low, high, keep, flip, above, maybe);
#endif
  classify_portable(scores, n, low, high, largest ? 1.0f : -1.0f, magnitude, above, maybe);
}

void write_indices(const uint64_t* words, int64_t n, int64_t first, int64_t* to, const int64_t* last) {
#if defined(__x86_64__)
  if (cpu_isa() != Isa::portable) return write_bmi(words, n, first, to, last);
#endif
  write_any(words, n, first, to, last);
}

int64_t count_bits(const uint64_t* words, int64_t n) {
#if defined(__x86_64__)
  if (cpu_isa() != Isa::portable) return count_bmi(words, n);
#endif
  return count_any(words, n);
}

}  // namespace uasparse
