// sparse_product_out and sparse_sampled_product on a CUDA device: checks, workspace, the current stream. No host sync.

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include <limits>

#include "checks.h"
#include "cuda/masked_linear.h"

namespace uasparse {
namespace {

ValueType value_type(const at::Tensor& tensor, const char* op) {
  switch (tensor.scalar_type()) {
    case at::kFloat: return ValueType::kFloat;
    case at::kHalf: return ValueType::kHalf;
    case at::kBFloat16: return ValueType::kBFloat16;
    default: break;
  }
  TORCH_CHECK_TYPE(false, op, ": expected float32, float16 or bfloat16, got ", tensor.scalar_type(), ".");
}

void check_matrix(const at::Tensor& matrix, const at::Tensor& x, const char* op, const char* name) {
  TORCH_CHECK_VALUE(matrix.dim() == 2 && (matrix.stride(1) == 1 || matrix.size(1) <= 1) &&
                        matrix.size(0) == x.size(0) && matrix.device() == x.device(),
                    op, ": expected ", name, " [tokens, features] with contiguous rows, as many as x on its device, got ",
                    matrix.sizes(), " of strides ", matrix.strides(), " on ", matrix.device(), ".");
  TORCH_CHECK_TYPE(matrix.scalar_type() == x.scalar_type(), op, ": expected ", name, " of x's dtype ", x.scalar_type(),
                   ", got ", matrix.scalar_type(), ".");
  check_storage(matrix, name);
}

SparseProblem problem(const at::Tensor& x, const at::Tensor& offsets, const at::Tensor& index, const char* op) {
  SparseProblem p{};
  p.type = value_type(x, op);
  check_matrix(x, x, op, "x");
  for (const at::Tensor* one : {&offsets, &index}) {
    TORCH_CHECK_VALUE(one->scalar_type() == at::kInt && one->dim() == 1 && one->is_contiguous() &&
                          one->device() == x.device(),
                      op, ": expected contiguous int32 offsets and index on ", x.device(), ".");
    check_storage(*one, "offsets and index");
  }
  p.offsets = offsets.const_data_ptr<int32_t>();
  p.index = index.const_data_ptr<int32_t>();
  p.rows = offsets.numel() - 1;
  p.columns = x.size(1);
  p.nnz = index.numel();
  p.tokens = x.size(0);
  p.x = x.const_data_ptr();
  p.stride_x = x.stride(0);
  TORCH_CHECK_VALUE(p.rows >= 1 && p.columns >= 1 && p.nnz < std::numeric_limits<int32_t>::max() - 512,
                    op, ": expected at least one row and column, and fewer than 2^31 - 512 entries, got ", p.rows, ", ",
                    p.columns, " and ", p.nnz, ".");
  const int device = x.get_device();
  C10_CUDA_CHECK(cudaDeviceGetAttribute(&p.processors, cudaDevAttrMultiProcessorCount, device));
  C10_CUDA_CHECK(cudaDeviceGetAttribute(&p.shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device));
  return p;
}

at::Tensor workspace(const SparseProblem& p, bool sampled, const at::Tensor& like) {
  return at::empty({static_cast<int64_t>(sparse_workspace_bytes(p, sampled))}, like.options().dtype(at::kByte));
}

void sparse_product_out(const at::Tensor& x, const at::Tensor& values, const std::optional<at::Tensor>& bias,
                        const at::Tensor& offsets, const at::Tensor& index, at::Tensor out) {
  static constexpr const char* kOp = "sparse_product_out";
  const c10::cuda::CUDAGuard guard(x.device());
  const SparseProblem p = problem(x, offsets, index, kOp);
  check_matrix(out, x, kOp, "out");
  for (const auto& [tensor, size] : {std::pair{&values, p.nnz}, {bias ? &*bias : nullptr, p.rows}}) {
    if (tensor == nullptr) continue;
    TORCH_CHECK_VALUE(tensor->dim() == 1 && tensor->numel() == size && tensor->is_contiguous() &&
                          tensor->scalar_type() == x.scalar_type() && tensor->device() == x.device(),
                      kOp, ": expected contiguous values [", p.nnz, "] and bias [", p.rows, "] of x's dtype and device.");
    check_storage(*tensor, "values and bias");
  }
  check_output(out, "out");
  TORCH_CHECK_VALUE(out.size(1) == p.rows, kOp, ": expected out [tokens, ", p.rows, "], got ", out.sizes(), ".");
  if (p.tokens == 0) return;
  const at::Tensor scratch = workspace(p, false, x);
  C10_CUDA_CHECK(launch_sparse_product(p, values.const_data_ptr(), bias ? bias->const_data_ptr() : nullptr,
                                       out.mutable_data_ptr(), out.stride(0), scratch.mutable_data_ptr(),
                                       c10::cuda::getCurrentCUDAStream()));
}

at::Tensor sparse_sampled_product(const at::Tensor& dy, const at::Tensor& x, const at::Tensor& offsets,
                                  const at::Tensor& index) {
  static constexpr const char* kOp = "sparse_sampled_product";
  const c10::cuda::CUDAGuard guard(x.device());
  const SparseProblem p = problem(x, offsets, index, kOp);
  check_matrix(dy, x, kOp, "dy");
  TORCH_CHECK_VALUE(dy.size(1) == p.rows, kOp, ": expected dy [tokens, ", p.rows, "], got ", dy.sizes(), ".");
  at::Tensor out = at::empty({p.nnz}, x.options());
  if (p.tokens == 0) return out.zero_();
  if (p.nnz == 0) return out;
  const at::Tensor scratch = workspace(p, true, x);
  C10_CUDA_CHECK(launch_sampled_product(p, dy.const_data_ptr(), dy.stride(0), out.mutable_data_ptr(),
                                        scratch.mutable_data_ptr(), c10::cuda::getCurrentCUDAStream()));
  return out;
}

}  // namespace

TORCH_LIBRARY_IMPL(uasparse, CUDA, m) {
  m.impl("sparse_product_out", &sparse_product_out);
  m.impl("sparse_sampled_product", &sparse_sampled_product);
}

}  // namespace uasparse
