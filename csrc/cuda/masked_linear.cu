// Products of activations X [tokens, columns] with an unstructured weight by rows (offsets, index, values), on CUDA cores.
//
// Every multiply-add needs an activation of its own, so that what bounds these kernels is the rate at which activations
// come out of shared memory: 128 bytes a clock and multiprocessor (docs/gpu-kernels.md). The tiling serves that:
//
// * A lane is V tokens (V = 4, 2 or 1), a warp 32 V of them, and holds one float for each of its R rows of the weight and
//   each token: sums of the product, or output gradients of the sampled product. A block of 16 warps thus covers 16 R
//   rows ("a group") by 32 V tokens ("a tile"), and reads each activation from the L2 cache once for all of these rows.
// * The columns pass by in panels. A panel is staged in shared memory, tokens side by side, by asynchronous 4-byte copies
//   that transpose as they go (X is read along its rows), while the last one is worked on. A word is one float, or two
//   neighbouring 16-bit columns of a token. An active entry costs one conflict-free vector load of shared memory; its
//   column and value come as 16-byte loads that are the same for all lanes, read one window of four ahead.
// * Rows are dealt to the warps of a block by length, longest first, to and fro, and groups are started longest first, so
//   that uneven rows idle no one for long. This, and where each row enters each panel, is worked out once a call by two
//   small kernels (assign, starts): nothing is kept between calls, and no order goes stale.
//
// The sampled product is the same walk: an entry's V products are added over the lanes by shuffles, four entries together,
// and over the tiles of tokens in a fixed order. Few groups: the tiles are split over blocks, whose parts are added in
// order. All sums are in float32, in an order that depends on sizes alone: results are the same in every run.
//
// Up to kFewTokens tokens a warp takes a row and its lanes the entries, which gather what they need.

#include "cuda/masked_linear.h"

#include <algorithm>

#include "cuda/launch.cuh"
#include "cuda/masked_linear_panels.cuh"

namespace uasparse {
namespace {

constexpr int kFewTokens = 16, kFewWarps = 8, kFewAtOnce = 8;
constexpr int kMaxSplits = 16;

// ---- Preparation: a block of kThreads a group ranks its rows by length, and the group among the groups. ----

template <int V>
__global__ void assign_kernel(Walk walk) {
  constexpr int kGroup = Tile<V>::kGroup;
  __shared__ int lengths[kGroup];
  __shared__ int before;
  const int group = static_cast<int>(blockIdx.x), first = group * kGroup, thread = static_cast<int>(threadIdx.x);
  if (thread == 0) before = 0;
  if (thread < kGroup) {
    const int row = first + thread;
    lengths[thread] = row < walk.rows ? walk.offsets[row + 1] - walk.offsets[row] : -1;
  }
  __syncthreads();
  const auto length_of = [&](int g) {
    return walk.offsets[min((g + 1) * kGroup, walk.rows)] - walk.offsets[g * kGroup];
  };
  const int length = length_of(group);
  for (int g = thread; g < walk.groups; g += kThreads)
    if (length_of(g) > length || (length_of(g) == length && g < group)) atomicAdd(&before, 1);
  if (thread < kGroup) {
    int rank = 0;
    for (int i = 0; i < kGroup; ++i)
      rank += lengths[i] > lengths[thread] || (lengths[i] == lengths[thread] && i < thread);
    const int turn = rank / kWarps, warp = turn % 2 ? kWarps - 1 - rank % kWarps : rank % kWarps;
    walk.slots[first + warp * Tile<V>::kRows + turn] = first + thread;
  }
  __syncthreads();
  if (thread == 0) walk.order[before] = group;
}

__global__ void starts_kernel(Walk walk, int slots, int columns_a_panel) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= static_cast<int64_t>(walk.panels + 1) * slots) return;
  const int row = walk.slots[i % slots];
  const int64_t column = i / slots * columns_a_panel;
  int low = 0, high = 0;
  if (row < walk.rows) {
    low = walk.offsets[row];
    high = walk.offsets[row + 1];
    if (i / slots == walk.panels) low = high;
  }
  while (low < high) {
    const int middle = low + (high - low) / 2;
    if (walk.index[middle] < column) low = middle + 1;
    else high = middle;
  }
  walk.starts[i] = low;
}

// ---- The products ----

// Sums of the product. Entries at [begin, end) of a window that begins at `at` are added to row r.
template <typename T, int V>
struct Sums {
  static constexpr int kRows = Tile<V>::kRows;
  using Entries = Window<T, true>;
  const Walk& walk;
  const T* values;
  float acc[kRows][V];

  __device__ __forceinline__ Sums(const Walk& walk, const T* values) : walk(walk), values(values) {
#pragma unroll
    for (int r = 0; r < kRows; ++r)
#pragma unroll
      for (int v = 0; v < V; ++v) acc[r][v] = 0;
  }
  __device__ __forceinline__ Entries load(int at) const { return Entries::load(walk, values, at); }
  __device__ __forceinline__ void use(int r, const Entries& w, int at, int begin, int end, SharedAddress panel) {
    constexpr int kPer = 4 / sizeof(T);
    for_entries(begin - at, end - at, [&](int j) {
      float x[V];
      read_panel<T, V>(panel, w.columns[j], x);
      const float value = element<T>(w.values[j / kPer], j % kPer);
#pragma unroll
      for (int v = 0; v < V; ++v) acc[r][v] += value * x[v];
    });
  }
};

// Products of the sampled product: what row r of the output gradients gives at a window's entries goes to, or is added to,
// part [nnz].
template <typename T, int V>
struct Samples {
  static constexpr int kRows = Tile<V>::kRows;
  using Entries = Window<T, false>;
  const Walk& walk;
  float* part;
  bool is_first;
  float dy[kRows][V];

  __device__ __forceinline__ Samples(const Walk& walk, float* part) : walk(walk), part(part), is_first(true) {}
  __device__ __forceinline__ Entries load(int at) const { return Entries::load(walk, nullptr, at); }
  __device__ __forceinline__ void use(int r, const Entries& w, int at, int begin, int end, SharedAddress panel) {
    if (begin >= end) return;
    const int lane = threadIdx.x % 32, mine = at + lane / 8;
    const bool writes = lane % 8 == 0 && mine >= begin && mine < end;
    const float old = writes && !is_first ? part[mine] : 0.0f;
    float sums[4] = {};
    for_entries(begin - at, end - at, [&](int j) {
      float x[V];
      read_panel<T, V>(panel, w.columns[j], x);
#pragma unroll
      for (int v = 0; v < V; ++v) sums[j] += dy[r][v] * x[v];
    });
    // Over the lanes: halves of the warp take two entries each, quarters one, and then its eight lanes add up.
    const bool high = lane & 16, odd = lane & 8;
    const float a = (high ? sums[2] : sums[0]) + __shfl_xor_sync(kAll, high ? sums[0] : sums[2], 16);
    const float b = (high ? sums[3] : sums[1]) + __shfl_xor_sync(kAll, high ? sums[1] : sums[3], 16);
    float sum = (odd ? b : a) + __shfl_xor_sync(kAll, odd ? a : b, 8);
    sum += __shfl_xor_sync(kAll, sum, 4);
    sum += __shfl_xor_sync(kAll, sum, 2);
    sum += __shfl_xor_sync(kAll, sum, 1);
    if (writes) part[mine] = old + sum;
  }
};

template <typename T, int V>
__global__ void __launch_bounds__(kThreads, 1)
    product_kernel(Walk walk, const T* x, int64_t stride_x, const T* values, const T* bias, T* y, int64_t stride_y) {
  UASPARSE_DYNAMIC_SHARED(uint32_t, shared);
  const int lane = threadIdx.x % 32, group = walk.order[blockIdx.x % walk.groups];
  const int64_t token0 = static_cast<int64_t>(blockIdx.x / walk.groups) * Tile<V>::kTokens;
  Sums<T, V> sums(walk, values);
  walk_panels<T, V>(walk, x, stride_x, group, token0, shared, sums);
  float* const tile = reinterpret_cast<float*>(shared);
  const int rows = rows_in_group<V>(walk, group);
#pragma unroll
  for (int r = 0; r < Tile<V>::kRows; ++r) {
    float* const to = tile + lane * Tile<V>::kPitch + __shfl_sync(kAll, rows, r);
#pragma unroll
    for (int v = 0; v < V; ++v) to[v * 32 * Tile<V>::kPitch] = sums.acc[r][v];
  }
  __syncthreads();
  move_tile<V>(walk, group, token0, [&](int at, int64_t token, int row, bool live) {
    if (live) assign(y[token * stride_y + row], tile[at] + (bias == nullptr ? 0.0f : to_float(bias[row])));
  });
}

template <typename T, int V>
__global__ void __launch_bounds__(kThreads, 1)
    sampled_kernel(Walk walk, const T* x, int64_t stride_x, const T* dy, int64_t stride_dy, float* parts, int tiles,
                   int tiles_a_part) {
  UASPARSE_DYNAMIC_SHARED(uint32_t, shared);
  float* const tile = reinterpret_cast<float*>(shared);
  const int lane = threadIdx.x % 32, group = walk.order[blockIdx.x % walk.groups];
  const int split = static_cast<int>(blockIdx.x) / walk.groups, end = min((split + 1) * tiles_a_part, tiles);
  Samples<T, V> samples(walk, parts + static_cast<int64_t>(split) * walk.nnz);
  const int rows = rows_in_group<V>(walk, group);
  for (int i = split * tiles_a_part; i < end; ++i) {
    const int64_t token0 = static_cast<int64_t>(i) * Tile<V>::kTokens;
    move_tile<V>(walk, group, token0, [&](int at, int64_t token, int row, bool live) {
      tile[at] = live ? to_float(dy[token * stride_dy + row]) : 0.0f;
    });
    __syncthreads();
#pragma unroll
    for (int r = 0; r < Tile<V>::kRows; ++r) {
      const float* const from = tile + lane * Tile<V>::kPitch + __shfl_sync(kAll, rows, r);
#pragma unroll
      for (int v = 0; v < V; ++v) samples.dy[r][v] = from[v * 32 * Tile<V>::kPitch];
    }
    __syncthreads();
    walk_panels<T, V>(walk, x, stride_x, group, token0, shared, samples);
    samples.is_first = false;
  }
}

template <typename T>
__global__ void add_parts_kernel(const float* parts, int64_t count, int splits, T* out) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= count) return;
  float sum = 0;
  for (int s = 0; s < splits; ++s) sum += parts[s * count + i];
  assign(out[i], sum);
}

// ---- Few tokens: a warp a row, a lane an entry ----

template <typename T>
__global__ void few_product_kernel(Walk walk, const T* x, int64_t stride_x, const T* values, const T* bias, T* y,
                                   int64_t stride_y, int row_blocks) {
  const int lane = threadIdx.x % 32;
  const int row = static_cast<int>(blockIdx.x) % row_blocks * kFewWarps + static_cast<int>(threadIdx.x) / 32;
  const int64_t token0 = static_cast<int64_t>(blockIdx.x) / row_blocks * kFewAtOnce;
  if (row >= walk.rows) return;
  float acc[kFewAtOnce] = {};
  for (int i = walk.offsets[row] + lane; i < walk.offsets[row + 1]; i += 32) {
    const float value = to_float(values[i]);
    const T* const from = x + token0 * stride_x + walk.index[i];
#pragma unroll
    for (int t = 0; t < kFewAtOnce; ++t)
      if (token0 + t < walk.tokens) acc[t] += value * to_float(from[t * stride_x]);
  }
#pragma unroll
  for (int t = 0; t < kFewAtOnce; ++t) {
#pragma unroll
    for (int apart = 16; apart > 0; apart /= 2) acc[t] += __shfl_xor_sync(kAll, acc[t], apart);
    if (lane == t && token0 + t < walk.tokens)
      assign(y[(token0 + t) * stride_y + row], acc[t] + (bias == nullptr ? 0.0f : to_float(bias[row])));
  }
}

template <typename T>
__global__ void few_sampled_kernel(Walk walk, const T* x, int64_t stride_x, const T* dy, int64_t stride_dy, T* out) {
  const int row = static_cast<int>(blockIdx.x) * kFewWarps + static_cast<int>(threadIdx.x) / 32;
  if (row >= walk.rows) return;
  for (int i = walk.offsets[row] + threadIdx.x % 32; i < walk.offsets[row + 1]; i += 32) {
    float sum = 0;
    for (int64_t t = 0; t < walk.tokens; ++t)
      sum += to_float(dy[t * stride_dy + row]) * to_float(x[t * stride_x + walk.index[i]]);
    assign(out[i], sum);
  }
}

// ---- The host's part ----

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

struct Plan {
  int lane_tokens = 0, group_rows, panel_units, panels, splits = 1, shared_bytes;
  int64_t groups, tiles, tiles_a_part;
};

template <int V>
Plan plan_tile(const SparseProblem& p) {
  using Size = Tile<V>;
  const int64_t units = ceil_div(p.columns, p.type == ValueType::kFloat ? 1 : 2);
  int64_t panel = p.panel_units ? p.panel_units : p.shared_bytes / 2 / (4 * Size::kTokens);
  // Equal panels, as few as can be.
  panel = std::max<int64_t>(panel / Size::kSpan, 1) * Size::kSpan;
  panel = ceil_div(ceil_div(units, ceil_div(units, panel)), Size::kSpan) * Size::kSpan;
  Plan plan;
  plan.lane_tokens = V;
  plan.group_rows = Size::kGroup;
  plan.groups = ceil_div(p.rows, Size::kGroup);
  plan.tiles = plan.tiles_a_part = ceil_div(p.tokens, Size::kTokens);
  plan.panel_units = static_cast<int>(panel);
  plan.panels = static_cast<int>(ceil_div(units, panel));
  plan.shared_bytes = 4 * Size::kTokens * std::max(2 * plan.panel_units, Size::kPitch);
  return plan;
}

// Clocks of the whole by the roofline: what a block takes from shared memory (128 bytes a clock) or from the L2 cache
// (kL2Bytes a clock and multiprocessor), whichever is more, times the blocks that a multiprocessor gets.
double clocks(const SparseProblem& p, const Plan& plan, double reduction) {
  constexpr double kL2Bytes = 24;
  const double v = plan.lane_tokens, entries = static_cast<double>(p.nnz) / static_cast<double>(plan.groups);
  const double words = static_cast<double>(ceil_div(p.columns, p.type == ValueType::kFloat ? 1 : 2)) * v;
  // An entry: its activations, its share of a window of columns and values. A row in a panel: two shuffles, a window.
  const double shared = entries * (v + 0.5 + reduction) + 4.0 * plan.group_rows * plan.panels + words;
  return static_cast<double>(ceil_div(plan.groups * plan.tiles, p.processors)) * std::max(shared, words * 128 / kL2Bytes);
}

Plan make_plan(const SparseProblem& p, bool sampled) {
  Plan best;
  if (p.tokens <= kFewTokens && p.lane_tokens == 0) return best;
  for (const Plan& plan : {plan_tile<4>(p), plan_tile<2>(p), plan_tile<1>(p)}) {
    if (p.lane_tokens && plan.lane_tokens != p.lane_tokens) continue;
    const double reduction = sampled ? 1.5 : 0;
    if (best.lane_tokens == 0 || clocks(p, plan, reduction) < clocks(p, best, reduction)) best = plan;
  }
  if (!sampled) return best;
  // The parts that end first, by rounds of blocks times tiles in a block.
  int64_t least = INT64_MAX;
  for (int64_t parts = 1; parts <= std::min<int64_t>(kMaxSplits, best.tiles); ++parts) {
    const int64_t share = ceil_div(best.tiles, parts), rounds = ceil_div(best.groups * parts, p.processors) * share;
    if (rounds >= least) continue;
    least = rounds;
    best.tiles_a_part = share;
    best.splits = static_cast<int>(ceil_div(best.tiles, share));
  }
  return best;
}

size_t starts_count(const Plan& plan) {
  return static_cast<size_t>(plan.groups) * static_cast<size_t>(plan.group_rows) * static_cast<size_t>(plan.panels + 1);
}
size_t slots_count(const Plan& plan) {
  return static_cast<size_t>(plan.groups) * static_cast<size_t>(plan.group_rows);
}

Walk make_walk(const SparseProblem& p, const Plan& plan, const void* values, void* workspace) {
  const auto aligned = [](const void* at, size_t bytes) { return reinterpret_cast<uintptr_t>(at) % bytes == 0; };
  const size_t item = p.type == ValueType::kFloat ? 4 : 2;
  const auto even = [&](int64_t n) { return static_cast<size_t>(n) * item % 4 == 0; };
  Walk walk{};
  walk.offsets = p.offsets;
  walk.index = p.index;
  walk.nnz = static_cast<int>(p.nnz);
  walk.tokens = p.tokens;
  walk.rows = static_cast<int>(p.rows);
  walk.columns = static_cast<int>(p.columns);
  walk.aligned_x = aligned(p.x, 4) && even(p.stride_x) && even(p.columns);
  walk.aligned_entries = aligned(p.index, 16) && aligned(values, 4 * item);
  if (plan.lane_tokens == 0) return walk;
  walk.groups = static_cast<int>(plan.groups);
  walk.panels = plan.panels;
  walk.panel_units = plan.panel_units;
  walk.starts = static_cast<int32_t*>(workspace);
  walk.slots = walk.starts + starts_count(plan);
  walk.order = walk.slots + slots_count(plan);
  return walk;
}

template <int V>
cudaError_t prepare(const SparseProblem& p, const Plan& plan, const Walk& walk, cudaStream_t stream) {
  UASPARSE_CUDA_TRY(launch(assign_kernel<V>, plan.groups, kThreads, stream, walk));
  const int columns_a_panel = plan.panel_units * (p.type == ValueType::kFloat ? 1 : 2);
  return launch(starts_kernel, ceil_div(static_cast<int64_t>(starts_count(plan)), kThreads), kThreads, stream, walk,
                static_cast<int>(slots_count(plan)), columns_a_panel);
}

template <typename T>
cudaError_t product(const SparseProblem& p, const T* values, const T* bias, T* y, int64_t stride_y, void* workspace,
                    cudaStream_t stream) {
  const Plan plan = make_plan(p, false);
  const Walk walk = make_walk(p, plan, values, workspace);
  const T* const x = static_cast<const T*>(p.x);
  if (plan.lane_tokens == 0) {
    const int64_t row_blocks = ceil_div(p.rows, kFewWarps);
    return launch(few_product_kernel<T>, row_blocks * ceil_div(p.tokens, kFewAtOnce), 32 * kFewWarps, stream, walk, x,
                  p.stride_x, values, bias, y, stride_y, static_cast<int>(row_blocks));
  }
  const auto run = [&]<int V>(std::integral_constant<int, V>) {
    UASPARSE_CUDA_TRY(prepare<V>(p, plan, walk, stream));
    return launch_shared(product_kernel<T, V>, plan.groups * plan.tiles, kThreads, plan.shared_bytes, stream, walk, x,
                         p.stride_x, values, bias, y, stride_y);
  };
  switch (plan.lane_tokens) {
    case 1: return run(std::integral_constant<int, 1>());
    case 2: return run(std::integral_constant<int, 2>());
    default: return run(std::integral_constant<int, 4>());
  }
}

template <typename T>
cudaError_t sampled(const SparseProblem& p, const T* dy, int64_t stride_dy, T* out, void* workspace,
                    cudaStream_t stream) {
  const Plan plan = make_plan(p, true);
  const Walk walk = make_walk(p, plan, nullptr, workspace);
  const T* const x = static_cast<const T*>(p.x);
  if (plan.lane_tokens == 0)
    return launch(few_sampled_kernel<T>, ceil_div(p.rows, kFewWarps), 32 * kFewWarps, stream, walk, x, p.stride_x, dy,
                  stride_dy, out);
  // One part of floats is the result itself.
  const bool direct = std::is_same_v<T, float> && plan.splits == 1;
  float* const parts = direct ? reinterpret_cast<float*>(out) : reinterpret_cast<float*>(walk.order + plan.groups);
  const auto run = [&]<int V>(std::integral_constant<int, V>) {
    UASPARSE_CUDA_TRY(prepare<V>(p, plan, walk, stream));
    return launch_shared(sampled_kernel<T, V>, plan.groups * plan.splits, kThreads, plan.shared_bytes, stream, walk, x,
                         p.stride_x, dy, stride_dy, parts, static_cast<int>(plan.tiles),
                         static_cast<int>(plan.tiles_a_part));
  };
  switch (plan.lane_tokens) {
    case 1: UASPARSE_CUDA_TRY(run(std::integral_constant<int, 1>())); break;
    case 2: UASPARSE_CUDA_TRY(run(std::integral_constant<int, 2>())); break;
    default: UASPARSE_CUDA_TRY(run(std::integral_constant<int, 4>()));
  }
  if (direct) return cudaSuccess;
  return launch(add_parts_kernel<T>, ceil_div(p.nnz, kThreads), kThreads, stream, parts, p.nnz, plan.splits, out);
}

}  // namespace

size_t sparse_workspace_bytes(const SparseProblem& problem, bool is_sampled) {
  const Plan plan = make_plan(problem, is_sampled);
  if (plan.lane_tokens == 0) return 0;
  size_t words = starts_count(plan) + slots_count(plan) + static_cast<size_t>(plan.groups);
  if (is_sampled && (plan.splits > 1 || problem.type != ValueType::kFloat))
    words += static_cast<size_t>(plan.splits) * static_cast<size_t>(problem.nnz);
  return 4 * words;
}

cudaError_t launch_sparse_product(const SparseProblem& problem, const void* values, const void* bias, void* y,
                                  int64_t stride_y, void* workspace, cudaStream_t stream) {
  const auto run = [&]<typename T>(T) {
    return product(problem, static_cast<const T*>(values), static_cast<const T*>(bias), static_cast<T*>(y), stride_y,
                   workspace, stream);
  };
  switch (problem.type) {
    case ValueType::kFloat: return run(float{});
    case ValueType::kHalf: return run(__half{});
    default: return run(__nv_bfloat16{});
  }
}

cudaError_t launch_sampled_product(const SparseProblem& problem, const void* dy, int64_t stride_dy, void* out,
                                   void* workspace, cudaStream_t stream) {
  const auto run = [&]<typename T>(T) {
    return sampled(problem, static_cast<const T*>(dy), stride_dy, static_cast<T*>(out), workspace, stream);
  };
  switch (problem.type) {
    case ValueType::kFloat: return run(float{});
    case ValueType::kHalf: return run(__half{});
    default: return run(__nv_bfloat16{});
  }
}

}  // namespace uasparse
