// Max pooling of contiguous float32 maps on the CPU, where torch's takes ten times as long as the memory asks for: checks,
// threads; the arithmetic is in max_pool_impl.h. The backward is torch's, from the same indices.

#include "cpu/max_pool.h"

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <limits>
#include <tuple>

#include "checks.h"
#include "cpu/isa.h"
#include "cpu/workspace.h"

namespace uasparse {
namespace {

void run(const MaxPool& problem, int64_t first, int64_t last, float* scratch) {
  switch (cpu_isa()) {
#if defined(__x86_64__)
    case Isa::avx512: return avx512::max_pool(problem, first, last, scratch);
    case Isa::avx2: return avx2::max_pool(problem, first, last, scratch);
#endif
    default: return portable::max_pool(problem, first, last, scratch);
  }
}

std::tuple<at::Tensor, at::Tensor> max_pool2d(const at::Tensor& input, at::IntArrayRef kernel, at::IntArrayRef stride,
                                              at::IntArrayRef padding) {
  TORCH_CHECK_TYPE(input.scalar_type() == at::kFloat, "max_pool2d: expected a float32 input, got ", input.scalar_type(),
                   ".");
  TORCH_CHECK_VALUE(input.dim() == 4 && kernel.size() == 2 && stride.size() == 2 && padding.size() == 2,
                    "max_pool2d: expected an input [N, C, H, W] and pairs of kernel, stride and padding, got sizes ",
                    input.sizes(), ", ", kernel, ", ", stride, " and ", padding, ".");
  check_storage(input, "input");
  TORCH_CHECK_VALUE(input.size(1) >= 1 && input.size(2) >= 1 && input.size(3) >= 1,
                    "max_pool2d: expected maps of at least one channel and pixel, got sizes ", input.sizes(), ".");
  constexpr int64_t limit = 1 << 20;  // of sizes that are added and multiplied below
  for (int i = 0; i < 2; ++i)
    TORCH_CHECK_VALUE(kernel[i] >= 1 && stride[i] >= 1 && kernel[i] <= limit && stride[i] <= limit && padding[i] >= 0 &&
                          padding[i] <= kernel[i] / 2 && input.size(2 + i) <= int64_t{1} << 31 &&
                          input.size(2 + i) + 2 * padding[i] >= kernel[i],
                      "max_pool2d: expected kernel and stride of at least one, a padding of at most half the kernel, and "
                      "a kernel within the padded input, got kernel ", kernel, ", stride ", stride, ", padding ", padding,
                      " for sizes ", input.sizes(), ".");
  const at::Tensor x = input.contiguous();
  MaxPool problem{x.size(2), x.size(3), 0, 0, kernel[0], kernel[1], stride[0], stride[1], padding[0], padding[1],
                  x.const_data_ptr<float>(), nullptr, nullptr};
  problem.out_height = (problem.height + 2 * padding[0] - kernel[0]) / stride[0] + 1;
  problem.out_width = (problem.width + 2 * padding[1] - kernel[1]) / stride[1] + 1;
  TORCH_CHECK_VALUE((problem.height + 2 * padding[0] + 16) * (problem.width + 16 * stride[1]) <
                        std::numeric_limits<int32_t>::max(),
                    "max_pool2d: maps of sizes ", x.sizes(), " are too large; use torch's.");
  const at::Tensor output = at::empty({x.size(0), x.size(1), problem.out_height, problem.out_width}, x.options());
  const at::Tensor indices = at::empty(output.sizes(), x.options().dtype(at::kLong));
  problem.output = output.mutable_data_ptr<float>();
  problem.indices = indices.mutable_data_ptr<int64_t>();
  const int64_t planes = x.size(0) * x.size(1), grain = 1 + (1 << 15) / (problem.height * problem.width);
  at::parallel_for(0, planes, grain, [&](int64_t first, int64_t last) {
    const Workspace scratch(sizeof(float) * problem.scratch());
    run(problem, first, last, scratch.as<float>());
  });
  return {output, indices};
}

}  // namespace

TORCH_LIBRARY_IMPL(uasparse, CPU, m) { m.impl("max_pool2d", &max_pool2d); }

}  // namespace uasparse
