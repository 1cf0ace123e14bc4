// The unknown-aware loss on the CPU: checks, types, threads; the arithmetic of a row is in unknown_aware_loss_impl.h.
//
// Rows are handled in chunks of a fixed size, and the chunks' sums are added in order: results do not depend on the
// number of threads. 16-bit logits are converted to float32 chunk by chunk.

#include "cpu/unknown_aware_loss.h"

#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <tuple>
#include <type_traits>
#include <vector>

#include "checks.h"
#include "cpu/isa.h"

namespace uasparse {
namespace {

constexpr int64_t kChunkRows = 32;
enum Reduction { kNone = 0, kMean = 1, kSum = 2 };

template <typename T>
void forward_rows(const LossProblem<T>& problem, int64_t begin, int64_t end, T* losses, T* saved, LossSums* sums) {
  switch (cpu_isa()) {
#if defined(__x86_64__)
    case Isa::avx512: return avx512::loss_forward(problem, begin, end, losses, saved, sums);
    case Isa::avx2: return avx2::loss_forward(problem, begin, end, losses, saved, sums);
#endif
    default: return portable::loss_forward(problem, begin, end, losses, saved, sums);
  }
}

template <typename T>
void backward_rows(const LossProblem<T>& problem, int64_t begin, int64_t end, const T* saved, const T* grad_loss,
                   int64_t grad_stride, T scale, T* grad) {
  switch (cpu_isa()) {
#if defined(__x86_64__)
    case Isa::avx512:
      return avx512::loss_backward(problem, begin, end, saved, grad_loss, grad_stride, scale, grad);
    case Isa::avx2: return avx2::loss_backward(problem, begin, end, saved, grad_loss, grad_stride, scale, grad);
#endif
    default: return portable::loss_backward(problem, begin, end, saved, grad_loss, grad_stride, scale, grad);
  }
}

void check(const at::Tensor& logits, const at::Tensor& target, const at::Tensor& alpha, double unknown_weight,
           int64_t reduction) {
  TORCH_CHECK_VALUE(logits.dim() == 2 && logits.size(1) >= 2, "Expected logits [N, K + 1] with K >= 1, got ",
                    logits.sizes(), ".");
  TORCH_CHECK_VALUE(target.dim() == 1 && target.size(0) == logits.size(0), "Expected targets [", logits.size(0),
                    "], got ", target.sizes(), ".");
  TORCH_CHECK_TYPE(target.scalar_type() == at::kLong, "Expected int64 targets, got ", target.scalar_type(), ".");
  TORCH_CHECK_VALUE(alpha.numel() == 1 && reduction >= kNone && reduction <= kSum,
                    "Expected one alpha and a reduction of 0, 1 or 2.");
  TORCH_CHECK_VALUE(std::isfinite(unknown_weight) && unknown_weight >= 0, "Expected a finite unknown_weight >= 0, got ",
                    unknown_weight, ".");
  TORCH_CHECK_TYPE(at::isFloatingType(logits.scalar_type()) && at::isFloatingType(alpha.scalar_type()),
                   "Expected floating-point logits and alpha, got ", logits.scalar_type(), " and ", alpha.scalar_type(),
                   ".");
  check_storage(logits, "logits");
  check_storage(target, "target");
  check_storage(alpha, "alpha");
}

void check_range(const at::Tensor& target, int64_t classes) {
  const int64_t* values = target.const_data_ptr<int64_t>();
  for (int64_t i = 0; i < target.size(0); ++i)
    TORCH_CHECK_INDEX(values[i] >= 0 && values[i] < classes, "Expected targets in [0, ", classes - 1,
                      "] (the last is the unknown class), got ", values[i], " at position ", i, ".");
}

// Type of the arithmetic, and of loss, threshold and saved values.
template <typename T>
using Acc = std::conditional_t<std::is_same_v<T, double>, double, float>;

at::ScalarType acc_type(const at::Tensor& logits) {
  return logits.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
}

// Calls visit(chunk, problem, first row of its chunk, past the last row) for every chunk of rows, in parallel. Rows of
// 16-bit logits count from 0 in a float32 copy of the chunk, and the problem's pointers are moved accordingly.
template <typename T, typename Visit>
void for_each_chunk(const at::Tensor& logits, const at::Tensor& target, const at::Tensor& alpha, double unknown_weight,
                    Visit visit) {
  const int64_t rows = logits.size(0), classes = logits.size(1);
  const T* source = logits.const_data_ptr<T>();
  LossProblem<Acc<T>> whole{nullptr, nullptr, target.const_data_ptr<int64_t>(), classes,
                            alpha.item().to<Acc<T>>(), static_cast<Acc<T>>(unknown_weight)};
  const int64_t chunks = (rows + kChunkRows - 1) / kChunkRows;
  const int64_t grain = std::max<int64_t>(1, 32768 / kChunkRows / classes);
  at::parallel_for(0, chunks, grain, [&](int64_t first, int64_t last) {
    std::vector<Acc<T>> copy;
    for (int64_t chunk = first; chunk < last; ++chunk) {
      const int64_t begin = chunk * kChunkRows, end = std::min(rows, begin + kChunkRows);
      LossProblem<Acc<T>> problem = whole;
      problem.target += begin;
      if constexpr (std::is_same_v<T, Acc<T>>) {
        problem.logits = source + begin * classes;
        problem.logits_end = source + rows * classes;
      } else {
        copy.assign(source + begin * classes, source + end * classes);
        problem.logits = copy.data();
        problem.logits_end = copy.data() + copy.size();
      }
      visit(chunk, problem, begin, end);
    }
  });
}

// Where the gradient of a chunk of rows is written: in place, or for 16-bit types in a float32 copy that is rounded when
// the chunk is done.
template <typename T>
class ChunkGrad {
 public:
  ChunkGrad(T* grad, int64_t begin, int64_t count) : out_(grad + begin), count_(count) {
    if constexpr (!std::is_same_v<T, Acc<T>>) copy_.resize(count);
  }
  ~ChunkGrad() {
    if constexpr (!std::is_same_v<T, Acc<T>>) std::copy_n(copy_.begin(), count_, out_);
  }
  Acc<T>* data() {
    if constexpr (std::is_same_v<T, Acc<T>>) return out_;
    else return copy_.data();
  }

 private:
  T* out_;
  int64_t count_;
  std::vector<Acc<T>> copy_;
};

std::tuple<at::Tensor, at::Tensor, at::Tensor> forward(const at::Tensor& logits_, const at::Tensor& target_,
                                                       const at::Tensor& alpha, double unknown_weight,
                                                       int64_t reduction) {
  check(logits_, target_, alpha, unknown_weight, reduction);
  const at::Tensor logits = logits_.contiguous(), target = target_.contiguous();
  check_range(target, logits.size(1));
  const int64_t rows = logits.size(0);
  const auto options = at::TensorOptions().dtype(acc_type(logits));
  at::Tensor loss = reduction == kNone ? at::empty({rows}, options) : at::empty({}, options);
  at::Tensor threshold = at::empty({}, options), saved = at::empty({rows, 2}, options);
  std::vector<LossSums> sums((rows + kChunkRows - 1) / kChunkRows);
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kBFloat16, at::kHalf, logits.scalar_type(), "unknown_aware_loss", [&] {
    using acc_t = Acc<scalar_t>;
    acc_t* losses = reduction == kNone ? loss.mutable_data_ptr<acc_t>() : nullptr;
    acc_t* rows_saved = saved.mutable_data_ptr<acc_t>();
    for_each_chunk<scalar_t>(logits, target, alpha, unknown_weight,
                             [&](int64_t chunk, const LossProblem<acc_t>& problem, int64_t begin, int64_t end) {
                               forward_rows(problem, 0, end - begin, losses == nullptr ? nullptr : losses + begin,
                                            rows_saved + 2 * begin, &sums[chunk]);
                             });
  });
  LossSums all;
  for (const LossSums& part : sums) {
    all.loss += part.loss;
    all.threshold += part.threshold;
    all.known += part.known;
  }
  if (reduction == kMean) loss.fill_(rows > 0 ? all.loss / rows : std::numeric_limits<double>::quiet_NaN());
  if (reduction == kSum) loss.fill_(all.loss);
  threshold.fill_(all.known > 0 ? all.threshold / all.known : 0.0);
  return {loss, threshold, saved};
}

at::Tensor backward(const at::Tensor& grad_loss_, const at::Tensor& logits_, const at::Tensor& target_,
                    const at::Tensor& alpha, const at::Tensor& saved_, double unknown_weight, int64_t reduction) {
  check(logits_, target_, alpha, unknown_weight, reduction);
  TORCH_CHECK_TYPE(at::isFloatingType(grad_loss_.scalar_type()), "Expected a floating-point gradient of the loss, got ",
                   grad_loss_.scalar_type(), ".");
  check_storage(grad_loss_, "grad_loss");
  check_storage(saved_, "saved");
  const at::Tensor logits = logits_.contiguous(), target = target_.contiguous(), saved = saved_.contiguous();
  check_range(target, logits.size(1));
  const int64_t rows = logits.size(0), classes = logits.size(1);
  const at::Tensor grad_loss = grad_loss_.to(acc_type(logits)).contiguous();
  TORCH_CHECK_VALUE(grad_loss.numel() == (reduction == kNone ? rows : 1) && saved.numel() == 2 * rows &&
                        saved.scalar_type() == acc_type(logits),
                    "Expected the gradient of the loss and what its forward saved, got sizes ", grad_loss.sizes(),
                    " and ", saved.sizes(), ".");
  at::Tensor grad = at::empty_like(logits, at::MemoryFormat::Contiguous);
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kBFloat16, at::kHalf, logits.scalar_type(), "unknown_aware_loss_backward", [&] {
    using acc_t = Acc<scalar_t>;
    scalar_t* out = grad.mutable_data_ptr<scalar_t>();
    const acc_t *upstream = grad_loss.const_data_ptr<acc_t>(), *rows_saved = saved.const_data_ptr<acc_t>();
    const int64_t stride = reduction == kNone ? 1 : 0;
    const acc_t scale = reduction == kMean ? acc_t(1) / rows : acc_t(1);
    for_each_chunk<scalar_t>(
        logits, target, alpha, unknown_weight,
        [&](int64_t, const LossProblem<acc_t>& problem, int64_t begin, int64_t end) {
          ChunkGrad<scalar_t> chunk(out, begin * classes, (end - begin) * classes);
          backward_rows(problem, 0, end - begin, rows_saved + 2 * begin, upstream + begin * stride, stride, scale,
                        chunk.data());
        });
  });
  return grad;
}

}  // namespace

TORCH_LIBRARY_IMPL(uasparse, CPU, m) {
  m.impl("unknown_aware_loss", &forward);
  m.impl("unknown_aware_loss_backward", &backward);
}

}  // namespace uasparse
