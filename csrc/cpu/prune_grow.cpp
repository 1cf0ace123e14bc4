// prune_grow_ on the CPU: moves a weight, its states and its pattern to a new topology, in place and in linear time.
//
// A block that is dropped and grown again stays where and as it is. The new order of packed values
// is the old one without the dropped blocks, merged with the grown ones. As many are grown as dropped, so every array is first closed up over the dropped places (to the left) and then spread out to the grown
// ones (from the right), with no second copy. Where they are is said by two rows of bits, a bit a place: values are
// moved without a branch, which would be mispredicted at every second one. The order by columns is counted anew.

#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/from_blob.h>
#include <torch/library.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <iterator>
#include <limits>
#include <vector>

#include "checks.h"
#include "cpu/verified.h"
#include "cpu/workspace.h"

namespace uasparse {
namespace {

struct Grid {
  const int32_t *crow, *col;
  int64_t rows, columns;
};

// A bit a place in packed order.
class Bits {
 public:
  explicit Bits(int64_t size) : memory_((size + 63) / 64 * 8), words_(memory_.as<uint64_t>()) {
    std::fill_n(words_, (size + 63) / 64, 0);
  }
  void set(int64_t i) { words_[i / 64] |= uint64_t{1} << (i % 64); }
  void clear(int64_t i) { words_[i / 64] &= ~(uint64_t{1} << (i % 64)); }
  bool operator[](int64_t i) const { return words_[i / 64] >> (i % 64) & 1; }
  uint64_t word(int64_t i) const { return words_[i / 64]; }

 private:
  Workspace memory_;
  uint64_t* words_;
};

using Blocks = std::vector<int64_t>;

// Old places of the blocks that leave and new places of those that come, and the blocks themselves.
struct Moves {
  explicit Moves(int64_t blocks) : dropped(blocks), grown(blocks) {}
  Bits dropped, grown;
  Blocks out, in;
};

void check_indices(const at::Tensor& blocks, const char* name, int64_t total) {
  TORCH_CHECK_TYPE(blocks.scalar_type() == at::kLong, "Expected int64 indices of the ", name, " blocks, got ",
                   blocks.scalar_type(), ".");
  TORCH_CHECK_VALUE(blocks.dim() == 1 && blocks.is_contiguous(), "Expected one contiguous row of ", name,
                    " blocks, got ", blocks.sizes(), ".");
  check_storage(blocks, name);
  verify_blocks(blocks, name, total);
}

// Row by row, a walk along its blocks beside those dropped and those grown; all are ascending.
void plan(const Grid& grid, const at::Tensor& dropped, const at::Tensor& grown, Moves& moves) {
  const int64_t k = dropped.size(0);
  const int64_t *out = dropped.const_data_ptr<int64_t>(), *in = grown.const_data_ptr<int64_t>();
  int64_t left = 0, came = 0, stayed = 0;
  for (int64_t r = 0; r < grid.rows; ++r) {
    const int64_t first = r * grid.columns, next = first + grid.columns, gone_before = left - stayed;
    int64_t place = grid.crow[r];
    const int64_t end = grid.crow[r + 1];
    for (; left < k && out[left] < next; ++left, ++place) {
      while (place < end && first + grid.col[place] < out[left]) ++place;
      TORCH_CHECK_VALUE(place < end && first + grid.col[place] == out[left],
                        "prune_grow_: expected active blocks to drop, got ", out[left], ", which is not active.");
      moves.dropped.set(place);
    }
    place = grid.crow[r];
    for (int64_t gone = gone_before; came < k && in[came] < next; ++came) {
      for (; place < end && first + grid.col[place] < in[came]; ++place) gone += moves.dropped[place];
      if (place < end && first + grid.col[place] == in[came]) {
        TORCH_CHECK_VALUE(moves.dropped[place], "prune_grow_: expected inactive or dropped blocks to grow, got ", in[came],
                          ", which is active and not dropped.");
        moves.dropped.clear(place);
        ++stayed;
      } else {
        moves.grown.set(place - gone + std::ssize(moves.in));
        moves.in.push_back(in[came]);
      }
    }
  }
  moves.out.reserve(moves.in.size());
  std::set_difference(out, out + k, in, in + k, std::back_inserter(moves.out));
}

// data [blocks, size] of blocks in packed order: without the dropped, with zeros for the grown.
template <typename T>
void move_values(T* data, int64_t blocks, int64_t size, const Moves& moves) {
  if (size == 1) {
    int64_t to = 0;
    for (int64_t first = 0; first < blocks; first += 64) {
      uint64_t gone = moves.dropped.word(first);
      for (int64_t i = first; i < std::min(blocks, first + 64); ++i, gone >>= 1) {
        data[to] = data[i];
        to += static_cast<int64_t>(~gone & 1);
      }
    }
    for (int64_t end = blocks; end > 0;) {  // the last place of a word first
      const int64_t first = (end - 1) / 64 * 64;
      uint64_t fresh = moves.grown.word(first) << (63 - (end - 1 - first));
      for (int64_t i = end; i-- > first; fresh <<= 1) {
        const uint64_t is_new = fresh >> 63;
        to -= static_cast<int64_t>(1 - is_new);
        // Where the place is new there may be nothing left to read; what is read then does not count.
        data[i] = static_cast<T>(data[to] & (static_cast<T>(is_new) - 1));
      }
      end = first;
    }
    return;
  }
  int64_t to = 0;
  for (int64_t i = 0; i < blocks; ++i) {
    if (moves.dropped[i]) continue;
    if (to != i) std::memcpy(data + to * size, data + i * size, size * sizeof(T));
    ++to;
  }
  for (int64_t i = blocks; i-- > 0;) {
    if (moves.grown[i]) {
      std::fill_n(data + i * size, size, T(0));
    } else if (--to != i) {
      std::memcpy(data + i * size, data + to * size, size * sizeof(T));
    }
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
void zero_blocks(const at::Tensor& tensor, const Blocks& blocks, int64_t columns, at::IntArrayRef block) {
  char* data = static_cast<char*>(tensor.mutable_data_ptr());
  const int64_t bytes = tensor.element_size(), height = tensor.dim() == 4 ? tensor.size(2) : 1,
                width = tensor.dim() == 4 ? tensor.size(3) : 1, positions = height * width;
  for (const int64_t flat : blocks) {
    const int64_t row = flat / columns, column = flat % columns, position = column % positions;
    int64_t offset = row * block[0] * tensor.stride(0) + column / positions * block[1] * tensor.stride(1);
    if (positions > 1) offset += position / width * tensor.stride(2) + position % width * tensor.stride(3);
    for (int64_t y = 0; y < block[0]; ++y)
      for (int64_t x = 0; x < block[1]; ++x)
        std::memset(data + (offset + y * tensor.stride(0) + x * tensor.stride(1)) * bytes, 0, bytes);
  }
}

// crow and col of the new topology; col was moved like a packed value.
void write_rows(int32_t* crow, int32_t* col, int64_t rows, int64_t columns, const Moves& moves) {
  const Blocks &out = moves.out, &in = moves.in;
  const int64_t k = std::ssize(out);
  int64_t left = 0, came = 0, place = 0;
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t first = r * columns;
    while (left < k && out[left] < first + columns) ++left;
    for (; came < k && in[came] < first + columns; ++came, ++place) {
      for (uint64_t rest = moves.grown.word(place) >> (place % 64);;) {
        if (rest != 0) {
          place += std::countr_zero(rest);
          break;
        }
        place = (place / 64 + 1) * 64;
        rest = moves.grown.word(place);
      }
      col[place] = static_cast<int32_t>(in[came] - first);
    }
    crow[r + 1] += static_cast<int32_t>(came - left);
  }
}

// A range of columns at a time: so many places to write to stay in the caches and the translation buffer.
void write_columns(const Grid& grid, int32_t* ccol, int32_t* row, int32_t* perm) {
  constexpr int64_t kColumns = 512;
  const int64_t blocks = grid.crow[grid.rows];
  std::fill_n(ccol, grid.columns + 1, 0);
  for (int64_t i = 0; i < blocks; ++i) ++ccol[grid.col[i] + 1];
  for (int64_t c = 0; c < grid.columns; ++c) ccol[c + 1] += ccol[c];
  std::vector<int32_t> at_row(grid.crow, grid.crow + grid.rows), next(ccol, ccol + grid.columns);
  for (int64_t first = 0; first < grid.columns; first += kColumns) {
    const int64_t last = std::min(grid.columns, first + kColumns);
    for (int64_t r = 0; r < grid.rows; ++r) {
      int32_t i = at_row[r];
      for (; i < grid.crow[r + 1] && grid.col[i] < last; ++i) {
        const int32_t at = next[grid.col[i]]++;
        row[at] = static_cast<int32_t>(r);
        perm[at] = i;
      }
      at_row[r] = i;
    }
  }
}

void prune_grow_(at::Tensor weight, at::TensorList states, at::Tensor crow, at::Tensor col, at::Tensor ccol,
                 at::Tensor row, at::Tensor perm, const at::Tensor& dropped, const at::Tensor& grown,
                 at::IntArrayRef shape, at::IntArrayRef block) {
  const auto [rows, columns, positions] = check_csr(crow, col, shape, block);
  check_transposed(ccol, row, perm, col, {rows, columns, positions});
  check_indices(dropped, "dropped", rows * columns);
  check_indices(grown, "grown", rows * columns);
  TORCH_CHECK_VALUE(dropped.size(0) == grown.size(0), "prune_grow_: expected as many grown blocks as dropped ones, got ",
                    grown.size(0), " and ", dropped.size(0), ".");
  std::vector<at::Tensor> tensors{weight};
  tensors.insert(tensors.end(), states.begin(), states.end());
  const int64_t blocks = col.numel();
  const bool packed = !check_weight(weight, col, shape, block, "prune_grow_");
  for (const at::Tensor& tensor : tensors) {
    TORCH_CHECK_VALUE(tensor.sizes() == weight.sizes() && tensor.device() == weight.device() &&
                          tensor.layout() == at::kStrided && (!packed || tensor.is_contiguous()),
                      "prune_grow_: expected states of the weight's shape ", weight.sizes(), " on its device",
                      packed ? ", contiguous, got " : ", got ", tensor.sizes(), " on ", tensor.device(), ".");
    check_output(tensor, "weight and states");
  }
  std::vector<at::Tensor> written = tensors;
  written.insert(written.end(), {crow, col, ccol, row, perm});
  check_apart(written);
  verify_rows(crow, col, columns);  // the order by columns is made anew

  const Grid grid{crow.const_data_ptr<int32_t>(), col.const_data_ptr<int32_t>(), rows, columns};
  Moves moves(blocks);
  plan(grid, dropped, grown, moves);  // the last that can fail: nothing has changed yet
  if (moves.out.empty()) return;
  at::parallel_for(0, static_cast<int64_t>(tensors.size()) + 1, 1, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      if (t == static_cast<int64_t>(tensors.size())) {
        move_packed(col, blocks, moves);
      } else if (packed) {
        move_packed(tensors[t], blocks, moves);
      } else {
        zero_blocks(tensors[t], moves.out, columns, block);
        zero_blocks(tensors[t], moves.in, columns, block);
      }
    }
  });
  write_rows(crow.mutable_data_ptr<int32_t>(), col.mutable_data_ptr<int32_t>(), rows, columns, moves);
  write_columns(grid, ccol.mutable_data_ptr<int32_t>(), row.mutable_data_ptr<int32_t>(),
                perm.mutable_data_ptr<int32_t>());
}

// Sets the scores of kept blocks (active, not dropped) of the grid rows [begin, end) to NaN; data begins at block `first`
// and has n scores.
template <typename T>
void exclude_rows(T* data, int64_t first, int64_t n, const int32_t* starts, const int32_t* cols, const at::Tensor& dropped,
                  int64_t columns, int64_t begin, int64_t end) {
  const int64_t *out = dropped.const_data_ptr<int64_t>(), *out_end = out + dropped.size(0);
  const int64_t* next = std::lower_bound(out, out_end, begin * columns);
  for (int64_t r = begin; r < end; ++r) {
    for (int32_t i = starts[r]; i < starts[r + 1]; ++i) {
      const int64_t block = r * columns + cols[i];
      while (next != out_end && *next < block) ++next;
      const bool kept = next == out_end || *next != block;
      if (kept && block >= first && block < first + n) data[block - first] = std::numeric_limits<T>::quiet_NaN();
    }
  }
}

void exclude_kept_(at::Tensor scores, int64_t first, const at::Tensor& crow, const at::Tensor& col,
                   const at::Tensor& dropped, int64_t columns) {
  TORCH_CHECK_VALUE(crow.dim() == 1 && crow.size(0) >= 2, "exclude_kept_: expected crow of one dimension and at least two "
                    "entries, got ", crow.sizes(), ".");
  const int64_t n = scores.numel(), rows = crow.size(0) - 1;
  check_csr(crow, col, {rows, columns}, {1, 1});
  TORCH_CHECK_VALUE(scores.dim() == 1 && scores.is_contiguous() && first >= 0 && first <= rows * columns - n,
                    "exclude_kept_: expected contiguous scores of blocks in [0, ", rows * columns, "), got ", n, " from ",
                    first, " on.");
  TORCH_CHECK_VALUE(scores.device() == crow.device() && dropped.device() == crow.device(),
                    "exclude_kept_: expected scores, pattern and dropped blocks on one device.");
  TORCH_CHECK_TYPE(scores.scalar_type() == at::kFloat || scores.scalar_type() == at::kDouble,
                   "exclude_kept_: expected float32 or float64 scores, got ", scores.scalar_type(), ".");
  check_output(scores, "scores");
  check_indices(dropped, "dropped", rows * columns);
  verify_rows(crow, col, columns);
  if (n == 0) return;
  const int32_t *starts = crow.const_data_ptr<int32_t>(), *cols = col.const_data_ptr<int32_t>();
  AT_DISPATCH_FLOATING_TYPES(scores.scalar_type(), "exclude_kept_", [&] {
    scalar_t* data = scores.mutable_data_ptr<scalar_t>();
    at::parallel_for(first / columns, (first + n - 1) / columns + 1, 16, [&](int64_t begin, int64_t end) {
      exclude_rows(data, first, n, starts, cols, dropped, columns, begin, end);
    });
  });
}

// In memory of the pool: that of a fresh tensor of this size would cost more than the scores.
at::Tensor growth_scores(const at::Tensor& dense, const at::Tensor& crow, const at::Tensor& col, const at::Tensor& dropped) {
  TORCH_CHECK_VALUE(crow.dim() == 1 && crow.size(0) >= 2, "growth_scores: expected crow of one dimension and at least "
                    "two entries, got ", crow.sizes(), ".");
  const int64_t rows = crow.size(0) - 1, n = dense.numel(), columns = n / rows;
  TORCH_CHECK_VALUE(dense.is_contiguous() && columns * rows == n,
                    "growth_scores: expected contiguous scores of ", rows, " rows, got sizes ", dense.sizes(), ".");
  TORCH_CHECK_TYPE(dense.scalar_type() == at::kFloat || dense.scalar_type() == at::kDouble,
                   "growth_scores: expected float32 or float64 scores, got ", dense.scalar_type(), ".");
  TORCH_CHECK_VALUE(dense.device() == crow.device() && dropped.device() == crow.device(),
                    "growth_scores: expected scores, pattern and dropped blocks on one device.");
  check_csr(crow, col, {rows, columns}, {1, 1});
  check_storage(dense, "scores");
  check_indices(dropped, "dropped", n);
  verify_rows(crow, col, columns);
  auto* const memory = new Workspace(dense.nbytes());
  const at::Tensor scores = at::from_blob(memory->as<void>(), {n}, [memory](void*) { delete memory; }, dense.options());
  AT_DISPATCH_FLOATING_TYPES(dense.scalar_type(), "growth_scores", [&] {
    const scalar_t* const from = dense.const_data_ptr<scalar_t>();
    scalar_t* const to = scores.mutable_data_ptr<scalar_t>();
    at::parallel_for(0, rows, 1 + (1 << 15) / std::max<int64_t>(1, columns), [&](int64_t begin, int64_t end) {
      for (int64_t r = begin; r < end; ++r) {
        for (int64_t i = r * columns; i < (r + 1) * columns; ++i) {
          const scalar_t x = std::abs(from[i]);
          to[i] = x == x ? x : -std::numeric_limits<scalar_t>::infinity();
        }
        exclude_rows(to, 0, n, crow.const_data_ptr<int32_t>(), col.const_data_ptr<int32_t>(), dropped, columns, r, r + 1);
      }
    });
  });
  return scores;
}

}  // namespace

TORCH_LIBRARY_IMPL(uasparse, CPU, m) {
  m.impl("prune_grow_", &prune_grow_);
  m.impl("exclude_kept_", &exclude_kept_);
  m.impl("growth_scores", &growth_scores);
}

}  // namespace uasparse
