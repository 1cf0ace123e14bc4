// masked_conv2d on the CPU: checks, storage and the choice between the ways of conv_pass.h, the first that can:
//   taken      (conv_taken.cpp)     one tap, NCHW, with strides or planes that are not whole vectors: copies, then in place
//   in place   (conv_in_place.cpp)  one tap, stride 1, NCHW: neighbouring positions where they are
//   by space   (conv_by_space.cpp)  NCHW, stride 1, in float32 with AVX-512 small strides too: neighbouring positions of
//              copied rows; in blocks (conv_quads_by_space.cpp) several taps, stride 1, float32 and AVX-512
//   by batch   (conv_by_batch.cpp)  all else: one position of several images, or strips of them, transposed
//
// Every output is summed in the order of the entries, and grad weight in the order of fixed chunks of the batch, so
// results do not depend on the number of threads. bfloat16 has float32 sums, and goes by batch unless it
// has one tap and AVX512-BF16.

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <type_traits>
#include <vector>

#include "checks.h"
#include "cpu/conv_pass.h"
#include "cpu/verified.h"

namespace uasparse {
namespace {

ConvWeight weight_of(const at::Tensor& weight, const at::Tensor& crow, const at::Tensor& col, at::IntArrayRef shape,
                     at::IntArrayRef block, int64_t groups) {
  return {crow.const_data_ptr<int32_t>(), col.const_data_ptr<int32_t>(), &crow, &col, shape[0], shape[1], shape[2] * shape[3],
          groups, block[0], block[1], col.size(0), weight.sizes() != shape};
}

// The kernels make tables of a stride's length and of the padded rows: none is made for what no network has.
constexpr int64_t kMaxStep = 1 << 20;
constexpr int64_t kMaxNumbers = int64_t{1} << 48;  // of a packed row: far more than is served, and no overflow

Geometry check(const at::Tensor& input, const at::Tensor& weight, const at::Tensor& crow, const at::Tensor& col,
               const at::Tensor& ccol, const at::Tensor& row, const at::Tensor& perm, at::IntArrayRef shape,
               at::IntArrayRef block, at::IntArrayRef stride, at::IntArrayRef padding, at::IntArrayRef dilation,
               int64_t groups) {
  const BlockGrid grid = check_csr(crow, col, shape, block);
  check_transposed(ccol, row, perm, col, grid);
  TORCH_CHECK_VALUE(shape.size() == 4 && stride.size() == 2 && padding.size() == 2 && dilation.size() == 2,
                    "masked_conv2d: expected a weight shape of 4 sizes and pairs of stride, padding and dilation.");
  for (int i = 0; i < 2; ++i)
    TORCH_CHECK_VALUE(stride[i] >= 1 && dilation[i] >= 1 && padding[i] >= 0 && stride[i] <= kMaxStep &&
                          dilation[i] <= kMaxStep && padding[i] <= kMaxStep,
                      "masked_conv2d: expected stride and dilation >= 1 and padding >= 0, all up to ", kMaxStep, ", got ",
                      stride, ", ", dilation, " and ", padding, ".");
  TORCH_CHECK_VALUE(groups >= 1 && shape[0] % groups == 0 && shape[0] / groups % block[0] == 0,
                    "masked_conv2d: expected groups that divide the output size ", shape[0], " into whole blocks, got ",
                    groups, ".");
  TORCH_CHECK_VALUE(input.dim() == 4 && input.size(1) == shape[1] * groups, "masked_conv2d: expected an input [N, ",
                    shape[1] * groups, ", H, W] for a weight of shape ", shape, " and ", groups, " groups, got ",
                    input.sizes(), ".");
  check_storage(input, "input");
  check_like(weight, "weight", input, "masked_conv2d");
  check_weight(weight, col, shape, block, "masked_conv2d");
  int64_t numbers = std::max(shape[0], input.size(1)), maps = numbers, nonzeros = col.size(0);
  const bool fits = multiply_below(maps, input.size(0), kMaxNumbers) && multiply_below(maps, input.size(2), kMaxNumbers) &&
                    multiply_below(maps, input.size(3), kMaxNumbers) &&
                    multiply_below(nonzeros, block[0], kIndexLimit) && multiply_below(nonzeros, block[1], kIndexLimit) &&
                    multiply_below(numbers, shape[2] * shape[3], kMaxNumbers) &&
                    multiply_below(numbers, stride[0], kMaxNumbers) && input.size(2) <= kIndexLimit &&
                    input.size(3) <= kIndexLimit &&
                    multiply_below(numbers, input.size(3) + 2 * padding[1] + stride[1], kMaxNumbers);
  TORCH_CHECK_VALUE(fits, "masked_conv2d: an input of ", input.sizes(), " with stride ", stride, " and padding ", padding,
                    " is too large for the sparse kernel.");
  Geometry g{input.size(0), input.size(1), input.size(2), input.size(3), shape[0], 0, 0, shape[2], shape[3],
             groups,        stride,        padding,       dilation};
  g.out_height = (g.height + 2 * padding[0] - dilation[0] * (g.kernel_h - 1) - 1) / stride[0] + 1;
  g.out_width = (g.width + 2 * padding[1] - dilation[1] * (g.kernel_w - 1) - 1) / stride[1] + 1;
  TORCH_CHECK_VALUE(g.height + 2 * padding[0] > dilation[0] * (g.kernel_h - 1) &&
                        g.width + 2 * padding[1] > dilation[1] * (g.kernel_w - 1),
                    "masked_conv2d: the kernel ", shape.slice(2), " with dilation ", dilation,
                    " is larger than the padded input ", input.sizes(), ".");
  verify_rows(crow, col, grid.columns);  // the order by columns is not read
  return g;
}

// Calls run.operator()<accumulation type, storage type>().
template <typename Run>
void dispatch(at::ScalarType type, Run run) {
  switch (type) {
    case at::kFloat: return run.template operator()<float, float>();
    case at::kDouble: return run.template operator()<double, double>();
    case at::kBFloat16: return run.template operator()<float, BFloat16>();
    default:
      TORCH_CHECK_TYPE(false, "masked_conv2d: expected float32, float64 or bfloat16, got ", type, ".");
  }
}

// A map to be written.
at::Tensor empty_map(at::IntArrayRef sizes, const at::Tensor& like) {
  const at::Tensor map = at::empty(sizes, like.options(), like.suggest_memory_format());
  prefer_huge_pages(map.mutable_data_ptr(), map.nbytes());
  return map;
}

at::Tensor masked_conv2d(const at::Tensor& input, const at::Tensor& weight, const std::optional<at::Tensor>& bias,
                         const at::Tensor& crow, const at::Tensor& col, const at::Tensor& ccol,
                         const at::Tensor& row, const at::Tensor& perm, at::IntArrayRef shape, at::IntArrayRef block, at::IntArrayRef stride,
                         at::IntArrayRef padding, at::IntArrayRef dilation, int64_t groups) {
  const Geometry g = check(input, weight, crow, col, ccol, row, perm, shape, block, stride, padding, dilation, groups);
  const at::Tensor values = weight.contiguous();
  at::Tensor bias_values;
  if (bias.has_value() && bias->defined()) {
    check_like(*bias, "bias", input, "masked_conv2d");
    TORCH_CHECK_VALUE(bias->dim() == 1 && bias->size(0) == g.out, "masked_conv2d: expected a bias [", g.out, "], got ",
                      bias->sizes(), ".");
    bias_values = bias->contiguous();
  }
  const at::Tensor output = empty_map({g.batch, g.out, g.out_height, g.out_width}, input);
  if (output.numel() == 0) return output;
  const ConvWeight w = weight_of(values, crow, col, shape, block, groups);
  dispatch(input.scalar_type(), [&]<typename T, typename S>() {
    std::vector<T> biases;
    if (bias_values.defined())
      for (int64_t o = 0; o < g.out; ++o)
        biases.push_back(to_number(static_cast<const S*>(bias_values.const_data_ptr())[o]));
    if (forward_taken<T, S>(g, w, input, values, biases, output) ||
        forward_in_place<T, S>(g, w, input, values, biases, output))
      return;
    if constexpr (std::is_same_v<T, S>)
      if (forward_by_space<T>(g, w, input, values, biases, output)) return;
    forward_by_batch<T, S>(g, w, input, values, biases, output);
  });
  return output;
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> masked_conv2d_backward(
    const at::Tensor& grad_output, const at::Tensor& input, const at::Tensor& weight, const at::Tensor& crow,
    const at::Tensor& col, const at::Tensor& ccol, const at::Tensor& row, const at::Tensor& perm,
    at::IntArrayRef shape, at::IntArrayRef block, at::IntArrayRef stride, at::IntArrayRef padding, at::IntArrayRef dilation, int64_t groups,
    std::array<bool, 3> output_mask) {
  const Geometry g = check(input, weight, crow, col, ccol, row, perm, shape, block, stride, padding, dilation, groups);
  TORCH_CHECK_VALUE(grad_output.sizes() == at::IntArrayRef({g.batch, g.out, g.out_height, g.out_width}),
                    "masked_conv2d: expected a grad_output of the output's shape, got ", grad_output.sizes(), ".");
  check_like(grad_output, "grad_output", input, "masked_conv2d");
  const at::Tensor values = weight.contiguous();
  const ConvWeight w = weight_of(values, crow, col, shape, block, groups);
  const auto plain = input.options().memory_format(at::MemoryFormat::Contiguous);
  // Dense storage: inactive entries keep zero.
  ConvGradients gradients;
  if (output_mask[0]) gradients.input = empty_map(input.sizes(), input);
  if (output_mask[1]) gradients.weight = w.packed ? at::empty(weight.sizes(), plain) : at::zeros(weight.sizes(), plain);
  if (output_mask[2]) gradients.bias = at::empty({g.out}, plain);
  const auto or_empty = [&](const at::Tensor& t) { return t.defined() ? t : at::empty({0}, plain); };
  if (input.numel() == 0) {  // no image, or one that is all padding
    if (output_mask[1]) gradients.weight.zero_();
    if (output_mask[2]) gradients.bias = grad_output.sum(at::IntArrayRef({0, 2, 3}));
    return {or_empty(gradients.input), or_empty(gradients.weight), or_empty(gradients.bias)};
  }
  dispatch(input.scalar_type(), [&]<typename T, typename S>() {
    // What is not asked for has no say in how the rest is computed.
    ConvGradients rest = gradients;
    backward_taken<T, S>(g, w, grad_output, input, values, &rest);
    if (rest.input.defined() && input_gradient_in_place<T, S>(g, w, grad_output, values, gradients.input))
      rest.input = at::Tensor();
    if (rest.weight.defined() && weight_gradient_in_place<T, S>(g, w, grad_output, input, gradients.weight))
      rest.weight = at::Tensor();
    if (rest.bias.defined() && bias_gradient_by_space<T, S>(grad_output, gradients.bias)) rest.bias = at::Tensor();
    if constexpr (std::is_same_v<T, S>) {
      if (rest.input.defined() && input_gradient_by_space<T>(g, w, grad_output, values, gradients.input))
        rest.input = at::Tensor();
      if (rest.weight.defined() && weight_gradient_by_space<T>(g, w, grad_output, input, gradients.weight))
        rest.weight = at::Tensor();
    }
    if (rest.input.defined() || rest.weight.defined() || rest.bias.defined())
      backward_by_batch<T, S>(g, w, grad_output, input, values, rest);
  });
  return {or_empty(gradients.input), or_empty(gradients.weight), or_empty(gradients.bias)};
}

}  // namespace

TORCH_LIBRARY_IMPL(uasparse, CPU, m) {
  m.impl("masked_conv2d", &masked_conv2d);
  m.impl("masked_conv2d_backward", &masked_conv2d_backward);
}

}  // namespace uasparse
