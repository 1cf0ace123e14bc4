// pack and unpack on the CPU: one pass over the active blocks, parallel over rows of the grid. The dense fallback of the
// layers goes through them in every step, so full rows are copied whole and a row is cleared just before it is written.

#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/scalar_tensor.h>
#include <torch/library.h>

#include <algorithm>
#include <atomic>
#include <memory>
#include <type_traits>
#include <utility>

#include "checks.h"
#include "cpu/pattern.h"
#include "cpu/verified.h"

namespace uasparse {
namespace {

// Calls copy(packed index, dense index, count) for runs of active weights in grid row r: whole rows of an unstructured
// pattern where they are full, else single weights.
template <typename Copy>
void for_each_run(const int32_t* crow, const int32_t* col, int64_t r, int64_t bh, int64_t bw, int64_t channels,
                  int64_t positions, Copy copy) {
  const int64_t first = crow[r], last = crow[r + 1], columns = channels * positions;
  if (bh == 1 && bw == 1) {
    if (last - first == columns) return copy(first, r * columns, columns);
    for (int64_t i = first; i < last; ++i) copy(i, r * columns + col[i], std::integral_constant<int64_t, 1>{});
    return;
  }
  for (int64_t i = first; i < last; ++i) {
    const int64_t channel = col[i] / positions * bw, position = col[i] % positions;
    for (int64_t y = 0; y < bh; ++y) {
      const int64_t flat = ((r * bh + y) * channels + channel) * positions + position;
      if (positions == 1) {
        copy((i * bh + y) * bw, flat, bw);
        continue;
      }
      for (int64_t x = 0; x < bw; ++x)
        copy((i * bh + y) * bw + x, flat + x * positions, std::integral_constant<int64_t, 1>{});
    }
  }
}

// The grid, where crow and col fit it and a tensor [dense shape] or of packed values lies beside them.
BlockGrid check(const at::Tensor& tensor, const char* name, const at::Tensor& crow, const at::Tensor& col,
                at::IntArrayRef shape, at::IntArrayRef block) {
  const BlockGrid grid = check_csr(crow, col, shape, block);
  TORCH_CHECK_VALUE(tensor.device() == crow.device(), "Expected ", name, " and pattern on one device, got ",
                    tensor.device(), " and ", crow.device(), ".");
  check_storage(tensor, name);
  verify_rows(crow, col, grid.columns);
  return grid;
}

// Calls run(word), of the unsigned integer that has the size of an element.
template <typename Run>
void as_words(int64_t element_size, Run run) {
  switch (element_size) {
    case 1: return run(uint8_t{});
    case 2: return run(uint16_t{});
    case 4: return run(uint32_t{});
    case 8: return run(uint64_t{});
    default: TORCH_CHECK_TYPE(false, "keep_active_: expected elements of 1, 2, 4 or 8 bytes, got ", element_size, ".");
  }
}

void keep_active(const at::Tensor& dense, const at::Tensor& crow, const at::Tensor& col, at::IntArrayRef block) {
  const BlockGrid grid = check(dense, "dense", crow, col, dense.sizes(), block);
  check_output(dense, "dense");
  const at::Tensor work = dense.contiguous();  // itself, but for gradients of channels_last convolutions
  const int64_t bh = block[0], bw = block[1], channels = dense.size(1), positions = grid.positions;
  const int64_t columns = grid.columns;
  as_words(dense.element_size(), [&]<typename Word>(Word) {
    Word* to = static_cast<Word*>(work.mutable_data_ptr());
    const int32_t *rows = crow.const_data_ptr<int32_t>(), *cols = col.const_data_ptr<int32_t>();
    at::parallel_for(0, crow.size(0) - 1, 64, [&](int64_t begin, int64_t end) {
      const bool single = bh == 1 && bw == 1;
      const std::unique_ptr<uint8_t[]> mask(new uint8_t[single ? columns : 0]());
      for (int64_t r = begin; r < end; ++r) {
        Word* row = to + r * bh * channels * positions;
        if (single) {
          // By a mask of the row: to clear the gaps between single weights would mispredict at each.
          uint8_t* __restrict active = mask.get();
          Word* __restrict words = row;
          for (int64_t i = rows[r]; i < rows[r + 1]; ++i) active[cols[i]] = 1;
          for (int64_t c = 0; c < columns; ++c) words[c] = Word(words[c] & -Word(active[c]));
          std::fill_n(active, columns, uint8_t(0));
          continue;
        }
        int64_t next = 0;
        for (int64_t i = rows[r]; i <= rows[r + 1]; ++i) {
          const int64_t stop = i < rows[r + 1] ? cols[i] : columns;
          for (int64_t c = next; c < stop; ++c) {
            Word* corner = row + c / positions * bw * positions + c % positions;
            for (int64_t y = 0; y < bh; ++y)
              for (int64_t x = 0; x < bw; ++x) corner[(y * channels + x) * positions] = 0;
          }
          next = stop + 1;
        }
      }
    });
  });
  if (!dense.is_contiguous()) dense.copy_(work);
}

}  // namespace

at::Tensor pack(const at::Tensor& dense, const at::Tensor& crow, const at::Tensor& col, at::IntArrayRef block) {
  const BlockGrid grid = check(dense, "dense", crow, col, dense.sizes(), block);
  const at::Tensor source = dense.contiguous();
  const int64_t bh = block[0], bw = block[1];
  const auto options = dense.options().memory_format(at::MemoryFormat::Contiguous);
  at::Tensor values =
      bh == 1 && bw == 1 ? at::empty({col.size(0)}, options) : at::empty({col.size(0), bh, bw}, options);
  AT_DISPATCH_ALL_TYPES_AND3(at::kBFloat16, at::kHalf, at::kBool, dense.scalar_type(), "pack", [&] {
    const scalar_t* from = source.const_data_ptr<scalar_t>();
    scalar_t* to = values.mutable_data_ptr<scalar_t>();
    const int32_t *rows = crow.const_data_ptr<int32_t>(), *cols = col.const_data_ptr<int32_t>();
    at::parallel_for(0, crow.size(0) - 1, 64, [&](int64_t begin, int64_t end) {
      for (int64_t r = begin; r < end; ++r)
        for_each_run(rows, cols, r, bh, bw, dense.size(1), grid.positions,
                     [=](int64_t packed, int64_t flat, auto count) { std::copy_n(from + flat, count, to + packed); });
    });
  });
  return values;
}

at::Tensor unpack(const at::Tensor& values, const at::Tensor& crow, const at::Tensor& col, at::IntArrayRef shape,
                  at::IntArrayRef block) {
  const BlockGrid grid = check(values, "values", crow, col, shape, block);
  const int64_t bh = block[0], bw = block[1];
  TORCH_CHECK_VALUE(values.numel() == col.size(0) * bh * bw, "Expected ", col.size(0) * bh * bw,
                    " packed values, got ", values.numel(), ".");
  const at::Tensor source = values.contiguous();
  at::Tensor dense = at::empty(shape, values.options().memory_format(at::MemoryFormat::Contiguous));
  const int64_t row_size = bh * shape[1] * grid.positions;
  AT_DISPATCH_ALL_TYPES_AND3(at::kBFloat16, at::kHalf, at::kBool, values.scalar_type(), "unpack", [&] {
    const scalar_t* from = source.const_data_ptr<scalar_t>();
    scalar_t* to = dense.mutable_data_ptr<scalar_t>();
    const int32_t *rows = crow.const_data_ptr<int32_t>(), *cols = col.const_data_ptr<int32_t>();
    at::parallel_for(0, crow.size(0) - 1, 64, [&](int64_t begin, int64_t end) {
      for (int64_t r = begin; r < end; ++r) {
        std::fill_n(to + r * row_size, row_size, scalar_t(0));
        for_each_run(rows, cols, r, bh, bw, shape[1], grid.positions,
                     [=](int64_t packed, int64_t flat, auto count) { std::copy_n(from + packed, count, to + flat); });
      }
    });
  });
  return dense;
}

// Flat grid indices of the blocks at ascending places of the order by rows.
at::Tensor blocks_at(const at::Tensor& crow, const at::Tensor& col, const at::Tensor& places, int64_t columns) {
  TORCH_CHECK_VALUE(crow.dim() == 1 && crow.size(0) >= 2, "blocks_at: expected crow of one dimension and at least two "
                    "entries, got ", crow.sizes(), ".");
  check_csr(crow, col, {crow.size(0) - 1, columns}, {1, 1});
  check_blocks(places, "places of", col.numel());
  verify_rows(crow, col, columns);
  at::Tensor blocks = at::empty(places.sizes(), places.options());
  const int32_t *ends = crow.const_data_ptr<int32_t>() + 1, *cols = col.const_data_ptr<int32_t>();
  const int64_t* from = places.const_data_ptr<int64_t>();
  int64_t* to = blocks.mutable_data_ptr<int64_t>();
  const int64_t n = places.size(0);
  for (int64_t i = 0, r = 0; i < n; ++r)
    for (; i < n && from[i] < ends[r]; ++i) to[i] = r * columns + cols[from[i]];
  return blocks;
}

// What SparsityPattern's _hash computes in torch.
at::Tensor pattern_hash(const at::Tensor& crow, const at::Tensor& col, int64_t seed) {
  TORCH_CHECK_VALUE(crow.dim() == 1 && crow.size(0) >= 1 && col.dim() == 1 && crow.is_contiguous() && col.is_contiguous(),
                    "pattern_hash: expected crow and col of one dimension, contiguous, got ", crow.sizes(), " and ",
                    col.sizes(), ".");
  TORCH_CHECK_TYPE(crow.scalar_type() == at::kInt && col.scalar_type() == at::kInt,
                   "pattern_hash: expected int32 indices, got ", crow.scalar_type(), " and ", col.scalar_type(), ".");
  check_storage(crow, "crow");
  check_storage(col, "col");
  const int64_t rows = crow.size(0) - 1, n = col.size(0);
  const int32_t *starts = crow.const_data_ptr<int32_t>(), *cols = col.const_data_ptr<int32_t>();
  std::atomic<uint64_t> total = 0;
  at::parallel_for(0, rows, 64, [&](int64_t begin, int64_t end) {
    uint64_t sum = 0;
    for (int64_t r = begin; r < end; ++r) {
      TORCH_CHECK_VALUE(0 <= starts[r] && starts[r] <= starts[r + 1] && starts[r + 1] <= n,
                        "pattern_hash: expected crow to rise from 0 to the number of active blocks, ", n, ".");
      const uint64_t base = (static_cast<uint64_t>(r) << 31) + static_cast<uint64_t>(seed);
      for (int64_t i = starts[r]; i < starts[r + 1]; ++i) {
        int64_t x = static_cast<int64_t>(base + static_cast<uint64_t>(static_cast<int64_t>(cols[i])));
        for (const auto& [factor, shift] : {std::pair{0x9e3779b97f4a7c15u, 30}, {0xbf58476d1ce4e5b9u, 27}, {0x94d049bb133111ebu, 31}}) {
          x = static_cast<int64_t>(static_cast<uint64_t>(x) * factor);
          x ^= x >> shift;
        }
        sum += static_cast<uint64_t>(x);
      }
    }
    total += sum;
  });
  return at::scalar_tensor(static_cast<int64_t>(total.load()), at::kLong);
}

TORCH_LIBRARY_IMPL(uasparse, CPU, m) {
  m.impl("blocks_at", &blocks_at);
  m.impl("pattern_hash", &pattern_hash);
  m.impl("pack", &pack);
  m.impl("unpack", &unpack);
  m.impl("keep_active_", &keep_active);
}

}  // namespace uasparse
