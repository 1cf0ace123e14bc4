// The passes of topk_indices over scores and bits, which topk_classify.cpp has for each instruction set.
#pragma once

#include <cstdint>

namespace uasparse {

// A score's preference is the score, taken absolute with magnitude, and negated unless largest: higher is better.
// Sets bit i of `above` where preference i > high, and bit i of `maybe` where low <= preference i <= high; NaN sets
// neither. n is a multiple of 64, and 64 bits go to a word.
void classify_scores(const float* scores, int64_t n, float low, float high, bool largest, bool magnitude,
                     uint64_t* above, uint64_t* maybe);

// Writes first + i for every bit i set in n words, ascending, from `to` up to exactly `last`.
void write_indices(const uint64_t* words, int64_t n, int64_t first, int64_t* to, const int64_t* last);

int64_t count_bits(const uint64_t* words, int64_t n);

}  // namespace uasparse
