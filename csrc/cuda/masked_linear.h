// Launchers of the products with unstructured weights: raw device pointers, no torch.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>

namespace uasparse {

enum class ValueType { kFloat, kHalf, kBFloat16 };

struct SparseProblem {
  ValueType type;          // of x, the values and the results
  const int32_t* offsets;  // [rows + 1]: the weight by rows (or its transpose: by columns)
  const int32_t* index;    // [nnz]: columns, ascending in each row
  int64_t rows, columns, nnz, tokens;
  const void* x;  // [tokens, columns], rows stride_x apart
  int64_t stride_x;
  int processors, shared_bytes;  // of the device; shared_bytes a block may have
  int lane_tokens, panel_units;  // a tile to take (see masked_linear.cu), 0: chosen by the sizes
};

// y [tokens, rows] = x @ W^T + bias, where values [nnz] are those of W; bias may be null. All in the problem's type, rows
// of y stride_y apart. The workspace holds what sparse_workspace_bytes(problem, false) says.
cudaError_t launch_sparse_product(const SparseProblem& problem, const void* values, const void* bias, void* y,
                                  int64_t stride_y, void* workspace, cudaStream_t stream);

// out [nnz] = dy^T x at the active entries, dy [tokens, rows] with rows stride_dy apart; the workspace holds what
// sparse_workspace_bytes(problem, true) says.
cudaError_t launch_sampled_product(const SparseProblem& problem, const void* dy, int64_t stride_dy, void* out,
                                   void* workspace, cudaStream_t stream);

size_t sparse_workspace_bytes(const SparseProblem& problem, bool sampled);

}  // namespace uasparse
