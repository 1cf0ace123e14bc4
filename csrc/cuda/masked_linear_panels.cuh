// The walk of the unstructured products (masked_linear.cu) over panels of activations in shared memory: sizes of a tile,
// staging, windows of entries, and the loop itself, which hands every window to a consumer.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_pipeline_primitives.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "cuda/shared.cuh"

namespace uasparse {
namespace {

constexpr int kWarps = 16, kThreads = 32 * kWarps;
constexpr unsigned kAll = 0xffffffffu;

// The tile of V tokens a lane.
template <int V>
struct Tile {
  static constexpr int kRows = V == 4 ? 16 : 32;      // of a warp
  static constexpr int kGroup = kWarps * kRows;       // rows of a block
  static constexpr int kTokens = 32 * V;              // of a block, and words of a row of a panel
  static constexpr int kSpan = 32 / V;                // rows of a panel after which its swizzle repeats
  static constexpr int kPitch = kGroup + 1;           // of a matrix [kTokens, kGroup] in shared memory
};

// What the panels kernels walk over; made by the host.
struct Walk {
  const int32_t *offsets, *index;
  int64_t tokens;
  int nnz, rows, columns, groups, panels, panel_units;
  bool aligned_x;        // words of x can be copied
  bool aligned_entries;  // windows of index and values can be read by vector loads
  int32_t* slots;        // [groups, kGroup]: rows in the order of warps and their rows
  int32_t* order;        // [groups]: longest first
  int32_t* starts;       // [panels + 1, groups, kGroup]: where the row of a slot enters a panel
};

__device__ inline float to_float(float x) { return x; }
__device__ inline float to_float(__half x) { return __half2float(x); }
__device__ inline float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ inline void assign(float& to, float x) { to = x; }
__device__ inline void assign(__half& to, float x) { to = __float2half(x); }
__device__ inline void assign(__nv_bfloat16& to, float x) { to = __float2bfloat16(x); }

// An element of a word: `upper` is its index there, 0 for float.
template <typename T>
__device__ __forceinline__ float element(uint32_t word, int upper) {
  if constexpr (sizeof(T) == 4) {
    return __uint_as_float(word);
  } else if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    return __uint_as_float(__byte_perm(word, 0, 0x1044 + 0x2200 * upper));  // its bytes on top, zeros below
  } else {
    const uint16_t bits = static_cast<uint16_t>(upper ? word >> 16 : word);
    T x;
    memcpy(&x, &bits, sizeof x);
    return to_float(x);
  }
}

// Begins to copy words [first, first + units) of each token of a tile into panel [units, kTokens]; tokens that are not
// there become zeros. Token t of word k lies at (t / V ^ k % kSpan) * V + t % V: neither these writes, along k, nor the
// reads, along t, meet in a bank.
template <typename T, int V>
__device__ __forceinline__ void stage(uint32_t* panel, const Walk& walk, const T* x, int64_t stride, int64_t token0,
                                      int first, int units) {
  constexpr int kSpan = Tile<V>::kSpan, kTokens = Tile<V>::kTokens, kPer = 4 / sizeof(T);
  const int lane = threadIdx.x % 32, low = lane % kSpan, of = lane / kSpan;
  for (int quad = static_cast<int>(threadIdx.x) / 32; quad < 32; quad += kWarps) {
    const int64_t token = token0 + quad * V + of;
    const bool live = token < walk.tokens;
    const T* from = x + (live ? token * stride : 0) + (first + low) * kPer;
    uint32_t* to = panel + low * kTokens + (quad ^ low) * V + of;
    if (walk.aligned_x) {
      for (int k = low; k < units; k += kSpan, from += kSpan * kPer, to += kSpan * kTokens)
        __pipeline_memcpy_async(to, from, 4, live ? 0 : 4);
    } else {
      int left = walk.columns - (first + low) * kPer;
      for (int k = low; k < units; k += kSpan, from += kSpan * kPer, to += kSpan * kTokens, left -= kSpan * kPer) {
        uint32_t word = 0;
        if (live) memcpy(&word, from, sizeof(T));
        if (live && kPer == 2 && left > 1) {
          uint16_t upper;
          memcpy(&upper, from + 1, sizeof upper);
          word |= static_cast<uint32_t>(upper) << 16;
        }
        *to = word;
      }
    }
  }
}

// Four neighbouring entries, those past the end being zeros; kValues: with their values.
template <typename T, bool kValues>
struct Window {
  uint32_t columns[4];
  uint32_t values[sizeof(T)];

  static __device__ __forceinline__ Window load(const Walk& walk, const T* values, int at) {
    Window w;
    if (walk.aligned_entries && at <= walk.nnz - 4) {
      const auto wide = *reinterpret_cast<const Words<4>*>(walk.index + at);
#pragma unroll
      for (int j = 0; j < 4; ++j) w.columns[j] = wide.at[j];
      if constexpr (kValues) {
        const auto wide = *reinterpret_cast<const Words<sizeof(T)>*>(values + at);
#pragma unroll
        for (size_t i = 0; i < sizeof(T); ++i) w.values[i] = wide.at[i];
      }
    } else {
      T some[4] = {};
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        w.columns[j] = at + j < walk.nnz ? walk.index[at + j] : 0;
        if (kValues && at + j < walk.nnz) some[j] = values[at + j];
      }
      if constexpr (kValues) memcpy(w.values, some, sizeof some);
    }
    return w;
  }
};

// The activations of a column for the lane's tokens; `panel` is where the lane would find column 0. The swizzle of stage()
// is an exclusive or on the address, as rows of a panel lie on multiples of 128 bytes.
template <typename T, int V>
__device__ __forceinline__ void read_panel(SharedAddress panel, uint32_t column, float (&x)[V]) {
  constexpr uint32_t kPer = 4 / sizeof(T), kPitch = 4 * Tile<V>::kTokens, kSwizzle = 128 - 4 * V;
  const uint32_t unit = column / kPer;
  const Words<V> words = read_shared<V>((panel + static_cast<SharedAddress>(unit) * kPitch) ^ (unit * (4 * V) & kSwizzle));
#pragma unroll
  for (int v = 0; v < V; ++v) x[v] = element<T>(words.at[v], column % kPer);
}

// For each entry of a window that lies in [low, high): the whole window without a question each.
template <typename Each>
__device__ __forceinline__ void for_entries(int low, int high, Each each) {
  if (low <= 0 && high >= 4) {
#pragma unroll
    for (int j = 0; j < 4; ++j) each(j);
  } else {
#pragma unroll
    for (int j = 0; j < 4; ++j)
      if (j >= low && j < high) each(j);
  }
}

// Takes a tile of tokens through all panels. Shared memory: two panels.
template <typename T, int V, typename Consumer>
__device__ __forceinline__ void walk_panels(const Walk& walk, const T* x, int64_t stride, int group, int64_t token0,
                                            uint32_t* shared, Consumer& consumer) {
  constexpr int kRows = Tile<V>::kRows, kPer = 4 / sizeof(T);
  const int lane = threadIdx.x % 32, warp = static_cast<int>(threadIdx.x) / 32;
  const int units = (walk.columns + kPer - 1) / kPer, size = walk.panel_units * Tile<V>::kTokens;
  const int64_t slots = static_cast<int64_t>(walk.groups) * Tile<V>::kGroup;
  const int32_t* starts = walk.starts + group * Tile<V>::kGroup + warp * kRows + lane;
  const auto start_at = [&](int panel) { return lane < kRows ? starts[panel * slots] : 0; };
  const auto copy = [&](int panel) {
    const int first = panel * walk.panel_units;
    stage<T, V>(shared + panel % 2 * size, walk, x, stride, token0, first, min(walk.panel_units, units - first));
    __pipeline_commit();
  };
  copy(0);
  int begins = start_at(0);
  for (int panel = 0; panel < walk.panels; ++panel) {
    const int ends = start_at(panel + 1);
    __pipeline_wait_prior(0);
    __syncthreads();  // this panel is there, and nobody is in the one before it
    if (panel + 1 < walk.panels) copy(panel + 1);
    // An address below shared memory, but for the columns of this panel.
    const SharedAddress words = shared_address(shared + panel % 2 * size + lane * V) -
                                static_cast<SharedAddress>(panel * walk.panel_units) * (4 * Tile<V>::kTokens);
    int begin = __shfl_sync(kAll, begins, 0), end = __shfl_sync(kAll, ends, 0), at = begin & ~3;
    auto window = consumer.load(at);
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const int next_begin = r + 1 < kRows ? __shfl_sync(kAll, begins, r + 1) : 0;
      const int next_end = r + 1 < kRows ? __shfl_sync(kAll, ends, r + 1) : 0;
      do {  // once where a row is empty, for the next row's first window
        const auto now = window;
        window = consumer.load(at + 4 < end ? at + 4 : next_begin & ~3);
        consumer.use(r, now, at, begin, end, words);
        at += 4;
      } while (at < end);
      begin = next_begin;
      end = next_end;
      at = begin & ~3;
    }
    begins = ends;
  }
  __syncthreads();  // the shared memory is free
}

// The rows of a warp, counted from the first of its group: that of its row r in lane r.
template <int V>
__device__ __forceinline__ int rows_in_group(const Walk& walk, int group) {
  const int lane = threadIdx.x % 32, warp = static_cast<int>(threadIdx.x) / 32, first = group * Tile<V>::kGroup;
  return lane < Tile<V>::kRows ? walk.slots[first + warp * Tile<V>::kRows + lane] - first : 0;
}

// Between registers of the warps and a matrix in memory, rows of the group contiguous, by way of shared memory
// [kTokens, kPitch], where token t lies at t % V * 32 + t / V.
template <int V, typename Move>
__device__ __forceinline__ void move_tile(const Walk& walk, int group, int64_t token0, Move move) {
  const int lane = threadIdx.x % 32, warp = static_cast<int>(threadIdx.x) / 32, first = group * Tile<V>::kGroup;
  for (int i = warp; i < Tile<V>::kTokens; i += kWarps) {
    const int64_t token = token0 + i % 32 * V + i / 32;
    for (int k = lane; k < Tile<V>::kGroup; k += 32)
      move(i * Tile<V>::kPitch + k, token, first + k, token < walk.tokens && first + k < walk.rows);
  }
}

}  // namespace
}  // namespace uasparse
