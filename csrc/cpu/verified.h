// What pattern tensors hold, checked before a kernel trusts it: once, and again when it changed.
//
// A check is a pass over the active blocks, done once for each version of the tensors (remembered.h). What raises no
// version (numpy, `.data`, DLPack, collectives) would be missed: so a few entries of each tensor are compared too, which
// notices a pattern that was replaced as a whole. A write of single entries past the version is the caller's
// risk, as everywhere in torch; torch.autograd.graph.increment_version() after it has them checked. Inference tensors have
// no version and are checked each time. Safe to call from any thread.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>

namespace uasparse {

// By rows: crow rises from 0 to the number of blocks, and the columns of each row are distinct, ascending and below
// `columns`. col may hold 16 bits (of at most 2^16 columns). Sizes and dtypes were checked (checks.h). ValueError else.
void verify_rows(const at::Tensor& crow, const at::Tensor& col, int64_t columns);

// Both orders, col of 32 bits: the one by columns is the exact transpose of the one by rows.
void verify_both(const at::Tensor& crow, const at::Tensor& col, const at::Tensor& ccol, const at::Tensor& row,
                 const at::Tensor& perm);

// Flat indices (int64, contiguous, one dimension): ascending, distinct and in [0, total).
void verify_blocks(const at::Tensor& blocks, const char* name, int64_t total);

}  // namespace uasparse
