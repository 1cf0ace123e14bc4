// Kernels of masked_linear on bfloat16 as it lies, with float32 sums: where the processor multiplies pairs of bfloat16
// (AVX512-BF16), unstructured patterns, batches over 16. Elsewhere bfloat16 is computed in float32 panels.
//
// Panels hold words, [channels][width] with width a multiple of 32. Of 32 of the batch, the first 16 are in the lower halves
// of the vector's 128-bit parts and the others in the upper halves: so one unpacking of two channels' vectors pairs their
// words and puts the batch in order.
#pragma once

#include <cstdint>

#include "cpu/masked_linear.h"

namespace uasparse {

struct Bf16Kernels {
  // Rows [batch][channels], `stride` apart, to a panel.
  void (*pack)(const uint16_t* from, int64_t stride, int64_t batch, int64_t channels, uint16_t* to, int64_t width);
  void (*product)(const Product<float, uint16_t>&);
  void (*sddmm)(const Sddmm<float, uint16_t>&);
  // sums[c] (+)= sum of panel[c, :]
  void (*row_sums)(const uint16_t* panel, int64_t width, int64_t channels, float* sums, bool accumulate);
};

// Null where the processor, or the instruction set in force, has none.
const Bf16Kernels* bf16_kernels();

namespace avx512bf16 {
extern const Bf16Kernels linear;
}

}  // namespace uasparse
