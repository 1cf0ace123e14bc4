// topk_indices and topk_indices_many on a CUDA device: checks, workspace, the current stream. No host sync.

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include <algorithm>
#include <limits>
#include <vector>

#include "checks.h"
#include "cuda/topk_indices.h"

namespace uasparse {
namespace {

std::vector<at::Tensor> topk_indices_many(at::TensorList scores, at::IntArrayRef k, bool largest, bool magnitude) {
  TORCH_CHECK_VALUE(scores.size() == k.size(), "Expected a k for each of ", scores.size(), " scores, got ", k.size(), ".");
  std::vector<at::Tensor> sources, indices;
  // All are selected in float64 if one is float64: a launch set has one type, and that loses nothing.
  bool is_double = false;
  for (const at::Tensor& one : scores) is_double |= one.scalar_type() == at::kDouble;
  for (size_t s = 0; s < scores.size(); ++s) {
    const at::Tensor& one = scores[s];
    TORCH_CHECK_VALUE(one.dim() == 1 && one.numel() <= std::numeric_limits<int32_t>::max() &&
                          one.device() == scores[0].device(),
                      "Expected scores of one dimension and less than 2^31 entries, all on one device, got ",
                      one.sizes(), " on ", one.device(), ".");
    TORCH_CHECK_VALUE(k[s] >= 0 && k[s] <= one.numel(), "Expected k in [0, ", one.numel(), "], got ", k[s], ".");
    TORCH_CHECK_TYPE(at::isFloatingType(one.scalar_type()), "Expected floating-point scores, got ", one.scalar_type(),
                     ".");
    check_storage(one, "scores");
    sources.push_back(one.to(is_double ? at::kDouble : at::kFloat).contiguous());
    indices.push_back(at::empty({k[s]}, one.options().dtype(at::kLong)));
  }
  for (size_t first = 0; first < scores.size(); first += kTopkSegments) {
    TopkArguments arguments{};
    arguments.is_double = is_double;
    arguments.largest = largest;
    arguments.magnitude = magnitude;
    for (size_t s = first; s < std::min(scores.size(), first + kTopkSegments); ++s)
      if (k[s] > 0)
        arguments.segment[arguments.segments++] = {sources[s].const_data_ptr(), indices[s].mutable_data_ptr<int64_t>(),
                                                   sources[s].numel(), k[s]};
    if (arguments.segments == 0) continue;
    const c10::cuda::CUDAGuard guard(scores[0].device());
    const at::Tensor workspace = at::empty({static_cast<int64_t>(topk_workspace_bytes(arguments))},
                                           scores[0].options().dtype(at::kByte));
    C10_CUDA_CHECK(launch_topk(arguments, workspace.mutable_data_ptr(), c10::cuda::getCurrentCUDAStream()));
  }
  return indices;
}

at::Tensor topk_indices(const at::Tensor& scores, int64_t k, bool largest, bool magnitude) {
  return topk_indices_many({scores}, {k}, largest, magnitude)[0];
}

}  // namespace

TORCH_LIBRARY_IMPL(uasparse, CUDA, m) {
  m.impl("topk_indices", &topk_indices);
  m.impl("topk_indices_many", &topk_indices_many);
}

}  // namespace uasparse
