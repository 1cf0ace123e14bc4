// Batch norm in training on the CPU: checks, threads; the arithmetic is in batch_norm_impl.h.
//
// A task is a few neighbouring channels, whatever the number of threads: results do not depend on it.

#include "cpu/batch_norm.h"

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>
#include <optional>
#include <tuple>

#include "checks.h"
#include "cpu/isa.h"
#include "cpu/workspace.h"

namespace uasparse {
namespace {

using OptionalTensor = std::optional<at::Tensor>;

void run(const BatchNormForward& problem, int64_t first, int64_t last, float* scratch) {
  switch (cpu_isa()) {
#if defined(__x86_64__)
    case Isa::avx512: return avx512::batch_norm_forward(problem, first, last, scratch);
    case Isa::avx2: return avx2::batch_norm_forward(problem, first, last, scratch);
#endif
    default: return portable::batch_norm_forward(problem, first, last, scratch);
  }
}

void run(const BatchNormBackward& problem, int64_t first, int64_t last, float* scratch) {
  switch (cpu_isa()) {
#if defined(__x86_64__)
    case Isa::avx512: return avx512::batch_norm_backward(problem, first, last, scratch);
    case Isa::avx2: return avx2::batch_norm_backward(problem, first, last, scratch);
#endif
    default: return portable::batch_norm_backward(problem, first, last, scratch);
  }
}

template <typename Problem>
void run_all(const Problem& problem) {
  // Neighbouring channels make up four kilobytes of each image.
  const int64_t together = std::clamp<int64_t>(1024 / problem.pixels, 1, kMaxChannels);
  const int64_t tasks = (problem.channels + together - 1) / together;
  const int64_t grain = std::max<int64_t>(1, 32768 / (together * problem.batch * problem.pixels));
  at::parallel_for(0, tasks, grain, [&](int64_t begin, int64_t end) {
    const Workspace scratch(
        problem.pixels < kSlack ? kScratchRows * (kSlack + problem.batch * problem.pixels) * sizeof(float) : 0);
    for (int64_t task = begin; task < end; ++task)
      run(problem, task * together, std::min(problem.channels, (task + 1) * together), scratch.as<float>());
  });
}

// A float32 vector over the channels, or null.
const float* parameter(const OptionalTensor& tensor, int64_t channels, const char* name) {
  if (!tensor.has_value()) return nullptr;
  TORCH_CHECK_TYPE(tensor->scalar_type() == at::kFloat, "Expected a float32 ", name, ", got ", tensor->scalar_type(),
                   ".");
  TORCH_CHECK_VALUE(tensor->dim() == 1 && tensor->size(0) == channels && tensor->is_contiguous(), "Expected a ", name,
                    " of ", channels, " contiguous values, got sizes ", tensor->sizes(), ".");
  check_storage(*tensor, name);
  return tensor->const_data_ptr<float>();
}

// Whether maps that are written go past the caches (cpu/batch_norm.h), as far as their sizes say it.
bool streams(const BatchNormProblem& problem) {
  constexpr int64_t line = 16, least = 512 << 10;  // floats
  return problem.pixels % line == 0 && problem.batch * problem.channels * problem.pixels >= least;
}

bool is_aligned(const void* p) { return reinterpret_cast<uintptr_t>(p) % 64 == 0; }

BatchNormProblem describe(const at::Tensor& x, const OptionalTensor& weight) {
  TORCH_CHECK_TYPE(x.scalar_type() == at::kFloat, "Expected a float32 input, got ", x.scalar_type(), ".");
  TORCH_CHECK_VALUE(x.dim() >= 2 && x.numel() > x.size(1), "Expected an input [N, C, ...] of more than one value per "
                    "channel, got sizes ", x.sizes(), ".");
  return {x.size(0), x.size(1), x.numel() / (x.size(0) * x.size(1)), x.const_data_ptr<float>(),
          parameter(weight, x.size(1), "weight"), false};
}

// A float32 tensor of x's sizes, contiguous, or null.
at::Tensor map_like(const at::Tensor& x, const OptionalTensor& tensor, const char* name) {
  if (!tensor.has_value()) return at::Tensor();
  TORCH_CHECK_TYPE(tensor->scalar_type() == at::kFloat, "Expected a float32 ", name, ", got ", tensor->scalar_type(), ".");
  TORCH_CHECK_VALUE(tensor->sizes() == x.sizes(), "Expected a ", name, " of sizes ", x.sizes(), ", got ", tensor->sizes(),
                    ".");
  return tensor->contiguous();
}

const float* data_or_null(const at::Tensor& tensor) { return tensor.defined() ? tensor.const_data_ptr<float>() : nullptr; }

std::tuple<at::Tensor, at::Tensor, at::Tensor> run_forward(const at::Tensor& input, const OptionalTensor& weight,
                                                           const OptionalTensor& bias, const OptionalTensor& residual,
                                                           bool relu, double eps) {
  TORCH_CHECK_VALUE(eps > 0 && std::isfinite(eps), "Expected a positive eps, got ", eps, ".");
  check_storage(input, "input");
  if (residual.has_value()) check_storage(*residual, "residual");
  const at::Tensor x = input.contiguous(), added = map_like(x, residual, "residual");
  BatchNormProblem problem = describe(x, weight);
  at::Tensor y = at::empty(x.sizes(), x.options());
  at::Tensor stats = at::empty({2, problem.channels}, x.options());
  at::Tensor saved = at::empty({3, problem.channels}, x.options().dtype(at::kDouble));
  problem.streams = streams(problem) && is_aligned(y.const_data_ptr());
  run_all(BatchNormForward{problem, parameter(bias, problem.channels, "bias"), data_or_null(added), relu, eps,
                           y.mutable_data_ptr<float>(), stats.mutable_data_ptr<float>(),
                           saved.mutable_data_ptr<double>()});
  return {y, stats, saved};
}

// in_place: what passes the ReLU is written over grad_output where it is asked for, else the input's gradient, and comes
// back empty.
std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> run_backward(
    const at::Tensor& grad_output, const at::Tensor& input, const OptionalTensor& weight, const OptionalTensor& output,
    bool relu, const at::Tensor& saved, std::array<bool, 4> output_mask, std::optional<double> ceiling, bool in_place) {
  constexpr float kInfinity = std::numeric_limits<float>::infinity();
  TORCH_CHECK_VALUE(!ceiling.has_value() || (output.has_value() && *ceiling > 0), "Expected a positive ceiling, and an output "
                    "to tell where it was met, got a ceiling of ", ceiling.value_or(0), output.has_value() ? "." : " and no output.");
  const float most = ceiling.has_value() ? std::nextafter(static_cast<float>(*ceiling), 0.0f) : kInfinity;
  check_storage(input, "input");
  check_storage(grad_output, "grad_output");
  check_storage(saved, "saved");
  if (output.has_value()) check_storage(*output, "output");
  const at::Tensor x = input.contiguous(), dy = grad_output.contiguous(), y = map_like(x, output, "output");
  BatchNormProblem problem = describe(x, weight);
  TORCH_CHECK_TYPE(dy.scalar_type() == at::kFloat && saved.scalar_type() == at::kDouble,
                   "Expected a float32 gradient and what the forward saved, got ", dy.scalar_type(), " and ",
                   saved.scalar_type(), ".");
  TORCH_CHECK_VALUE(dy.sizes() == x.sizes() && saved.is_contiguous() && saved.sizes() == at::IntArrayRef({3, problem.channels}),
                    "Expected a gradient of sizes ", x.sizes(), " and what the forward saved, got sizes ", dy.sizes(),
                    " and ", saved.sizes(), ".");
  TORCH_CHECK_VALUE(!in_place || grad_output.is_contiguous(), "Expected a contiguous gradient to write over.");
  const std::array<int64_t, 1> none = {0}, vector = {problem.channels};
  const auto map = [&](int i, bool over) {
    return at::empty(output_mask[i] && !over ? x.sizes() : at::IntArrayRef(none), x.options());
  };
  at::Tensor dx = map(0, in_place && !output_mask[3]), dresidual = map(3, in_place);
  at::Tensor dweight = at::empty(output_mask[1] ? vector : none, x.options());
  at::Tensor dbias = at::empty(output_mask[2] ? vector : none, x.options());
  const auto wanted = [&](const at::Tensor& t, int i) { return output_mask[i] ? t.mutable_data_ptr<float>() : nullptr; };
  float* const to = wanted(in_place && !output_mask[3] ? dy : dx, 0);
  problem.streams = streams(problem) && to != dy.const_data_ptr<float>() && is_aligned(to);
  run_all(BatchNormBackward{problem, dy.const_data_ptr<float>(), saved.const_data_ptr<double>(), relu, data_or_null(y), most, to,
                            wanted(dweight, 1), wanted(dbias, 2), wanted(in_place ? dy : dresidual, 3)});
  return {dx, dweight, dbias, dresidual};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> forward(const at::Tensor& input, const OptionalTensor& weight,
                                                       const OptionalTensor& bias, double eps) {
  return run_forward(input, weight, bias, std::nullopt, false, eps);
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> backward(const at::Tensor& grad_output, const at::Tensor& input,
                                                        const OptionalTensor& weight, const at::Tensor& saved,
                                                        std::array<bool, 3> output_mask) {
  auto [dx, dweight, dbias, none] = run_backward(grad_output, input, weight, std::nullopt, false, saved,
                                                 {output_mask[0], output_mask[1], output_mask[2], false}, std::nullopt, false);
  return {dx, dweight, dbias};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> relu_forward(const at::Tensor& input, const OptionalTensor& weight,
                                                            const OptionalTensor& bias, const OptionalTensor& residual,
                                                            double eps) {
  return run_forward(input, weight, bias, residual, true, eps);
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> relu_backward(
    const at::Tensor& grad_output, const at::Tensor& input, const OptionalTensor& weight, const OptionalTensor& output,
    const at::Tensor& saved, std::array<bool, 4> output_mask, std::optional<double> ceiling) {
  return run_backward(grad_output, input, weight, output, true, saved, output_mask, ceiling, false);
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> backward_(const at::Tensor& grad_output, const at::Tensor& input,
                                                         const OptionalTensor& weight, const OptionalTensor& output,
                                                         const at::Tensor& saved, bool relu,
                                                         std::array<bool, 4> output_mask, std::optional<double> ceiling) {
  TORCH_CHECK_VALUE(relu || !output_mask[3], "Expected no gradient of a residual to be asked for without a ReLU.");
  auto [dx, dweight, dbias, none] = run_backward(grad_output, input, weight, output, relu, saved, output_mask, ceiling, true);
  return {dx, dweight, dbias};
}

}  // namespace

TORCH_LIBRARY_IMPL(uasparse, CPU, m) {
  m.impl("batch_norm", &forward);
  m.impl("batch_norm_backward", &backward);
  m.impl("batch_norm_relu", &relu_forward);
  m.impl("batch_norm_relu_backward", &relu_backward);
  m.impl("batch_norm_backward_", &backward_);
}

}  // namespace uasparse
