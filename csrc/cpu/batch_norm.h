// What the channels of batch_norm (batch_norm_impl.h) take and give, and where they are for each instruction set.
#pragma once

#include <cstdint>
#include <utility>

namespace uasparse {

// Channels that one call takes at most.
constexpr int64_t kMaxChannels = 64;

// Maps of fewer pixels than this may be gathered: the scratch then holds kScratchRows rows of batch * pixels floats,
// each behind kSlack floats. No vector has more lanes.
constexpr int64_t kSlack = 16;
constexpr int64_t kScratchRows = 4;

// Tensors are [batch, channels, pixels], contiguous.
struct BatchNormProblem {
  int64_t batch, channels, pixels;
  const float* x;
  const float* weight;  // or null: ones
  // Whether a map that is written goes past the caches: it is larger than L2, and each row whole cache lines.
  bool streams;
};

struct BatchNormForward : BatchNormProblem {
  const float* bias;  // or null: zeros
  const float* residual;  // of x's shape, added before the ReLU; or null
  bool relu;
  double eps;
  float* y;
  float* stats;   // [2, channels]: mean, unbiased variance
  double* saved;  // [3, channels]: mean, 1 / sqrt(variance + eps), bias
};

struct BatchNormBackward : BatchNormProblem {
  const float* dy;
  const double* saved;
  // Of a ReLU: where the output is not above zero no gradient passes. That is known from y where it is given, else from x.
  bool relu;
  const float* y;
  float most;        // nor where y is above this: infinity, but for a ReLU with a ceiling
  float* dx;         // these, or null
  float* dweight;
  float* dbias;
  float* dresidual;  // what passes the ReLU
  // dresidual, or without it dx, may be dy.
};

// Channels [first, last).
#define UASPARSE_BATCH_NORM(isa)                                                                             \
  namespace isa {                                                                                            \
  void batch_norm_forward(const BatchNormForward& problem, int64_t first, int64_t last, float* scratch);     \
  void batch_norm_backward(const BatchNormBackward& problem, int64_t first, int64_t last, float* scratch);   \
  }
UASPARSE_BATCH_NORM(portable)
UASPARSE_BATCH_NORM(avx2)
UASPARSE_BATCH_NORM(avx512)
#undef UASPARSE_BATCH_NORM

}  // namespace uasparse
