// What the planes of max_pool2d (max_pool_impl.h) take and give, and where they are for each instruction set.
#pragma once

#include <cstdint>
#include <utility>

namespace uasparse {

// Planes [height, width] and [out_height, out_width], one after the other.
struct MaxPool {
  int64_t height, width, out_height, out_width;
  int64_t kernel_h, kernel_w, stride_h, stride_w, padding_h, padding_w;
  const float* input;
  float* output;
  int64_t* indices;  // of the plane's number that was taken

  // Rows that the kernel takes apart by phases of stride_w, padded: this many floats a phase, for each of its rows.
  int64_t phase() const { return out_width + (kernel_w - 1) / stride_w + kSlack; }
  int64_t scratch() const { return kernel_h * stride_w * phase() + kSlack; }
  static constexpr int64_t kSlack = 16;  // no vector has more lanes
};

#define UASPARSE_MAX_POOL(isa)                                                                  \
  namespace isa {                                                                               \
  void max_pool(const MaxPool& problem, int64_t first, int64_t last, float* scratch);           \
  }
UASPARSE_MAX_POOL(portable)
UASPARSE_MAX_POOL(avx2)
UASPARSE_MAX_POOL(avx512)
#undef UASPARSE_MAX_POOL

}  // namespace uasparse
