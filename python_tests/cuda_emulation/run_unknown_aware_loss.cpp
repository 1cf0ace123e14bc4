// Runs csrc/cuda/unknown_aware_loss.cu: per case type, rows, classes, reduction, shared bytes, offset of the logits in
// numbers (int64), unknown_weight (double), then alpha, grad_loss, expected, target, logits -> loss, threshold, grad of
// forward and backward; for reductions to one number also what forward with gradient leaves, and grad put right by it.

#include <algorithm>

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
    a.shared_bytes = static_cast<int>(read_one<int64_t>());
    const size_t offset = static_cast<size_t>(read_one<int64_t>());
    a.unknown_weight = read_one<double>();
    const size_t acc = a.type == LogitType::kDouble ? 8 : 4, rows = static_cast<size_t>(a.rows);
    const size_t size = a.type == LogitType::kDouble ? 8 : a.type == LogitType::kFloat ? 4 : 2;
    const size_t losses = a.reduction == 0 ? rows : 1, numbers = rows * static_cast<size_t>(a.classes);
    const Array alpha = Array::read(acc), grad_loss = Array::read(acc * losses), expected = Array::read(acc),
                target = Array::read(8 * rows), given = Array::read(size * numbers);
    const Array logits(size * (numbers + offset));
    unsigned char* const begin = logits.as<unsigned char>() + size * offset;
    std::copy_n(given.as<unsigned char>(), size * numbers, begin);
    a.alpha = alpha.as<void>();
    a.target = target.as<int64_t>();
    a.logits = begin;
    for (const bool at_once : {false, true}) {
      if (at_once && a.reduction == 0) break;
      const Array loss(acc * losses), threshold(acc), saved((at_once ? 3 : 2) * acc * rows), grad(size * numbers),
          workspace(loss_workspace_bytes(a));
      void* const guess = at_once ? expected.as<void>() : nullptr;
      must(cudaMemsetAsync(workspace.as<void>(), 0, kLossZeroBytes, nullptr) == cudaSuccess);
      must(launch_loss_forward(a, loss.as<void>(), threshold.as<void>(), saved.as<void>(), workspace.as<void>(), guess,
                               at_once ? grad.as<void>() : nullptr, nullptr) == cudaSuccess);
      if (at_once) grad.write();
      must(launch_loss_backward(a, grad_loss.as<void>(), saved.as<void>(), guess, grad.as<void>(), nullptr) ==
           cudaSuccess);
      loss.write();
      threshold.write();
      grad.write();
      if (at_once) expected.write();
    }
  }
}
