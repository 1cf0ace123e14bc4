// Launchers of the unknown-aware loss: raw device pointers, no torch.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace uasparse {

enum class LogitType { kFloat, kDouble, kHalf, kBFloat16 };

// acc: float, or double for double logits. All pointers are to device memory; N > 0.
struct LossArguments {
  LogitType type;
  const void* logits;     // [rows, classes]
  const int64_t* target;  // [rows]
  const void* alpha;      // acc []
  int64_t rows, classes;  // classes = K + 1
  double unknown_weight;
  int reduction;  // 0 none, 1 mean, 2 sum
};

// Bytes that a forward needs, and which of them (from the start) must be zero.
size_t loss_workspace_bytes(const LossArguments& arguments);
constexpr size_t kLossZeroBytes = sizeof(unsigned);

// loss: acc [] or [rows]; threshold: acc []; saved: acc [rows, 2].
cudaError_t launch_loss_forward(const LossArguments& arguments, void* loss, void* threshold, void* saved,
                                void* workspace, cudaStream_t stream);
// grad_loss: acc [] or [rows]; grad: [rows, classes] of the logits' type.
cudaError_t launch_loss_backward(const LossArguments& arguments, const void* grad_loss, const void* saved, void* grad,
                                 cudaStream_t stream);

}  // namespace uasparse
