// Launchers of the unknown-aware loss: raw device pointers, no torch.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace uasparse {

enum class LogitType { kFloat, kDouble, kHalf, kBFloat16 };

// acc: float, or double for double logits. All pointers are to device memory; N > 0, classes < 2^31 - 64.
struct LossArguments {
  LogitType type;
  const void* logits;     // [rows, classes]
  const int64_t* target;  // [rows]
  const void* alpha;      // acc []
  int64_t rows, classes;  // classes = K + 1
  double unknown_weight;
  int reduction;     // 0 none, 1 mean, 2 sum
  int shared_bytes;  // that a block may have
};

// Bytes that a forward needs, and which of them (from the start) must be zero.
size_t loss_workspace_bytes(const LossArguments& arguments);
constexpr size_t kLossZeroBytes = sizeof(unsigned);

// loss: acc [] or [rows]; threshold: acc []; saved: acc [rows, 2].
//
// With `grad` ([rows, classes] of the logits' type; reduction mean or sum) the gradient is made too, for a gradient of the
// loss that is read from `expected` (acc []); saved is acc [rows, 3] then, the third being what was read.
cudaError_t launch_loss_forward(const LossArguments& arguments, void* loss, void* threshold, void* saved,
                                void* workspace, const void* expected, void* grad, cudaStream_t stream);
// grad_loss: acc [] or [rows]; grad: [rows, classes] of the logits' type.
//
// With `expected`, what a forward with a gradient left is put right: saved is acc [rows, 3], rows made for this grad_loss
// are left as they are, and grad_loss is written to `expected`.
cudaError_t launch_loss_backward(const LossArguments& arguments, const void* grad_loss, const void* saved,
                                 void* expected, void* grad, cudaStream_t stream);

}  // namespace uasparse
