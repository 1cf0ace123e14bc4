// Checks of what the ops are given, shared by the ops of every device. They look at sizes, dtypes, strides, devices and
// storages alone, so they cost no pass over the data; what pattern tensors hold is checked in cpu/verified.h.
#pragma once

#include <ATen/MemoryOverlap.h>
#include <ATen/core/Tensor.h>

#include <algorithm>
#include <cstdint>
#include <functional>
#include <limits>
#include <vector>

namespace uasparse {

constexpr int64_t kIndexLimit = std::numeric_limits<int32_t>::max();  // of columns and of active blocks

// The grid of blocks of a weight: what csrc/bindings.cpp says of shape and block.
struct BlockGrid {
  int64_t rows, columns, positions;
};

// False if the product of positive sizes is over `limit`.
inline bool multiply_below(int64_t& product, int64_t size, int64_t limit) {
  return !__builtin_mul_overflow(product, size, &product) && product <= limit;
}

// A weight's shape and block, as SparsityPattern takes them.
inline BlockGrid check_shape(at::IntArrayRef shape, at::IntArrayRef block) {
  TORCH_CHECK_VALUE((shape.size() == 2 || shape.size() == 4) && block.size() == 2,
                    "Expected a weight shape of 2 or 4 sizes and a block of 2, got ", shape, " and ", block, ".");
  int64_t row = 1;
  for (size_t i = 0; i < shape.size(); ++i) {
    TORCH_CHECK_VALUE(shape[i] >= 1, "Expected a weight shape of positive sizes, got ", shape, ".");
    TORCH_CHECK_VALUE(i == 0 || multiply_below(row, shape[i], kIndexLimit), "The weight shape ", shape,
                      " is too large for 32-bit indices.");
  }
  int64_t all = row;
  TORCH_CHECK_VALUE(multiply_below(all, shape[0], kIndexLimit * 64), "The weight shape ", shape,
                    " is too large for 32-bit indices.");
  TORCH_CHECK_VALUE(block[0] >= 1 && block[1] >= 1 && (block[1] == 1 || block[0] == block[1]),
                    "Expected a block (1, 1), (r, 1) or (b, b), got ", block, ".");
  TORCH_CHECK_VALUE(shape[0] % block[0] == 0 && shape[1] % block[1] == 0, "Expected a block that divides the weight's "
                    "output and input sizes ", shape.slice(0, 2), ", got ", block, ".");
  return {shape[0] / block[0], row / block[1], row / shape[1]};
}

// The storage holds what the tensor claims: it may have been freed or cut under it (untyped_storage().resize_()).
inline void check_storage(const at::Tensor& tensor, const char* name) {
  if (tensor.numel() == 0) return;
  TORCH_CHECK_VALUE(tensor.has_storage(), "Expected ", name, " to have a storage.");
  __int128 last = tensor.storage_offset();
  if (tensor.is_contiguous())
    last += tensor.numel() - 1;
  else
    for (int64_t d = 0; d < tensor.dim(); ++d) last += static_cast<__int128>(tensor.size(d) - 1) * tensor.stride(d);
  const size_t bytes = tensor.storage().nbytes();
  TORCH_CHECK_VALUE((last + 1) * static_cast<__int128>(tensor.element_size()) <= static_cast<__int128>(bytes),
                    "Expected ", name, " of sizes ", tensor.sizes(), " to lie in its storage, which holds ", bytes,
                    " bytes: it was freed or cut.");
  TORCH_CHECK_VALUE(reinterpret_cast<uintptr_t>(tensor.const_data_ptr()) % tensor.element_size() == 0, "Expected ", name,
                    " at an address that is a multiple of its elements' size, got one in the middle of bytes; clone() it.");
}

// A row of indices of a pattern.
inline void check_index(const at::Tensor& tensor, const char* name, int64_t size, const at::Tensor& like,
                        bool or_short = false) {
  TORCH_CHECK_TYPE(tensor.scalar_type() == at::kInt || (or_short && tensor.scalar_type() == at::kShort),
                   "Expected int32 pattern tensors, got ", name, " of ", tensor.scalar_type(), ".");
  TORCH_CHECK_VALUE(tensor.dim() == 1 && tensor.size(0) == size, "Expected ", name, " of ", size, " entries, got ",
                    tensor.sizes(), ".");
  TORCH_CHECK_VALUE(tensor.is_contiguous() && tensor.device() == like.device(),
                    "Expected contiguous pattern tensors on one device, got ", name, " of strides ", tensor.strides(),
                    " on ", tensor.device(), " beside ", like.device(), ".");
  check_storage(tensor, name);
}

// crow and col belong to a grid of blocks over a weight of this shape. With `or_short` col may be int16 too.
inline BlockGrid check_csr(const at::Tensor& crow, const at::Tensor& col, at::IntArrayRef shape, at::IntArrayRef block,
                           bool or_short = false) {
  const BlockGrid grid = check_shape(shape, block);
  check_index(crow, "crow", grid.rows + 1, crow);
  TORCH_CHECK_VALUE(col.dim() == 1 && col.size(0) <= kIndexLimit, "Expected col of one dimension and at most ",
                    kIndexLimit, " entries, got ", col.sizes(), ".");
  check_index(col, "col", col.size(0), crow, or_short);
  return grid;
}

// The order by columns has the sizes that belong to the one by rows.
inline void check_transposed(const at::Tensor& ccol, const at::Tensor& row, const at::Tensor& perm,
                             const at::Tensor& col, const BlockGrid& grid) {
  check_index(ccol, "ccol", grid.columns + 1, col);
  check_index(row, "row", col.size(0), col);
  check_index(perm, "perm", col.size(0), col);
}

// A weight is dense-stored (true) or packed (false), and lies on the pattern's device.
inline bool check_weight(const at::Tensor& weight, const at::Tensor& col, at::IntArrayRef shape, at::IntArrayRef block,
                         const char* op) {
  TORCH_CHECK_VALUE(weight.device() == col.device(), op, ": expected weight and pattern on one device, got ",
                    weight.device(), " and ", col.device(), ".");
  check_storage(weight, "weight");
  if (weight.sizes() == shape) return true;
  const int64_t packed[] = {col.size(0), block[0], block[1]};
  const at::IntArrayRef expected(packed, block[0] * block[1] == 1 ? 1 : 3);
  TORCH_CHECK_VALUE(weight.sizes() == expected, op, ": expected a weight of shape ", shape, " (dense-stored) or ",
                    expected, " (packed), got ", weight.sizes(), ".");
  return false;
}

// A tensor that goes with another: of its dtype, on its device.
inline void check_like(const at::Tensor& tensor, const char* name, const at::Tensor& like, const char* op) {
  TORCH_CHECK_TYPE(tensor.scalar_type() == like.scalar_type(), op, ": expected ", name, " of dtype ",
                   like.scalar_type(), ", got ", tensor.scalar_type(), ".");
  TORCH_CHECK_VALUE(tensor.device() == like.device(), op, ": expected ", name, " on ", like.device(), ", got ",
                    tensor.device(), ".");
  check_storage(tensor, name);
}

// A tensor that is written: no two entries share their place.
inline void check_output(const at::Tensor& tensor, const char* name) {
  check_storage(tensor, name);
  TORCH_CHECK_VALUE(at::has_internal_overlap(tensor) != at::MemOverlap::Yes, "Expected ", name,
                    " whose entries have places of their own, got sizes ", tensor.sizes(), " of strides ",
                    tensor.strides(), ".");
}

// Tensors that are written: no two share memory. (Dense-stored ones may interleave: they get nothing but zeros.)
inline void check_apart(std::vector<at::Tensor> tensors) {
  std::erase_if(tensors, [](const at::Tensor& tensor) { return tensor.numel() == 0 || !tensor.is_contiguous(); });
  std::sort(tensors.begin(), tensors.end(), [](const at::Tensor& a, const at::Tensor& b) {
    return std::less<>()(a.const_data_ptr(), b.const_data_ptr());
  });
  for (size_t i = 1; i < tensors.size(); ++i) {
    const void* end = static_cast<const char*>(tensors[i - 1].const_data_ptr()) + tensors[i - 1].nbytes();
    TORCH_CHECK_VALUE(std::less_equal<>()(end, tensors[i].const_data_ptr()),
                      "prune_grow_: expected weight, states and pattern tensors that share no memory.");
  }
}

}  // namespace uasparse
