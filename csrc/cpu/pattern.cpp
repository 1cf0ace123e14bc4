// pack and unpack on the CPU: one pass over the active blocks, parallel over rows of the grid.

#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include "checks.h"
#include "cpu/pattern.h"

namespace uasparse {
namespace {

// Calls visit(packed index, dense index) for each active weight of the grid rows [begin, end).
template <typename Visit>
void for_each_weight(const int32_t* crow, const int32_t* col, int64_t begin, int64_t end, int64_t bh, int64_t bw,
                     int64_t channels, int64_t positions, Visit visit) {
  if (bh == 1 && bw == 1) {
    const int64_t columns = channels * positions;
    for (int64_t r = begin; r < end; ++r)
      for (int64_t i = crow[r]; i < crow[r + 1]; ++i) visit(i, r * columns + col[i]);
    return;
  }
  for (int64_t r = begin; r < end; ++r) {
    for (int64_t i = crow[r]; i < crow[r + 1]; ++i) {
      const int64_t channel = col[i] / positions * bw, position = col[i] % positions;
      for (int64_t y = 0; y < bh; ++y)
        for (int64_t x = 0; x < bw; ++x)
          visit((i * bh + y) * bw + x, ((r * bh + y) * channels + channel + x) * positions + position);
    }
  }
}

int64_t positions_of(at::IntArrayRef shape) {
  int64_t positions = 1;
  for (size_t i = 2; i < shape.size(); ++i) positions *= shape[i];
  return positions;
}

}  // namespace

at::Tensor pack(const at::Tensor& dense, const at::Tensor& crow, const at::Tensor& col, at::IntArrayRef block) {
  check_csr(crow, col, dense.sizes(), block);
  const at::Tensor source = dense.contiguous();
  const int64_t bh = block[0], bw = block[1];
  at::Tensor values = bh == 1 && bw == 1 ? at::empty({col.size(0)}, dense.options().memory_format(at::MemoryFormat::Contiguous))
                                         : at::empty({col.size(0), bh, bw}, dense.options().memory_format(at::MemoryFormat::Contiguous));
  AT_DISPATCH_ALL_TYPES_AND3(at::kBFloat16, at::kHalf, at::kBool, dense.scalar_type(), "pack", [&] {
    const scalar_t* from = source.const_data_ptr<scalar_t>();
    scalar_t* to = values.mutable_data_ptr<scalar_t>();
    const int32_t *rows = crow.const_data_ptr<int32_t>(), *cols = col.const_data_ptr<int32_t>();
    at::parallel_for(0, crow.size(0) - 1, 64, [&](int64_t begin, int64_t end) {
      for_each_weight(rows, cols, begin, end, bh, bw, dense.size(1), positions_of(dense.sizes()),
                      [&](int64_t packed, int64_t flat) { to[packed] = from[flat]; });
    });
  });
  return values;
}

at::Tensor unpack(const at::Tensor& values, const at::Tensor& crow, const at::Tensor& col, at::IntArrayRef shape,
                  at::IntArrayRef block) {
  check_csr(crow, col, shape, block);
  const int64_t bh = block[0], bw = block[1];
  TORCH_CHECK_VALUE(values.numel() == col.size(0) * bh * bw, "Expected ", col.size(0) * bh * bw,
                    " packed values, got ", values.numel(), ".");
  const at::Tensor source = values.contiguous();
  at::Tensor dense = at::zeros(shape, values.options().memory_format(at::MemoryFormat::Contiguous));
  AT_DISPATCH_ALL_TYPES_AND3(at::kBFloat16, at::kHalf, at::kBool, values.scalar_type(), "unpack", [&] {
    const scalar_t* from = source.const_data_ptr<scalar_t>();
    scalar_t* to = dense.mutable_data_ptr<scalar_t>();
    const int32_t *rows = crow.const_data_ptr<int32_t>(), *cols = col.const_data_ptr<int32_t>();
    at::parallel_for(0, crow.size(0) - 1, 64, [&](int64_t begin, int64_t end) {
      for_each_weight(rows, cols, begin, end, bh, bw, shape[1], positions_of(shape),
                      [&](int64_t packed, int64_t flat) { to[flat] = from[packed]; });
    });
  });
  return dense;
}

TORCH_LIBRARY_IMPL(uasparse, CPU, m) {
  m.impl("pack", &pack);
  m.impl("unpack", &unpack);
}

}  // namespace uasparse
