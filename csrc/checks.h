// Checks of a pattern's tensors, shared by the ops of every device.
#pragma once

#include <ATen/core/Tensor.h>

namespace uasparse {

// crow and col (int32, contiguous, one device) belong to a grid of blocks over a weight of this shape. With `or_short` col
// may be int16 too.
inline void check_csr(const at::Tensor& crow, const at::Tensor& col, at::IntArrayRef shape, at::IntArrayRef block,
                      bool or_short = false) {
  TORCH_CHECK_VALUE((shape.size() == 2 || shape.size() == 4) && block.size() == 2,
                    "Expected a weight shape of 2 or 4 sizes and a block of 2, got ", shape, " and ", block, ".");
  TORCH_CHECK_TYPE(crow.scalar_type() == at::kInt &&
                       (col.scalar_type() == at::kInt || (or_short && col.scalar_type() == at::kShort)),
                   "Expected int32 pattern tensors, got ", crow.scalar_type(), " and ", col.scalar_type(), ".");
  TORCH_CHECK_VALUE(crow.is_contiguous() && col.is_contiguous() && crow.device() == col.device(),
                    "Expected contiguous pattern tensors on one device.");
  TORCH_CHECK_VALUE(crow.dim() == 1 && crow.size(0) == shape[0] / block[0] + 1, "Expected crow of ",
                    shape[0] / block[0] + 1, " entries for a weight of shape ", shape, ", got ", crow.sizes(), ".");
}

}  // namespace uasparse
