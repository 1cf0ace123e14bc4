// The unknown-aware loss on a CUDA device: checks, allocation, the current stream. No host sync: all ops can be captured
// in a CUDA graph.

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/ones.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGraphsC10Utils.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include <cmath>
#include <limits>
#include <map>
#include <mutex>
#include <tuple>
#include <utility>

#include "checks.h"
#include "cuda/unknown_aware_loss.h"

namespace uasparse {
namespace {

at::ScalarType acc_type(const at::Tensor& logits) {
  return logits.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
}

LogitType logit_type(const at::Tensor& logits) {
  switch (logits.scalar_type()) {
    case at::kFloat: return LogitType::kFloat;
    case at::kDouble: return LogitType::kDouble;
    case at::kHalf: return LogitType::kHalf;
    case at::kBFloat16: return LogitType::kBFloat16;
    default: TORCH_CHECK_TYPE(false, "Expected floating-point logits, got ", logits.scalar_type(), ".");
  }
}

LossArguments check(const at::Tensor& logits, const at::Tensor& target, const at::Tensor& alpha, double unknown_weight,
                    int64_t reduction) {
  TORCH_CHECK_VALUE(logits.dim() == 2 && logits.size(1) >= 2, "Expected logits [N, K + 1] with K >= 1, got ",
                    logits.sizes(), ".");
  TORCH_CHECK_VALUE(target.dim() == 1 && target.size(0) == logits.size(0), "Expected targets [", logits.size(0),
                    "], got ", target.sizes(), ".");
  TORCH_CHECK_VALUE(logits.size(1) < std::numeric_limits<int32_t>::max() - 4096,
                    "Expected fewer classes than 31 bits count, got ", logits.size(1), ".");
  TORCH_CHECK_TYPE(target.scalar_type() == at::kLong && alpha.scalar_type() == acc_type(logits),
                   "Expected int64 targets and an alpha of ", acc_type(logits), ", got ", target.scalar_type(), " and ",
                   alpha.scalar_type(), ".");
  TORCH_CHECK_VALUE(alpha.numel() == 1 && reduction >= 0 && reduction <= 2,
                    "Expected one alpha and a reduction of 0, 1 or 2.");
  TORCH_CHECK_VALUE(std::isfinite(unknown_weight) && unknown_weight >= 0, "Expected a finite unknown_weight >= 0, got ",
                    unknown_weight, ".");
  TORCH_CHECK_VALUE(target.device() == logits.device() && alpha.device() == logits.device(),
                    "Expected logits, targets and alpha on one device, got ", logits.device(), ", ", target.device(),
                    " and ", alpha.device(), ".");
  check_storage(alpha, "alpha");
  int shared_bytes = 0;
  C10_CUDA_CHECK(cudaDeviceGetAttribute(&shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, logits.get_device()));
  return {logit_type(logits),    logits.const_data_ptr(), target.const_data_ptr<int64_t>(), alpha.const_data_ptr(),
          logits.size(0),        logits.size(1),          unknown_weight,
          static_cast<int>(reduction), shared_bytes};
}

// The gradient of the loss that the last backward came with on this device, 1 at first: what gradients are made for before
// theirs is known. Any value is right; who writes it meanwhile, on another stream, does no harm. A CUDA graph that is
// captured before there was one has its own.
at::Tensor expected_gradient(const at::Tensor& logits) {
  static std::mutex mutex;
  static auto* const held = new std::map<std::pair<int64_t, at::ScalarType>, at::Tensor>;  // outlives the device's context
  const std::lock_guard<std::mutex> lock(mutex);
  const auto key = std::make_pair(static_cast<int64_t>(logits.get_device()), acc_type(logits));
  if (const auto found = held->find(key); found != held->end()) return found->second;
  at::Tensor one = at::ones({}, logits.options().dtype(acc_type(logits)));
  if (c10::cuda::currentStreamCaptureStatusMayInitCtx() == c10::cuda::CaptureStatus::None) held->emplace(key, one);
  return one;
}

struct Forward {
  at::Tensor loss, threshold, saved, grad;
};

Forward run_forward(const at::Tensor& logits_, const at::Tensor& target_, const at::Tensor& alpha, double unknown_weight,
                    int64_t reduction, bool at_once) {
  const c10::cuda::CUDAGuard guard(logits_.device());
  check_storage(logits_, "logits");
  check_storage(target_, "target");
  const at::Tensor logits = logits_.contiguous(), target = target_.contiguous();
  const LossArguments arguments = check(logits, target, alpha, unknown_weight, reduction);
  TORCH_CHECK_VALUE(!at_once || reduction != 0, "Expected a reduction to one number where the gradient is made at once.");
  const auto options = logits.options().dtype(acc_type(logits));
  at::Tensor loss = reduction == 0 ? at::empty({arguments.rows}, options) : at::empty({}, options);
  at::Tensor threshold = at::empty({}, options), saved = at::empty({arguments.rows, at_once ? 3 : 2}, options), grad;
  if (at_once) grad = at::empty_like(logits, at::MemoryFormat::Contiguous);
  if (arguments.rows == 0) {
    if (reduction != 0) loss.fill_(reduction == 1 ? std::numeric_limits<double>::quiet_NaN() : 0.0);
    threshold.fill_(0.0);
    return {loss, threshold, saved, grad};
  }
  const at::Tensor workspace =
      at::empty({static_cast<int64_t>(loss_workspace_bytes(arguments))}, logits.options().dtype(at::kByte));
  const at::Tensor expected = at_once ? expected_gradient(logits) : at::Tensor();
  const cudaStream_t stream = c10::cuda::getCurrentCUDAStream();
  C10_CUDA_CHECK(cudaMemsetAsync(workspace.mutable_data_ptr(), 0, kLossZeroBytes, stream));
  C10_CUDA_CHECK(launch_loss_forward(arguments, loss.mutable_data_ptr(), threshold.mutable_data_ptr(),
                                     saved.mutable_data_ptr(), workspace.mutable_data_ptr(),
                                     at_once ? expected.const_data_ptr() : nullptr,
                                     at_once ? grad.mutable_data_ptr() : nullptr, stream));
  return {loss, threshold, saved, grad};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> forward(const at::Tensor& logits, const at::Tensor& target,
                                                       const at::Tensor& alpha, double unknown_weight,
                                                       int64_t reduction) {
  const Forward found = run_forward(logits, target, alpha, unknown_weight, reduction, false);
  return {found.loss, found.threshold, found.saved};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> at_once(const at::Tensor& logits, const at::Tensor& target,
                                                                   const at::Tensor& alpha, double unknown_weight,
                                                                   int64_t reduction) {
  const Forward found = run_forward(logits, target, alpha, unknown_weight, reduction, true);
  return {found.loss, found.threshold, found.saved, found.grad};
}

// Into `grad`, wholly; or, with `expected`, where that is not what the rows were made for.
void run_backward(const at::Tensor& grad_loss_, const at::Tensor& logits_, const at::Tensor& target_,
                  const at::Tensor& alpha, const at::Tensor& saved_, double unknown_weight, int64_t reduction,
                  bool put_right, at::Tensor& grad) {
  const c10::cuda::CUDAGuard guard(logits_.device());
  check_storage(logits_, "logits");
  check_storage(target_, "target");
  check_storage(saved_, "saved");
  check_storage(grad_loss_, "grad_loss");
  const at::Tensor logits = logits_.contiguous(), target = target_.contiguous(), saved = saved_.contiguous();
  const LossArguments arguments = check(logits, target, alpha, unknown_weight, reduction);
  const at::Tensor grad_loss = grad_loss_.to(acc_type(logits)).contiguous();
  TORCH_CHECK_VALUE(grad_loss.numel() == (reduction == 0 ? arguments.rows : 1) &&
                        saved.numel() == (put_right ? 3 : 2) * arguments.rows &&
                        saved.scalar_type() == acc_type(logits) && grad_loss.device() == logits.device() &&
                        saved.device() == logits.device() && (!put_right || reduction != 0),
                    "Expected the gradient of the loss and what its forward saved, got sizes ", grad_loss.sizes(),
                    " and ", saved.sizes(), ".");
  if (!put_right) grad = at::empty_like(logits, at::MemoryFormat::Contiguous);
  TORCH_CHECK_VALUE(grad.sizes() == logits.sizes() && grad.scalar_type() == logits.scalar_type() &&
                        grad.device() == logits.device() && grad.is_contiguous(),
                    "Expected a contiguous gradient as the logits, got ", grad.sizes(), " of ", grad.scalar_type(), ".");
  check_output(grad, "grad");
  if (arguments.rows == 0) return;
  const at::Tensor expected = put_right ? expected_gradient(logits) : at::Tensor();
  C10_CUDA_CHECK(launch_loss_backward(arguments, grad_loss.const_data_ptr(), saved.const_data_ptr(),
                                      put_right ? expected.mutable_data_ptr() : nullptr, grad.mutable_data_ptr(),
                                      c10::cuda::getCurrentCUDAStream()));
}

at::Tensor backward(const at::Tensor& grad_loss, const at::Tensor& logits, const at::Tensor& target,
                    const at::Tensor& alpha, const at::Tensor& saved, double unknown_weight, int64_t reduction) {
  at::Tensor grad;
  run_backward(grad_loss, logits, target, alpha, saved, unknown_weight, reduction, false, grad);
  return grad;
}

void put_right(at::Tensor grad, const at::Tensor& grad_loss, const at::Tensor& logits, const at::Tensor& target,
               const at::Tensor& alpha, const at::Tensor& saved, double unknown_weight, int64_t reduction) {
  run_backward(grad_loss, logits, target, alpha, saved, unknown_weight, reduction, true, grad);
}

}  // namespace

TORCH_LIBRARY_IMPL(uasparse, CUDA, m) {
  m.impl("unknown_aware_loss", &forward);
  m.impl("unknown_aware_loss_backward", &backward);
  m.impl("unknown_aware_loss_at_once", &at_once);
  m.impl("unknown_aware_loss_put_right_", &put_right);
}

}  // namespace uasparse
