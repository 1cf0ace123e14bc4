// The pass of topk_indices over all scores: which are surely selected, and which may be.
#pragma once

#include <cstdint>

namespace uasparse {

// A score's preference is the score, taken absolute with magnitude, and negated unless largest: higher is better.
// Sets bit i of `above` where preference i > high, and bit i of `maybe` where low <= preference i <= high; NaN sets
// neither. n is a multiple of 64, and 64 bits go to a word.
void classify_scores(const float* scores, int64_t n, float low, float high, bool largest, bool magnitude,
                     uint64_t* above, uint64_t* maybe);

}  // namespace uasparse
