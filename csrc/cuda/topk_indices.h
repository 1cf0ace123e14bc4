// Launcher of topk_indices: raw device pointers, no torch.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace uasparse {

constexpr int kTopkSegments = 64;  // of one launch set; they travel as a kernel parameter, which is limited to 4 KiB

// The k best of n scores (float or double), as ascending indices: 0 <= k <= n, 0 < n < 2^31.
struct TopkSegment {
  const void* scores;
  int64_t* indices;  // [k]
  int64_t n, k;
};

struct TopkArguments {
  int segments;
  bool is_double, largest, magnitude;
  TopkSegment segment[kTopkSegments];
};

size_t topk_workspace_bytes(const TopkArguments& arguments);
cudaError_t launch_topk(const TopkArguments& arguments, void* workspace, cudaStream_t stream);

}  // namespace uasparse
