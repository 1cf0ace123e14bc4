// prune_grow_ and exclude_kept_ in CUDA. Every thread finds what becomes of its own entry by binary search in the two
// ascending lists of blocks, dropped and grown, so that nothing is ever counted on the host.

#undef NDEBUG  // blocks that do not fit the topology stop the kernel
#include "cuda/prune_grow.h"

#include <cassert>
#include <cmath>

#include "cuda/launch.cuh"

namespace uasparse {
namespace {

constexpr int kThreads = 256;

struct Wide {
  uint64_t parts[2];
};

// The first place in [0, n) whose value is not less than (or: greater than) x, else n.
template <typename T>
__device__ inline int64_t lower_bound(const T* values, int64_t n, int64_t x) {
  int64_t low = 0;
  while (low < n) {
    const int64_t middle = (low + n) / 2;
    if (values[middle] < x) low = middle + 1;
    else n = middle;
  }
  return low;
}
template <typename T>
__device__ inline int64_t upper_bound(const T* values, int64_t n, int64_t x) {
  return lower_bound(values, n, x + 1);
}

__device__ inline bool contains(const int64_t* values, int64_t n, int64_t x) {
  const int64_t at = lower_bound(values, n, x);
  return at < n && values[at] == x;
}

__device__ inline int64_t thread_index() { return static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; }

// Number of active blocks before `block`: its place in packed order if it is active.
__device__ inline int64_t place_of(const Topology& t, int64_t block, bool* is_active) {
  const int64_t row = block / t.columns, begin = t.crow[row], n = t.crow[row + 1] - begin;
  const int64_t at = lower_bound(t.col + begin, n, block % t.columns);
  *is_active = at < n && t.col[begin + at] == block % t.columns;
  return begin + at;
}

__global__ void plan_kernel(Topology topology, Change change) {
  const int64_t j = thread_index();
  if (j >= change.k) return;
  const int64_t out = change.dropped[j], in = change.grown[j], total = topology.rows * topology.columns;
  assert(out >= 0 && out < total && in >= 0 && in < total && "prune_grow_: block out of range");
  assert((j == 0 || (change.dropped[j - 1] < out && change.grown[j - 1] < in)) && "prune_grow_: blocks not ascending");
  bool is_active;
  change.from[j] = place_of(topology, out, &is_active);
  assert(is_active && "prune_grow_: dropped block not active");
  const int64_t place = place_of(topology, in, &is_active);
  const int64_t dropped_before = lower_bound(change.dropped, change.k, in);
  assert((!is_active || (dropped_before < change.k && change.dropped[dropped_before] == in)) &&
         "prune_grow_: grown block active and not dropped");
  change.to[j] = place - dropped_before + j;
}

__global__ void source_kernel(Topology topology, Change change) {
  const int64_t i = thread_index();
  if (i >= topology.blocks) return;
  const int64_t grown_before = lower_bound(change.to, change.k, i);
  if (grown_before < change.k && change.to[grown_before] == i) {
    const int64_t block = change.grown[grown_before];
    const int64_t at = lower_bound(change.dropped, change.k, block);
    const bool stays = at < change.k && change.dropped[at] == block;
    change.source[i] = stays ? static_cast<int32_t>(change.from[at]) : -1;
    change.new_col[i] = static_cast<int32_t>(block % topology.columns);
    return;
  }
  // The kept block of rank i - grown_before lies behind m dropped ones, those with from[m] - m <= rank.
  const int64_t rank = i - grown_before;
  int64_t low = 0, high = change.k;
  while (low < high) {
    const int64_t middle = (low + high) / 2;
    if (change.from[middle] - middle <= rank) low = middle + 1;
    else high = middle;
  }
  change.source[i] = static_cast<int32_t>(rank + low);
  change.new_col[i] = topology.col[rank + low];
}

__global__ void rows_kernel(Topology topology, Change change) {
  const int64_t r = thread_index();
  if (r > topology.rows) return;
  const int64_t end = r * topology.columns;
  const int64_t came = lower_bound(change.grown, change.k, end), left = lower_bound(change.dropped, change.k, end);
  topology.crow[r] += static_cast<int32_t>(came - left);
}

template <typename T>
__global__ void move_kernel(T* to, const T* from, const int32_t* source, int64_t count, int64_t size) {
  const int64_t i = thread_index();
  if (i >= count) return;
  const int32_t block = source[i / size];
  to[i] = block < 0 ? T{} : from[block * size + i % size];
}

__global__ void columns_kernel(Topology topology, const int32_t* sorted_col, const int64_t* sorted_place, int32_t* ccol,
                               int32_t* row, int32_t* perm) {
  const int64_t i = thread_index();
  if (i <= topology.columns) ccol[i] = static_cast<int32_t>(lower_bound(sorted_col, topology.blocks, i));
  if (i >= topology.blocks) return;
  const int64_t place = sorted_place[i];
  perm[i] = static_cast<int32_t>(place);
  row[i] = static_cast<int32_t>(upper_bound(topology.crow, topology.rows + 1, place) - 1);
}

template <typename T>
__global__ void zero_kernel(DenseTensor tensor, const int64_t* block_list, const int64_t* stay, int64_t count,
                            int64_t columns, int block_rows, int block_columns) {
  const int64_t i = thread_index(), size = static_cast<int64_t>(block_rows) * block_columns;
  if (i >= count * size) return;
  const int64_t block = block_list[i / size], y = i % size / block_columns, x = i % size % block_columns;
  if (contains(stay, count, block)) return;
  const int64_t row = block / columns, column = block % columns, position = column % tensor.positions;
  const int64_t offset = (row * block_rows + y) * tensor.stride[0] +
                         (column / tensor.positions * block_columns + x) * tensor.stride[1] +
                         position / tensor.width * tensor.stride[2] + position % tensor.width * tensor.stride[3];
  static_cast<T*>(tensor.data)[offset] = T{};
}

// A warp a row of the grid.
template <typename T>
__global__ void exclude_kernel(T* scores, int64_t first, int64_t n, Topology topology, const int64_t* dropped,
                               int64_t k) {
  const int64_t row = first / topology.columns + thread_index() / 32;
  if (row > (first + n - 1) / topology.columns) return;
  for (int64_t i = topology.crow[row] + threadIdx.x % 32; i < topology.crow[row + 1]; i += 32) {
    const int64_t block = row * topology.columns + topology.col[i];
    if (block >= first && block < first + n && !contains(dropped, k, block))
      scores[block - first] = static_cast<T>(NAN);
  }
}

int64_t blocks_for(int64_t threads) { return (threads + kThreads - 1) / kThreads; }

template <typename T>
cudaError_t move(void* values, void* scratch, const int32_t* source, int64_t count, int64_t size, cudaStream_t stream) {
  return launch(move_kernel<T>, blocks_for(count), kThreads, stream, static_cast<T*>(values),
                static_cast<const T*>(scratch), source, count, size);
}

}  // namespace

cudaError_t launch_change_rows(const Topology& topology, const Change& change, cudaStream_t stream) {
  UASPARSE_CUDA_TRY(launch(plan_kernel, blocks_for(change.k), kThreads, stream, topology, change));
  UASPARSE_CUDA_TRY(launch(source_kernel, blocks_for(topology.blocks), kThreads, stream, topology, change));
  UASPARSE_CUDA_TRY(launch(rows_kernel, blocks_for(topology.rows + 1), kThreads, stream, topology, change));
  return cudaMemcpyAsync(topology.col, change.new_col, sizeof(int32_t) * static_cast<size_t>(topology.blocks),
                         cudaMemcpyDeviceToDevice, stream);
}

cudaError_t launch_move_values(void* values, void* scratch, const int32_t* source, int64_t blocks, int64_t size,
                               int bytes, cudaStream_t stream) {
  const int64_t count = blocks * size;
  UASPARSE_CUDA_TRY(cudaMemcpyAsync(scratch, values, static_cast<size_t>(count) * static_cast<size_t>(bytes),
                                    cudaMemcpyDeviceToDevice, stream));
  switch (bytes) {
    case 1: return move<uint8_t>(values, scratch, source, count, size, stream);
    case 2: return move<uint16_t>(values, scratch, source, count, size, stream);
    case 4: return move<uint32_t>(values, scratch, source, count, size, stream);
    case 8: return move<uint64_t>(values, scratch, source, count, size, stream);
    case 16: return move<Wide>(values, scratch, source, count, size, stream);
    default: return cudaErrorInvalidValue;
  }
}

cudaError_t launch_write_columns(const Topology& topology, const int32_t* sorted_col, const int64_t* sorted_place,
                                 int32_t* ccol, int32_t* row, int32_t* perm, cudaStream_t stream) {
  const int64_t threads = topology.blocks > topology.columns ? topology.blocks : topology.columns + 1;
  return launch(columns_kernel, blocks_for(threads), kThreads, stream, topology, sorted_col, sorted_place, ccol, row,
                perm);
}

cudaError_t launch_zero_blocks(const DenseTensor& tensor, const int64_t* block_list, const int64_t* stay, int64_t count,
                               int64_t columns, int block_rows, int block_columns, cudaStream_t stream) {
  const int64_t blocks = blocks_for(count * block_rows * block_columns);
  const auto zero = [&](auto kernel) {
    return launch(kernel, blocks, kThreads, stream, tensor, block_list, stay, count, columns, block_rows,
                  block_columns);
  };
  switch (tensor.bytes) {
    case 1: return zero(zero_kernel<uint8_t>);
    case 2: return zero(zero_kernel<uint16_t>);
    case 4: return zero(zero_kernel<uint32_t>);
    case 8: return zero(zero_kernel<uint64_t>);
    case 16: return zero(zero_kernel<Wide>);
    default: return cudaErrorInvalidValue;
  }
}

cudaError_t launch_exclude_kept(void* scores, bool is_double, int64_t first, int64_t n, const Topology& topology,
                                const int64_t* dropped, int64_t k, cudaStream_t stream) {
  const int64_t rows = (first + n - 1) / topology.columns - first / topology.columns + 1;
  const auto exclude = [&](auto kernel, auto* data) {
    return launch(kernel, blocks_for(rows * 32), kThreads, stream, data, first, n, topology, dropped, k);
  };
  return is_double ? exclude(exclude_kernel<double>, static_cast<double*>(scores))
                   : exclude(exclude_kernel<float>, static_cast<float*>(scores));
}

}  // namespace uasparse
