// Launchers of prune_grow_ and exclude_kept_: raw device pointers, no torch. Blocks are flat indices into the grid.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace uasparse {

struct Topology {
  int32_t *crow, *col;  // [rows + 1], [blocks]
  int64_t rows, columns, blocks;
};

struct Change {
  const int64_t *dropped, *grown;  // [k], ascending
  int64_t k;
  int64_t *from, *to;  // scratch [k]: old places of the dropped blocks, new places of the grown ones
  int32_t* source;     // scratch [blocks]: the old place of every new block, -1 for one that was not active
  int32_t* new_col;    // scratch [blocks]
};

// Fills the scratch, and writes the new crow and col. Blocks that do not fit the topology stop the kernel.
cudaError_t launch_change_rows(const Topology& topology, const Change& change, cudaStream_t stream);

// Moves a packed tensor of `size` items of `bytes` (1, 2, 4, 8 or 16) a block; scratch is as large as the tensor.
cudaError_t launch_move_values(void* values, void* scratch, const int32_t* source, int64_t blocks, int64_t size,
                               int bytes, cudaStream_t stream);

// The order by columns of the new topology, where perm [blocks] sorts col stably and sorted_col is col in that order.
cudaError_t launch_write_columns(const Topology& topology, const int32_t* sorted_col, const int64_t* sorted_place,
                                 int32_t* ccol, int32_t* row, int32_t* perm, cudaStream_t stream);

// A dense-stored tensor; strides of sizes that it lacks are 0.
struct DenseTensor {
  void* data;
  int bytes;  // of an item
  int64_t stride[4], width, positions;  // kernel width, kernel height * width
};

// Zeroes the blocks of a list [count] that are not in `stay` [count]; both are ascending.
cudaError_t launch_zero_blocks(const DenseTensor& tensor, const int64_t* block_list, const int64_t* stay, int64_t count,
                               int64_t columns, int block_rows, int block_columns, cudaStream_t stream);

// scores [n] of the blocks from `first` on (float or double): those of active blocks that are not dropped become NaN.
cudaError_t launch_exclude_kept(void* scores, bool is_double, int64_t first, int64_t n, const Topology& topology,
                                const int64_t* dropped, int64_t k, cudaStream_t stream);

}  // namespace uasparse
