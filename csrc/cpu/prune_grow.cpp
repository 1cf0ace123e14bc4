// prune_grow_ on the CPU: moves a weight, its states and its pattern to a new topology, in place and in linear time.
//
// A block that is dropped and grown again stays where and as it is. The new order of packed values
// is the old one without the dropped blocks, merged with the grown ones. As many are grown as dropped, so every array is first closed up over the dropped places (to the left) and then spread out to the grown
// ones (from the right), with no second copy. Where they are is said by two rows of bits, a bit a place: values are
// moved without a branch, which would be mispredicted at every second one. The order by columns is counted anew.

#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <torch/library.h>

#include <algorithm>
#include <bit>
#include <cstring>
#include <limits>
#include <span>
#include <vector>

#include "checks.h"
#include "cpu/bits.h"
#include "cpu/isa.h"
#include "cpu/topk_indices.h"
#include "cpu/verified.h"
#include "cpu/workspace.h"

namespace uasparse {
namespace {

struct Grid {
  const int32_t *crow, *col;
  int64_t rows, columns;
};

// A bit a place in packed order.
struct Bits {
  explicit Bits(int64_t size) : memory(8 * (size / 64 + 2)), words(memory.as<uint64_t>()) {}
  bool operator[](int64_t i) const { return words[i / 64] >> (i % 64) & 1; }
  uint64_t word(int64_t i) const { return words[i / 64]; }

  Workspace memory;
  uint64_t* words;
};

// Old places of the blocks that leave and new places of those that come, the blocks themselves (`count` of each), and where
// rows begin then.
struct Moves {
  Moves(int64_t blocks, int64_t rows, int64_t most)
      : dropped(blocks), grown(blocks + most), lists(2 * 8 * most), out(lists.as<int64_t>()), in(out + most),
        starts(rows + 1) {}  // plan() may have written all of `most` when it finds one to drop that is not active
  Bits dropped, grown;
  Workspace lists;
  int64_t *out, *in, count = 0;
  std::vector<int32_t> starts;
};

// The bits of `bits` where `mask` has one, side by side.
inline uint64_t extract_portable(uint64_t bits, uint64_t mask) {
  uint64_t found = 0;
  for (int i = 0; mask != 0; ++i, mask &= mask - 1) found |= (bits >> std::countr_zero(mask) & 1) << i;
  return found;
}

// One row's words: of the active blocks (`old`), and of those to drop and to grow, which become what leaves and comes.
// Returns false if they do not fit: what is to drop is active, and what is to grow is not, unless dropped.
template <typename Extract>
inline __attribute__((always_inline)) bool merge_row(const uint64_t* old, uint64_t* drop, uint64_t* grow, int64_t n,
                                                     BitWriter& dropped, BitWriter& grown, Extract extract) {
  uint64_t bad = 0;
  for (int64_t w = 0; w < n; ++w) {
    bad |= (drop[w] & ~old[w]) | (grow[w] & old[w] & ~drop[w]);
    const uint64_t gone = drop[w] & ~grow[w], fresh = grow[w] & ~old[w], now = (old[w] & ~gone) | fresh;
    dropped.append(extract(gone, old[w]), std::popcount(old[w]));
    grown.append(extract(fresh, now), std::popcount(now));
    drop[w] = gone;
    grow[w] = fresh;
  }
  return bad == 0;
}

bool merge_portable(const uint64_t* old, uint64_t* drop, uint64_t* grow, int64_t n, BitWriter& dropped, BitWriter& grown) {
  return merge_row(old, drop, grow, n, dropped, grown, extract_portable);
}

#if defined(__x86_64__)
__attribute__((target("bmi,bmi2,popcnt"))) bool merge_bmi2(const uint64_t* old, uint64_t* drop, uint64_t* grow, int64_t n,
                                                           BitWriter& dropped, BitWriter& grown) {
  return merge_row(old, drop, grow, n, dropped, grown,
                   [](uint64_t bits, uint64_t mask) __attribute__((target("bmi2"))) { return __builtin_ia32_pext_di(bits, mask); });
}
#endif

[[noreturn]] void refuse(const Grid& grid, int64_t r, const int64_t* out, int64_t left, const int64_t* in, int64_t came) {
  const int32_t *first = grid.col + grid.crow[r], *last = grid.col + grid.crow[r + 1];
  for (int64_t i = 0; i < left; ++i)
    TORCH_CHECK_VALUE(std::binary_search(first, last, static_cast<int32_t>(out[i] - r * grid.columns)),
                      "prune_grow_: expected active blocks to drop, got ", out[i], ", which is not active.");
  for (int64_t i = 0; i < came; ++i)
    TORCH_CHECK_VALUE(!std::binary_search(first, last, static_cast<int32_t>(in[i] - r * grid.columns)) ||
                          std::binary_search(out, out + left, in[i]),
                      "prune_grow_: expected inactive or dropped blocks to grow, got ", in[i],
                      ", which is active and not dropped.");
  TORCH_CHECK(false, "prune_grow_: row ", r, " does not fit its blocks.");
}

// Row by row, as bits: a walk along three ascending lists would mispredict at every block that leaves or comes.
void plan(const Grid& grid, const at::Tensor& dropped, const at::Tensor& grown, Moves& moves) {
#if defined(__x86_64__)
  const auto merge = cpu_isa() != Isa::portable && __builtin_cpu_supports("bmi2") ? merge_bmi2 : merge_portable;
#else
  const auto merge = merge_portable;
#endif
  const int64_t k = dropped.size(0), words = (grid.columns + 63) / 64;
  const int64_t *out = dropped.const_data_ptr<int64_t>(), *in = grown.const_data_ptr<int64_t>();
  const Workspace memory(3 * 8 * words);
  uint64_t *const old = memory.as<uint64_t>(), *const drop = old + words, *const grow = drop + words;
  BitWriter left_bits(moves.dropped.words), came_bits(moves.grown.words);
  int64_t left = 0, came = 0, gone = 0, fresh = 0;
  moves.starts[0] = 0;
  for (int64_t r = 0; r < grid.rows; ++r) {
    const int64_t first = r * grid.columns, left_before = left, came_before = came, blocks = grid.crow[r + 1] - grid.crow[r];
    while (left < k && out[left] < first + grid.columns) ++left;
    while (came < k && in[came] < first + grid.columns) ++came;
    std::fill_n(old, 3 * words, 0);
    set_bits(grid.col + grid.crow[r], blocks, 0, old);
    set_bits(out + left_before, left - left_before, first, drop);
    set_bits(in + came_before, came - came_before, first, grow);
    if (!merge(old, drop, grow, words, left_bits, came_bits))
      refuse(grid, r, out + left_before, left - left_before, in + came_before, came - came_before);
    const int64_t leave = count_bits(drop, words), come = count_bits(grow, words);
    write_indices(drop, words, first, moves.out + gone, moves.out + k);
    write_indices(grow, words, first, moves.in + fresh, moves.in + k);
    gone += leave;
    fresh += come;
    moves.starts[r + 1] = static_cast<int32_t>(grid.crow[r + 1] - gone + fresh);
  }
  moves.count = gone;
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
void zero_blocks(const at::Tensor& tensor, std::span<const int64_t> blocks, int64_t columns, at::IntArrayRef block) {
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
void write_rows(int32_t* crow, int32_t* col, int64_t blocks, int64_t rows, int64_t columns, const Moves& moves) {
  const Workspace memory(8 * moves.count);
  int64_t* const places = memory.as<int64_t>();
  write_indices(moves.grown.words, (blocks + 63) / 64, 0, places, places + moves.count);
  int64_t i = 0;
  for (int64_t r = 0; r < rows; ++r)
    for (const int64_t first = r * columns; i < moves.count && moves.in[i] < first + columns; ++i)
      col[places[i]] = static_cast<int32_t>(moves.in[i] - first);
  std::copy(moves.starts.begin(), moves.starts.end(), crow);
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
  check_blocks(dropped, "dropped", rows * columns);
  check_blocks(grown, "grown", rows * columns);
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
  Moves moves(blocks, rows, dropped.size(0));
  plan(grid, dropped, grown, moves);  // the last that can fail: nothing has changed yet
  if (moves.count == 0) return;
  at::parallel_for(0, static_cast<int64_t>(tensors.size()) + 1, 1, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      if (t == static_cast<int64_t>(tensors.size())) {
        move_packed(col, blocks, moves);
      } else if (packed) {
        move_packed(tensors[t], blocks, moves);
      } else {
        zero_blocks(tensors[t], {moves.out, static_cast<size_t>(moves.count)}, columns, block);
        zero_blocks(tensors[t], {moves.in, static_cast<size_t>(moves.count)}, columns, block);
      }
    }
  });
  write_rows(crow.mutable_data_ptr<int32_t>(), col.mutable_data_ptr<int32_t>(), blocks, rows, columns, moves);
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
  check_blocks(dropped, "dropped", rows * columns);
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

}  // namespace

TORCH_LIBRARY_IMPL(uasparse, CPU, m) {
  m.impl("prune_grow_", &prune_grow_);
  m.impl("exclude_kept_", &exclude_kept_);
}

}  // namespace uasparse
