// Runs csrc/cuda/unknown_aware_loss.cu: per case type, rows, classes, reduction (int64), unknown_weight (double), then
// alpha, grad_loss, target, logits -> loss, threshold, saved, grad.

#include "cuda/unknown_aware_loss.h"
#include "streams.h"

int main() {
  using namespace uasparse;
  while (more_cases()) {
    LossArguments a{};
    a.type = static_cast<LogitType>(read_one<int64_t>());
    a.rows = read_one<int64_t>();
    a.classes = read_one<int64_t>();
    a.reduction = static_cast<int>(read_one<int64_t>());
    a.unknown_weight = read_one<double>();
    const size_t acc = a.type == LogitType::kDouble ? 8 : 4, rows = static_cast<size_t>(a.rows);
    const size_t size = a.type == LogitType::kDouble ? 8 : a.type == LogitType::kFloat ? 4 : 2;
    const size_t losses = a.reduction == 0 ? rows : 1, numbers = rows * static_cast<size_t>(a.classes);
    const Array alpha = Array::read(acc), grad_loss = Array::read(acc * losses), target = Array::read(8 * rows),
                logits = Array::read(size * numbers);
    a.alpha = alpha.as<void>();
    a.target = target.as<int64_t>();
    a.logits = logits.as<void>();
    const Array loss(acc * losses), threshold(acc), saved(2 * acc * rows), grad(size * numbers),
        workspace(loss_workspace_bytes(a));
    must(cudaMemsetAsync(workspace.as<void>(), 0, kLossZeroBytes, nullptr) == cudaSuccess);
    must(launch_loss_forward(a, loss.as<void>(), threshold.as<void>(), saved.as<void>(), workspace.as<void>(),
                             nullptr) == cudaSuccess);
    must(launch_loss_backward(a, grad_loss.as<void>(), saved.as<void>(), grad.as<void>(), nullptr) == cudaSuccess);
    loss.write();
    threshold.write();
    grad.write();
  }
}
