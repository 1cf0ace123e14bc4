// Where the columns of each row of a pattern pass from one block of columns to the next: a list derived from the order that
// the pattern holds, made when it is first asked for and kept until the pattern changes.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <memory>
#include <vector>

namespace uasparse {

// Entries [b * stride, (b + 1) * stride) are where block b of columns begins in each row; after the last block's, where rows
// end. A row's blocks in column block b are those from starts[b * stride + r] to starts[(b + 1) * stride + r].
struct Segments {
  int64_t blocks, stride;
  const int32_t* starts;
  std::shared_ptr<const std::vector<int32_t>> held;  // null where the offsets themselves serve
};

// offsets [rows + 1] and index [blocks], int32, were checked (verified.h). `column_block` columns go together.
Segments segments_of(const at::Tensor& offsets, const at::Tensor& index, int64_t columns, int64_t column_block);

}  // namespace uasparse
