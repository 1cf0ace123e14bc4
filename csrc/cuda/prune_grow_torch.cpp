// prune_grow_ and exclude_kept_ on a CUDA device: checks, scratch, the current stream. No host sync: what the blocks must
// be (ascending, active or not) is asserted on the device.

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/sort.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include <algorithm>
#include <vector>

#include "checks.h"
#include "cuda/prune_grow.h"

namespace uasparse {
namespace {

void check_blocks(const at::Tensor& blocks, const at::Tensor& crow, const char* name) {
  TORCH_CHECK_TYPE(blocks.scalar_type() == at::kLong, "prune_grow_: expected int64 indices of the ", name,
                   " blocks, got ", blocks.scalar_type(), ".");
  TORCH_CHECK_VALUE(blocks.dim() == 1 && blocks.is_contiguous() && blocks.device() == crow.device(),
                    "prune_grow_: expected one contiguous row of ", name, " blocks on ", crow.device(), ", got ",
                    blocks.sizes(), " on ", blocks.device(), ".");
  check_storage(blocks, name);
}

void zero_blocks(const at::Tensor& tensor, const at::Tensor& blocks, const at::Tensor& stay, int64_t columns,
                 at::IntArrayRef block, cudaStream_t stream) {
  DenseTensor dense{tensor.mutable_data_ptr(), static_cast<int>(tensor.element_size()), {}, 1, 1};
  for (int64_t d = 0; d < tensor.dim(); ++d) dense.stride[d] = tensor.stride(d);
  if (tensor.dim() == 4) {
    dense.width = tensor.size(3);
    dense.positions = tensor.size(2) * tensor.size(3);
  }
  C10_CUDA_CHECK(launch_zero_blocks(dense, blocks.const_data_ptr<int64_t>(), stay.const_data_ptr<int64_t>(),
                                    blocks.size(0), columns, static_cast<int>(block[0]), static_cast<int>(block[1]), stream));
}

void prune_grow_(at::Tensor weight, at::TensorList states, at::Tensor crow, at::Tensor col, at::Tensor ccol,
                 at::Tensor row, at::Tensor perm, const at::Tensor& dropped, const at::Tensor& grown,
                 at::IntArrayRef shape, at::IntArrayRef block) {
  const c10::cuda::CUDAGuard guard(weight.device());
  const BlockGrid grid = check_csr(crow, col, shape, block);
  check_transposed(ccol, row, perm, col, grid);
  const Topology topology{crow.mutable_data_ptr<int32_t>(), col.mutable_data_ptr<int32_t>(), grid.rows, grid.columns,
                          col.numel()};
  check_blocks(dropped, crow, "dropped");
  check_blocks(grown, crow, "grown");
  TORCH_CHECK_VALUE(dropped.size(0) == grown.size(0), "prune_grow_: expected as many grown blocks as dropped ones, got ",
                    grown.size(0), " and ", dropped.size(0), ".");
  std::vector<at::Tensor> tensors{weight};
  tensors.insert(tensors.end(), states.begin(), states.end());
  const bool packed = !check_weight(weight, col, shape, block, "prune_grow_");
  int64_t bytes = 0;
  for (const at::Tensor& tensor : tensors) {
    TORCH_CHECK_VALUE(tensor.sizes() == weight.sizes() && tensor.device() == crow.device() &&
                          (!packed || tensor.is_contiguous()),
                      "prune_grow_: expected states of the weight's shape ", weight.sizes(), " on ", crow.device(),
                      packed ? ", contiguous, got " : ", got ", tensor.sizes(), " on ", tensor.device(), ".");
    check_output(tensor, "weight and states");
    bytes = std::max(bytes, tensor.numel() * static_cast<int64_t>(tensor.element_size()));
  }
  std::vector<at::Tensor> written = tensors;
  written.insert(written.end(), {crow, col, ccol, row, perm});
  check_apart(written);
  const int64_t size = block[0] * block[1];
  const int64_t k = dropped.size(0);
  if (k == 0) return;

  const cudaStream_t stream = c10::cuda::getCurrentCUDAStream();
  const at::Tensor places = at::empty({2, k}, dropped.options()), scratch = at::empty({2, topology.blocks}, col.options());
  int32_t* source = scratch.mutable_data_ptr<int32_t>();
  int64_t* from = places.mutable_data_ptr<int64_t>();
  const Change change{dropped.const_data_ptr<int64_t>(), grown.const_data_ptr<int64_t>(), k, from, from + k, source,
                      source + topology.blocks};
  C10_CUDA_CHECK(launch_change_rows(topology, change, stream));
  const at::Tensor old = packed ? at::empty({bytes}, col.options().dtype(at::kByte)) : at::Tensor();
  for (const at::Tensor& tensor : tensors) {
    if (packed) {
      C10_CUDA_CHECK(launch_move_values(tensor.mutable_data_ptr(), old.mutable_data_ptr(), source, topology.blocks, size,
                                        static_cast<int>(tensor.element_size()), stream));
    } else {
      zero_blocks(tensor, dropped, grown, topology.columns, block, stream);
      zero_blocks(tensor, grown, dropped, topology.columns, block, stream);
    }
  }
  const auto [sorted_col, sorted_place] = at::sort(col, /*stable=*/true, /*dim=*/0, /*descending=*/false);
  C10_CUDA_CHECK(launch_write_columns(topology, sorted_col.const_data_ptr<int32_t>(),
                                      sorted_place.const_data_ptr<int64_t>(), ccol.mutable_data_ptr<int32_t>(),
                                      row.mutable_data_ptr<int32_t>(), perm.mutable_data_ptr<int32_t>(), stream));
}

void exclude_kept_(at::Tensor scores, int64_t first, const at::Tensor& crow, const at::Tensor& col,
                   const at::Tensor& dropped, int64_t columns) {
  const c10::cuda::CUDAGuard guard(scores.device());
  TORCH_CHECK_VALUE(crow.dim() == 1 && crow.size(0) >= 2, "exclude_kept_: expected crow of one dimension and at least two "
                    "entries, got ", crow.sizes(), ".");
  const int64_t n = scores.numel(), rows = crow.size(0) - 1;
  check_csr(crow, col, {rows, columns}, {1, 1});
  TORCH_CHECK_VALUE(scores.dim() == 1 && scores.is_contiguous() && first >= 0 && first <= rows * columns - n,
                    "exclude_kept_: expected contiguous scores of blocks in [0, ", rows * columns, "), got ", n, " from ",
                    first, " on.");
  TORCH_CHECK_TYPE(scores.scalar_type() == at::kFloat || scores.scalar_type() == at::kDouble,
                   "exclude_kept_: expected float32 or float64 scores, got ", scores.scalar_type(), ".");
  TORCH_CHECK_VALUE(crow.device() == scores.device(), "exclude_kept_: expected scores and pattern on one device, got ",
                    scores.device(), " and ", crow.device(), ".");
  check_blocks(dropped, crow, "dropped");
  check_output(scores, "scores");
  if (n == 0) return;
  // The kernel only reads the topology.
  const Topology topology{const_cast<int32_t*>(crow.const_data_ptr<int32_t>()),
                          const_cast<int32_t*>(col.const_data_ptr<int32_t>()), rows, columns, col.numel()};
  C10_CUDA_CHECK(launch_exclude_kept(scores.mutable_data_ptr(), scores.scalar_type() == at::kDouble, first, n, topology,
                                     dropped.const_data_ptr<int64_t>(), dropped.size(0),
                                     c10::cuda::getCurrentCUDAStream()));
}

}  // namespace

TORCH_LIBRARY_IMPL(uasparse, CUDA, m) {
  m.impl("prune_grow_", &prune_grow_);
  m.impl("exclude_kept_", &exclude_kept_);
}

}  // namespace uasparse
