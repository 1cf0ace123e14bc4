// prune_grow_ on the CPU: moves a weight, its states and its pattern to a new topology, in place and in linear time.
//
// The new order of packed values is the old one without the dropped blocks, merged with the grown ones. As many are grown
// as dropped, so every array is first closed up over the dropped places (to the left) and then spread out to the grown
// ones (from the right), with no second copy. The order by columns is counted anew.

#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <torch/library.h>

#include <algorithm>
#include <cstring>
#include <limits>
#include <vector>

#include "checks.h"

namespace uasparse {
namespace {

struct Grid {
  const int32_t *crow, *col;
  int64_t rows, columns;

  // Number of active blocks before the flat index `block`: its place in packed order if it is active.
  int64_t place(int64_t block) const {
    const int32_t *begin = col + crow[block / columns], *end = col + crow[block / columns + 1];
    return std::lower_bound(begin, end, static_cast<int32_t>(block % columns)) - col;
  }
  bool is_active(int64_t block, int64_t place) const {
    return place < crow[block / columns + 1] && col[place] == block % columns;
  }
};

// Old places of the dropped blocks and new places of the grown ones, both ascending.
struct Moves {
  std::vector<int64_t> from, to;
};

void check_indices(const at::Tensor& blocks, const char* name, int64_t total) {
  TORCH_CHECK_TYPE(blocks.scalar_type() == at::kLong, "prune_grow_: expected int64 indices of the ", name,
                   " blocks, got ", blocks.scalar_type(), ".");
  TORCH_CHECK_VALUE(blocks.dim() == 1 && blocks.is_contiguous(), "prune_grow_: expected one contiguous row of ", name,
                    " blocks, got ", blocks.sizes(), ".");
  const int64_t* index = blocks.const_data_ptr<int64_t>();
  for (int64_t j = 0; j < blocks.size(0); ++j)
    TORCH_CHECK_VALUE(index[j] >= 0 && index[j] < total && (j == 0 || index[j] > index[j - 1]), "prune_grow_: expected ",
                      name, " blocks to be distinct, ascending and in [0, ", total, "), got ", index[j], " at position ",
                      j, ".");
}

Moves plan(const Grid& grid, const at::Tensor& dropped, const at::Tensor& grown) {
  const int64_t k = dropped.size(0);
  const int64_t *out = dropped.const_data_ptr<int64_t>(), *in = grown.const_data_ptr<int64_t>();
  Moves moves{std::vector<int64_t>(k), std::vector<int64_t>(k)};
  for (int64_t j = 0; j < k; ++j) {
    moves.from[j] = grid.place(out[j]);
    TORCH_CHECK_VALUE(grid.is_active(out[j], moves.from[j]), "prune_grow_: expected active blocks to drop, got ", out[j],
                      ", which is not active.");
  }
  int64_t dropped_before = 0;
  for (int64_t j = 0; j < k; ++j) {
    while (dropped_before < k && out[dropped_before] < in[j]) ++dropped_before;
    const int64_t place = grid.place(in[j]);
    TORCH_CHECK_VALUE(!grid.is_active(in[j], place) || (dropped_before < k && out[dropped_before] == in[j]),
                      "prune_grow_: expected inactive or dropped blocks to grow, got ", in[j],
                      ", which is active and not dropped.");
    moves.to[j] = place - dropped_before + j;
  }
  return moves;
}

// Moves `count` items of T; the regions may overlap. Runs between dropped blocks are short: no call for them.
template <typename T>
void move_run(T* to, const T* from, int64_t count) {
  if (count >= 32) {
    std::memmove(to, from, count * sizeof(T));
  } else if (to < from) {
    for (int64_t i = 0; i < count; ++i) to[i] = from[i];
  } else {
    for (int64_t i = count; i-- > 0;) to[i] = from[i];
  }
}

// data [blocks, size] of blocks in packed order: without the dropped, with zeros for the grown.
template <typename T>
void move_values(T* data, int64_t blocks, int64_t size, const Moves& moves) {
  const int64_t k = static_cast<int64_t>(moves.from.size());
  for (int64_t j = 0; j < k; ++j) {
    const int64_t begin = moves.from[j] + 1, end = j + 1 < k ? moves.from[j + 1] : blocks;
    move_run(data + (begin - j - 1) * size, data + begin * size, (end - begin) * size);
  }
  for (int64_t j = k - 1; j >= 0; --j) {
    const int64_t begin = moves.to[j] + 1, end = j + 1 < k ? moves.to[j + 1] : blocks;
    move_run(data + begin * size, data + (begin - j - 1) * size, (end - begin) * size);
    std::fill_n(data + moves.to[j] * size, size, T(0));
  }
}

void move_packed(const at::Tensor& tensor, int64_t blocks, const Moves& moves) {
  const int64_t size = blocks == 0 ? 1 : tensor.numel() / blocks;
  void* data = tensor.mutable_data_ptr();
  switch (tensor.element_size()) {
    case 1: return move_values(static_cast<uint8_t*>(data), blocks, size, moves);
    case 2: return move_values(static_cast<uint16_t*>(data), blocks, size, moves);
    case 4: return move_values(static_cast<uint32_t*>(data), blocks, size, moves);
    default: return move_values(static_cast<uint64_t*>(data), blocks, size * tensor.element_size() / 8, moves);
  }
}

// Zeroes the given blocks of a tensor of the weight's shape and any strides.
void zero_blocks(const at::Tensor& tensor, const at::Tensor& blocks, int64_t columns, at::IntArrayRef block) {
  char* data = static_cast<char*>(tensor.mutable_data_ptr());
  const int64_t bytes = tensor.element_size(), height = tensor.dim() == 4 ? tensor.size(2) : 1,
                width = tensor.dim() == 4 ? tensor.size(3) : 1, positions = height * width;
  for (int64_t j = 0; j < blocks.size(0); ++j) {
    const int64_t flat = blocks.const_data_ptr<int64_t>()[j], row = flat / columns, column = flat % columns;
    const int64_t position = column % positions;
    int64_t offset = row * block[0] * tensor.stride(0) + column / positions * block[1] * tensor.stride(1);
    if (positions > 1) offset += position / width * tensor.stride(2) + position % width * tensor.stride(3);
    for (int64_t y = 0; y < block[0]; ++y)
      for (int64_t x = 0; x < block[1]; ++x)
        std::memset(data + (offset + y * tensor.stride(0) + x * tensor.stride(1)) * bytes, 0, bytes);
  }
}

// crow and col of the new topology; col was moved like a packed value.
void write_rows(int32_t* crow, int32_t* col, int64_t rows, int64_t columns, const at::Tensor& dropped,
                const at::Tensor& grown, const Moves& moves) {
  const int64_t k = dropped.size(0);
  const int64_t *out = dropped.const_data_ptr<int64_t>(), *in = grown.const_data_ptr<int64_t>();
  for (int64_t j = 0; j < k; ++j) col[moves.to[j]] = static_cast<int32_t>(in[j] % columns);
  int64_t left = 0, came = 0;
  for (int64_t r = 0; r < rows; ++r) {
    while (left < k && out[left] < (r + 1) * columns) ++left;
    while (came < k && in[came] < (r + 1) * columns) ++came;
    crow[r + 1] += static_cast<int32_t>(came - left);
  }
}

void write_columns(const Grid& grid, int32_t* ccol, int32_t* row, int32_t* perm) {
  const int64_t blocks = grid.crow[grid.rows];
  std::fill_n(ccol, grid.columns + 1, 0);
  for (int64_t i = 0; i < blocks; ++i) ++ccol[grid.col[i] + 1];
  for (int64_t c = 0; c < grid.columns; ++c) ccol[c + 1] += ccol[c];
  std::vector<int32_t> next(ccol, ccol + grid.columns);
  for (int64_t r = 0; r < grid.rows; ++r) {
    for (int32_t i = grid.crow[r]; i < grid.crow[r + 1]; ++i) {
      const int32_t at = next[grid.col[i]]++;
      row[at] = static_cast<int32_t>(r);
      perm[at] = i;
    }
  }
}

void check_pattern(const at::Tensor& crow, const at::Tensor& col, const at::Tensor& ccol, const at::Tensor& row,
                   const at::Tensor& perm, int64_t columns, at::IntArrayRef shape, at::IntArrayRef block) {
  check_csr(crow, col, shape, block);
  for (const at::Tensor* tensor : {&ccol, &row, &perm})
    TORCH_CHECK_VALUE(tensor->scalar_type() == at::kInt && tensor->is_contiguous() && tensor->device() == crow.device(),
                      "prune_grow_: expected contiguous int32 pattern tensors on one device.");
  TORCH_CHECK_VALUE(ccol.numel() == columns + 1 && row.numel() == col.numel() && perm.numel() == col.numel(),
                    "prune_grow_: expected ccol, row and perm of ", columns + 1, ", ", col.numel(), " and ", col.numel(),
                    " entries, got ", ccol.numel(), ", ", row.numel(), " and ", perm.numel(), ".");
}

void prune_grow_(at::Tensor weight, at::TensorList states, at::Tensor crow, at::Tensor col, at::Tensor ccol,
                 at::Tensor row, at::Tensor perm, const at::Tensor& dropped, const at::Tensor& grown,
                 at::IntArrayRef shape, at::IntArrayRef block) {
  const int64_t rows = shape[0] / block[0];
  int64_t columns = shape[1] / block[1];
  for (size_t i = 2; i < shape.size(); ++i) columns *= shape[i];
  check_pattern(crow, col, ccol, row, perm, columns, shape, block);
  check_indices(dropped, "dropped", rows * columns);
  check_indices(grown, "grown", rows * columns);
  TORCH_CHECK_VALUE(dropped.size(0) == grown.size(0), "prune_grow_: expected as many grown blocks as dropped ones, got ",
                    grown.size(0), " and ", dropped.size(0), ".");
  std::vector<at::Tensor> tensors{weight};
  tensors.insert(tensors.end(), states.begin(), states.end());
  const int64_t blocks = col.numel();
  const bool packed = weight.sizes() != shape;
  for (const at::Tensor& tensor : tensors)
    TORCH_CHECK_VALUE(tensor.sizes() == weight.sizes() && (!packed || tensor.is_contiguous()),
                      "prune_grow_: expected states of the weight's shape ", weight.sizes(),
                      packed ? ", contiguous, got " : ", got ", tensor.sizes(), ".");
  TORCH_CHECK_VALUE(!packed || weight.numel() == blocks * block[0] * block[1],
                    "prune_grow_: expected a weight of shape ", shape, " or ", blocks * block[0] * block[1],
                    " packed values, got ", weight.sizes(), ".");

  const Grid grid{crow.const_data_ptr<int32_t>(), col.const_data_ptr<int32_t>(), rows, columns};
  const Moves moves = plan(grid, dropped, grown);  // the last that can fail: nothing has changed yet
  if (dropped.size(0) == 0) return;
  at::parallel_for(0, static_cast<int64_t>(tensors.size()) + 1, 1, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      if (t == static_cast<int64_t>(tensors.size())) {
        move_packed(col, blocks, moves);
      } else if (packed) {
        move_packed(tensors[t], blocks, moves);
      } else {
        zero_blocks(tensors[t], dropped, columns, block);
        zero_blocks(tensors[t], grown, columns, block);
      }
    }
  });
  write_rows(crow.mutable_data_ptr<int32_t>(), col.mutable_data_ptr<int32_t>(), rows, columns, dropped, grown, moves);
  write_columns(grid, ccol.mutable_data_ptr<int32_t>(), row.mutable_data_ptr<int32_t>(),
                perm.mutable_data_ptr<int32_t>());
}

void exclude_kept_(at::Tensor scores, int64_t first, const at::Tensor& crow, const at::Tensor& col,
                   const at::Tensor& dropped, int64_t columns) {
  const int64_t n = scores.numel(), rows = crow.size(0) - 1;
  TORCH_CHECK_VALUE(scores.dim() == 1 && scores.is_contiguous() && columns > 0 && first >= 0 &&
                        first + n <= rows * columns,
                    "exclude_kept_: expected contiguous scores of blocks in [0, ", rows * columns, "), got ", n, " from ",
                    first, " on.");
  TORCH_CHECK_VALUE(crow.scalar_type() == at::kInt && col.scalar_type() == at::kInt && crow.is_contiguous() &&
                        col.is_contiguous() && dropped.scalar_type() == at::kLong && dropped.is_contiguous(),
                    "exclude_kept_: expected contiguous int32 pattern tensors and int64 dropped blocks.");
  if (n == 0) return;
  const int32_t *starts = crow.const_data_ptr<int32_t>(), *cols = col.const_data_ptr<int32_t>();
  const int64_t *out = dropped.const_data_ptr<int64_t>(), *out_end = out + dropped.size(0);
  AT_DISPATCH_FLOATING_TYPES(scores.scalar_type(), "exclude_kept_", [&] {
    scalar_t* data = scores.mutable_data_ptr<scalar_t>();
    at::parallel_for(first / columns, (first + n - 1) / columns + 1, 16, [&](int64_t begin, int64_t end) {
      const int64_t* next = std::lower_bound(out, out_end, begin * columns);
      for (int64_t r = begin; r < end; ++r) {
        for (int32_t i = starts[r]; i < starts[r + 1]; ++i) {
          const int64_t block = r * columns + cols[i];
          while (next != out_end && *next < block) ++next;
          const bool kept = next == out_end || *next != block;
          if (kept && block >= first && block < first + n)
            data[block - first] = std::numeric_limits<scalar_t>::quiet_NaN();
        }
      }
    });
  });
}

}  // namespace

TORCH_LIBRARY_IMPL(uasparse, CPU, m) {
  m.impl("prune_grow_", &prune_grow_);
  m.impl("exclude_kept_", &exclude_kept_);
}

}  // namespace uasparse
