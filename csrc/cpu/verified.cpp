#include "cpu/verified.h"

#include <ATen/Parallel.h>

#include <algorithm>
#include <atomic>

#include "checks.h"
#include "cpu/remembered.h"

namespace uasparse {
namespace {

constexpr int64_t kGrain = 1 << 15;  // blocks that a thread checks at least

struct Good {};

// Runs `check`, unless these very tensors passed it before.
template <size_t N, typename Check>
void once(Remembered<N, Good>& verified, const Tensors<N>& tensors, int64_t limit, Check check) {
  verified.get(tensors, limit, [&] {
    check();
    return Good{};
  });
}

// Offsets [n + 1] rise from 0 to `blocks`.
void check_offsets(const int32_t* offsets, int64_t n, int64_t blocks, const char* name) {
  bool rises = offsets[0] == 0 && offsets[n] == blocks;
  for (int64_t i = 0; i < n; ++i) rises &= offsets[i] <= offsets[i + 1];
  TORCH_CHECK_VALUE(rises, "Expected ", name, " to rise from 0 to the number of active blocks, ", blocks,
                    ", got a pattern that is damaged, uninitialised or half replaced.");
}

// good(begin, end) for parts of [0, n), in parallel.
template <typename Good>
bool all_good(int64_t n, int64_t blocks, Good good) {
  std::atomic<bool> ok = true;
  at::parallel_for(0, n, std::max<int64_t>(1, kGrain * n / std::max<int64_t>(1, blocks)), [&](int64_t begin, int64_t end) {
    if (!good(begin, end)) ok = false;
  });
  return ok;
}

template <typename Index>
bool is_ascending(const int32_t* offsets, const Index* index, int64_t begin, int64_t end, int64_t limit) {
  for (int64_t r = begin; r < end; ++r) {
    const int64_t first = offsets[r], last = offsets[r + 1];
    if (first == last) continue;
    bool rises = static_cast<int64_t>(index[first]) >= 0 && static_cast<int64_t>(index[last - 1]) < limit;
    for (int64_t i = first + 1; i < last; ++i) rises &= index[i - 1] < index[i];
    if (!rises) return false;
  }
  return true;
}

template <typename Index>
void check_rows(const at::Tensor& crow, const at::Tensor& col, int64_t columns) {
  const int64_t rows = crow.size(0) - 1, blocks = col.size(0);
  const int32_t* offsets = crow.const_data_ptr<int32_t>();
  const auto* index = static_cast<const Index*>(col.const_data_ptr());
  check_offsets(offsets, rows, blocks, "crow");
  TORCH_CHECK_VALUE(all_good(rows, blocks, [=](int64_t begin, int64_t end) {
                      return is_ascending(offsets, index, begin, end, columns);
                    }),
                    "Expected the columns of each row to be distinct, ascending and in [0, ", columns,
                    "), got a pattern that is damaged, uninitialised or half replaced.");
}

void check_columns(const at::Tensor& crow_, const at::Tensor& col_, const at::Tensor& ccol_, const at::Tensor& row_,
                   const at::Tensor& perm_) {
  const int64_t rows = crow_.size(0) - 1, columns = ccol_.size(0) - 1, blocks = col_.size(0);
  const int32_t *crow = crow_.const_data_ptr<int32_t>(), *col = col_.const_data_ptr<int32_t>(),
                *ccol = ccol_.const_data_ptr<int32_t>(), *row = row_.const_data_ptr<int32_t>(),
                *perm = perm_.const_data_ptr<int32_t>();
  check_offsets(ccol, columns, blocks, "ccol");
  const bool good = all_good(columns, blocks, [=](int64_t begin, int64_t end) {
    if (!is_ascending(ccol, row, begin, end, rows)) return false;
    for (int64_t c = begin; c < end; ++c)
      for (int64_t i = ccol[c]; i < ccol[c + 1]; ++i)
        if (perm[i] < crow[row[i]] || perm[i] >= crow[row[i] + 1] || col[perm[i]] != c) return false;
    return true;
  });
  TORCH_CHECK_VALUE(good, "Expected ccol, row and perm to be the order by columns of the blocks that crow and col list by "
                    "rows, got those of another pattern, or damaged ones.");
}

}  // namespace

// The caches are never destroyed: a thread may still run an op when the process exits.

void verify_rows(const at::Tensor& crow, const at::Tensor& col, int64_t columns) {
  static auto* const verified = new Remembered<2, Good>;
  once<2>(*verified, {&col, &crow}, columns, [&] {
    if (col.scalar_type() == at::kShort)
      check_rows<uint16_t>(crow, col, columns);
    else
      check_rows<int32_t>(crow, col, columns);
  });
}

void verify_both(const at::Tensor& crow, const at::Tensor& col, const at::Tensor& ccol, const at::Tensor& row,
                 const at::Tensor& perm) {
  static auto* const verified = new Remembered<5, Good>;
  const int64_t columns = ccol.size(0) - 1;
  once<5>(*verified, {&col, &crow, &ccol, &row, &perm}, columns, [&] {
    verify_rows(crow, col, columns);
    check_columns(crow, col, ccol, row, perm);
  });
}

void check_blocks(const at::Tensor& blocks, const char* name, int64_t total) {
  TORCH_CHECK_TYPE(blocks.scalar_type() == at::kLong, "Expected int64 indices of the ", name, " blocks, got ",
                   blocks.scalar_type(), ".");
  TORCH_CHECK_VALUE(blocks.dim() == 1 && blocks.is_contiguous(), "Expected one contiguous row of ", name,
                    " blocks, got ", blocks.sizes(), ".");
  check_storage(blocks, name);
  static auto* const verified = new Remembered<1, Good>;
  once<1>(*verified, {&blocks}, total, [&] {
    const int64_t* index = blocks.const_data_ptr<int64_t>();
    for (int64_t j = 0; j < blocks.size(0); ++j)
      TORCH_CHECK_VALUE(index[j] >= 0 && index[j] < total && (j == 0 || index[j] > index[j - 1]), "Expected ", name,
                        " blocks to be distinct, ascending and in [0, ", total, "), got ", index[j], " at position ", j,
                        ".");
  });
}

}  // namespace uasparse
