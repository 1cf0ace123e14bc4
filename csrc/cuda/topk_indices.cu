// topk_indices in CUDA: exact selection in two passes over the scores, for many layers (segments) in one set of launches,
// without a sort and without a word to the host.
//
// Scores become unsigned keys that rise with the preference. A tile of 8192 scores is a block's work.
//   histogram   first pass: the keys' first digit (11 bits) is counted
//   pick        the digit in which the k-th best lies; what is above is selected
//   collect     second pass: a bit a score (above or not); keys with just that digit are collected, tile by tile in order,
//               and their second digit is counted
//   pick, then refine and pick for each further digit: only collected keys are read
//   count, scan what every tile contributes, and so where it writes
//   emit        bits and collected keys become ascending indices; of keys equal to the threshold the first ones
// All counts are integers, so the order of atomic additions does not matter: results are deterministic.

#include "cuda/topk_indices.h"

#include <type_traits>

#include "cuda/launch.cuh"

namespace uasparse {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int kTileWords = 256;  // of 32 scores
constexpr int kTile = kTileWords * 32;
constexpr int kDigitBits = 11;
constexpr int kBins = 1 << kDigitBits;
constexpr unsigned kAll = 0xffffffffu;

static_assert(kTileWords == kThreads, "emit gives a word to a thread");

template <typename T>
using KeyOf = std::conditional_t<std::is_same_v<T, double>, unsigned long long, unsigned>;

// Digits from the top; the last takes what is left.
template <typename Key>
constexpr int kRounds = (8 * static_cast<int>(sizeof(Key)) + kDigitBits - 1) / kDigitBits;

template <typename Key>
__device__ inline int shift_of(int round) {
  const int shift = 8 * static_cast<int>(sizeof(Key)) - (round + 1) * kDigitBits;
  return shift > 0 ? shift : 0;
}

template <typename Key>
__device__ inline unsigned digit_of(Key key, int round) {
  const int width = round + 1 < kRounds<Key> ? kDigitBits : 8 * static_cast<int>(sizeof(Key)) - round * kDigitBits;
  return static_cast<unsigned>(key >> shift_of<Key>(round)) & ((1u << width) - 1);
}

struct Segments {
  int count;
  bool largest, magnitude;
  TopkSegment segment[kTopkSegments];
  int first_tile[kTopkSegments + 1];
};

template <typename Key>
struct Choice {
  Key prefix;    // the threshold's digits so far; in the end the threshold
  unsigned rank;  // how many are wanted of the keys that share them
};

template <typename Key>
struct Work {
  unsigned* bins;  // [segments][rounds][kBins], zero at first
  Choice<Key>* choice;
  Key* keys;                  // [tiles][kTile]: collected
  unsigned short* places;     // [tiles][kTile]: where in the tile
  unsigned* above;            // [tiles][kTileWords]
  unsigned *collected, *greater, *equal;  // [tiles]
};

// A key rises with the preference; -0 and 0 are equal, and NaN is 0, below -inf.
__device__ inline unsigned key_of(float x) {
  if (x != x) return 0;
  const unsigned bits = __float_as_uint(x + 0.0f);
  return bits >> 31 ? ~bits : bits | 0x80000000u;
}
__device__ inline unsigned long long key_of(double x) {
  if (x != x) return 0;
  const unsigned long long bits = static_cast<unsigned long long>(__double_as_longlong(x + 0.0));
  return bits >> 63 ? ~bits : bits | 0x8000000000000000ull;
}

// The scores of a block's tile.
template <typename T>
struct Tile {
  const T* scores;
  int segment, count;
  bool largest, magnitude;

  __device__ Tile(const Segments& segments, int tile) : largest(segments.largest), magnitude(segments.magnitude) {
    int low = 0, high = segments.count;  // the last segment that begins at or before the tile
    while (high - low > 1) {
      const int middle = (low + high) / 2;
      if (segments.first_tile[middle] <= tile) low = middle;
      else high = middle;
    }
    segment = low;
    const int64_t begin = static_cast<int64_t>(tile - segments.first_tile[low]) * kTile;
    const int64_t left = segments.segment[low].n - begin;
    scores = static_cast<const T*>(segments.segment[low].scores) + begin;
    count = static_cast<int>(left < kTile ? left : kTile);
  }
  __device__ KeyOf<T> key(int i) const {
    const T score = scores[i], x = magnitude && score < 0 ? -score : score;
    return key_of(largest ? x : -x);
  }
};

// Exclusive prefix sum over the block's threads; total gets the sum. All threads call it.
__device__ inline unsigned scan_block(unsigned value, unsigned* total) {
  __shared__ unsigned warps[kWarps];
  const unsigned lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  unsigned inclusive = value;
  for (unsigned step = 1; step < 32; step *= 2) {
    const unsigned before = __shfl_up_sync(kAll, inclusive, step);
    if (lane >= step) inclusive += before;
  }
  __syncthreads();  // the last call's sums have been read
  if (lane == 31) warps[warp] = inclusive;
  __syncthreads();
  unsigned before = 0, all = 0;
  for (unsigned w = 0; w < kWarps; ++w) {
    if (w < warp) before += warps[w];
    all += warps[w];
  }
  *total = all;
  return before + inclusive - value;
}

template <typename T>
__global__ void __launch_bounds__(kThreads) histogram_kernel(Segments segments, Work<KeyOf<T>> work) {
  __shared__ unsigned bins[kBins];
  for (int d = threadIdx.x; d < kBins; d += kThreads) bins[d] = 0;
  __syncthreads();
  const Tile<T> tile(segments, static_cast<int>(blockIdx.x));
  for (int i = threadIdx.x; i < tile.count; i += kThreads) atomicAdd(&bins[digit_of(tile.key(i), 0)], 1u);
  __syncthreads();
  unsigned* all = work.bins + static_cast<int64_t>(tile.segment) * kRounds<KeyOf<T>> * kBins;
  for (int d = threadIdx.x; d < kBins; d += kThreads)
    if (bins[d] != 0) atomicAdd(&all[d], bins[d]);
}

// A block a segment: the largest digit such that at least `rank` keys have it or a larger one.
template <typename T>
__global__ void __launch_bounds__(kThreads) pick_kernel(Segments segments, Work<KeyOf<T>> work, int round) {
  using Key = KeyOf<T>;
  constexpr int kEach = kBins / kThreads;
  const int s = static_cast<int>(blockIdx.x), top = kBins - 1 - static_cast<int>(threadIdx.x) * kEach;
  const unsigned* bins = work.bins + (static_cast<int64_t>(s) * kRounds<Key> + round) * kBins;
  const Choice<Key> choice =
      round == 0 ? Choice<Key>{0, static_cast<unsigned>(segments.segment[s].k)} : work.choice[s];
  unsigned sum = 0, total;
  for (int i = 0; i < kEach; ++i) sum += bins[top - i];
  unsigned larger = scan_block(sum, &total);  // keys of larger digits than this thread's
  // scan_block's barriers lie between every thread's reading of the choice and the one write of it. With rank 0 nothing
  // is wanted: the first thread takes the largest key that there can be.
  if (choice.rank == 0) {
    if (threadIdx.x == 0) work.choice[s].rank = 0, work.choice[s].prefix = ~Key(0);
    return;
  }
  if (larger >= choice.rank || larger + sum < choice.rank) return;
  int digit = top;
  while (larger + bins[digit] < choice.rank) larger += bins[digit--];
  work.choice[s].prefix = choice.prefix | static_cast<Key>(digit) << shift_of<Key>(round);
  work.choice[s].rank = choice.rank - larger;
}

template <typename T>
__global__ void __launch_bounds__(kThreads) collect_kernel(Segments segments, Work<KeyOf<T>> work) {
  using Key = KeyOf<T>;
  constexpr int kWordsOfWarp = kTileWords / kWarps;
  static_assert(kWordsOfWarp == 32, "a lane keeps a word");
  const int64_t t = blockIdx.x;
  const Tile<T> tile(segments, static_cast<int>(t));
  const unsigned digit = digit_of(work.choice[tile.segment].prefix, 0);
  const int lane = threadIdx.x % 32, first_word = static_cast<int>(threadIdx.x) / 32 * kWordsOfWarp;
  unsigned maybe = 0, above = 0;  // of the warp's word `lane`
  for (int w = 0; w < kWordsOfWarp; ++w) {
    const int i = (first_word + w) * 32 + lane;
    const bool present = i < tile.count;
    const unsigned mine = present ? digit_of(tile.key(i), 0) : 0;
    const unsigned above_word = __ballot_sync(kAll, present && mine > digit);
    const unsigned maybe_word = __ballot_sync(kAll, present && mine == digit);
    if (lane == w) {
      above = above_word;
      maybe = maybe_word;
    }
  }
  work.above[t * kTileWords + first_word + lane] = above;
  unsigned collected, greater;
  const unsigned before = scan_block(__popc(maybe), &collected);
  scan_block(__popc(above), &greater);
  if (threadIdx.x == 0) {
    work.collected[t] = collected;
    work.greater[t] = greater;
  }
  unsigned* bins = work.bins + (static_cast<int64_t>(tile.segment) * kRounds<Key> + 1) * kBins;
  for (int w = 0; w < kWordsOfWarp; ++w) {
    const unsigned word = __shfl_sync(kAll, maybe, w), place = __shfl_sync(kAll, before, w);
    if (!(word >> lane & 1)) continue;
    const int i = (first_word + w) * 32 + lane;
    const int64_t to = t * kTile + place + __popc(word & ((1u << lane) - 1));
    const Key key = tile.key(i);
    work.keys[to] = key;
    work.places[to] = static_cast<unsigned short>(i);
    atomicAdd(&bins[digit_of(key, 1)], 1u);
  }
}

template <typename T>
__global__ void __launch_bounds__(kThreads) refine_kernel(Segments segments, Work<KeyOf<T>> work, int round) {
  using Key = KeyOf<T>;
  const int64_t t = blockIdx.x;
  const int segment = Tile<T>(segments, static_cast<int>(t)).segment;
  const Key prefix = work.choice[segment].prefix;
  const int known = shift_of<Key>(round - 1);
  unsigned* bins = work.bins + (static_cast<int64_t>(segment) * kRounds<Key> + round) * kBins;
  for (unsigned i = threadIdx.x; i < work.collected[t]; i += kThreads) {
    const Key key = work.keys[t * kTile + i];
    if (key >> known == prefix >> known) atomicAdd(&bins[digit_of(key, round)], 1u);
  }
}

template <typename T>
__global__ void __launch_bounds__(kThreads) count_kernel(Segments segments, Work<KeyOf<T>> work) {
  const int64_t t = blockIdx.x;
  const KeyOf<T> threshold = work.choice[Tile<T>(segments, static_cast<int>(t)).segment].prefix;
  unsigned greater = 0, equal = 0, total;
  for (unsigned i = threadIdx.x; i < work.collected[t]; i += kThreads) {
    const KeyOf<T> key = work.keys[t * kTile + i];
    greater += key > threshold;
    equal += key == threshold;
  }
  scan_block(greater, &total);
  if (threadIdx.x == 0) work.greater[t] += total;
  scan_block(equal, &total);
  if (threadIdx.x == 0) work.equal[t] = total;
}

// A block a segment: counts of tiles become sums over the tiles before.
template <typename T>
__global__ void __launch_bounds__(kThreads) scan_kernel(Segments segments, Work<KeyOf<T>> work) {
  unsigned greater_before = 0, equal_before = 0, total;
  for (int first = segments.first_tile[blockIdx.x]; first < segments.first_tile[blockIdx.x + 1]; first += kThreads) {
    const int t = first + static_cast<int>(threadIdx.x);
    const bool present = t < segments.first_tile[blockIdx.x + 1];
    const unsigned greater = present ? work.greater[t] : 0, equal = present ? work.equal[t] : 0;
    const unsigned greater_here = scan_block(greater, &total) + greater_before;
    greater_before += total;
    const unsigned equal_here = scan_block(equal, &total) + equal_before;
    equal_before += total;
    if (present) {
      work.greater[t] = greater_here;
      work.equal[t] = equal_here;
    }
  }
}

template <typename T>
__global__ void __launch_bounds__(kThreads) emit_kernel(Segments segments, Work<KeyOf<T>> work) {
  using Key = KeyOf<T>;
  __shared__ unsigned words[kTileWords];
  const int64_t t = blockIdx.x;
  const int segment = Tile<T>(segments, static_cast<int>(t)).segment;
  const Choice<Key> choice = work.choice[segment];
  const unsigned collected = work.collected[t], ties = choice.rank, equal_before = work.equal[t];
  words[threadIdx.x] = work.above[t * kTileWords + threadIdx.x];
  __syncthreads();
  unsigned tie = equal_before, total;
  for (unsigned first = 0; first < collected; first += kThreads) {
    const unsigned i = first + threadIdx.x;
    const Key key = i < collected ? work.keys[t * kTile + i] : 0;
    const bool equal = i < collected && key == choice.prefix;
    const unsigned rank = tie + scan_block(equal, &total);
    tie += total;
    if (i < collected && (key > choice.prefix || (equal && rank < ties))) {
      const unsigned place = work.places[t * kTile + i];
      atomicOr(&words[place / 32], 1u << place % 32);
    }
  }
  __syncthreads();
  unsigned word = words[threadIdx.x];
  const unsigned before = scan_block(__popc(word), &total);
  const unsigned ties_before = equal_before < ties ? equal_before : ties;
  int64_t* to = segments.segment[segment].indices + work.greater[t] + ties_before + before;
  const int64_t first = (t - segments.first_tile[segment]) * kTile + static_cast<int64_t>(threadIdx.x) * 32;
  for (; word != 0; word &= word - 1) *to++ = first + __ffs(word) - 1;
}

Segments segments_of(const TopkArguments& arguments) {
  Segments segments{};
  segments.count = arguments.segments;
  segments.largest = arguments.largest;
  segments.magnitude = arguments.magnitude;
  for (int s = 0; s < arguments.segments; ++s) {
    segments.segment[s] = arguments.segment[s];
    segments.first_tile[s + 1] =
        segments.first_tile[s] + static_cast<int>((arguments.segment[s].n + kTile - 1) / kTile);
  }
  return segments;
}

// Lays the arrays out one after another from `base`; returns the bytes they take.
template <typename Key>
size_t lay_out(const Segments& segments, char* base, Work<Key>* work, size_t* zero_bytes) {
  const size_t tiles = static_cast<size_t>(segments.first_tile[segments.count]);
  size_t at = 0;
  const auto take = [&](size_t bytes) {
    char* const here = base + at;
    at += (bytes + 15) / 16 * 16;
    return here;
  };
  work->bins = reinterpret_cast<unsigned*>(take(sizeof(unsigned) * segments.count * kRounds<Key> * kBins));
  *zero_bytes = at;
  work->choice = reinterpret_cast<Choice<Key>*>(take(sizeof(Choice<Key>) * segments.count));
  work->keys = reinterpret_cast<Key*>(take(sizeof(Key) * tiles * kTile));
  work->places = reinterpret_cast<unsigned short*>(take(sizeof(unsigned short) * tiles * kTile));
  work->above = reinterpret_cast<unsigned*>(take(sizeof(unsigned) * tiles * kTileWords));
  for (unsigned** counts : {&work->collected, &work->greater, &work->equal})
    *counts = reinterpret_cast<unsigned*>(take(sizeof(unsigned) * tiles));
  return at;
}

template <typename T>
cudaError_t run(const TopkArguments& arguments, void* workspace, cudaStream_t stream) {
  using Key = KeyOf<T>;
  const Segments segments = segments_of(arguments);
  const int tiles = segments.first_tile[segments.count];
  Work<Key> work;
  size_t zero_bytes;
  lay_out(segments, static_cast<char*>(workspace), &work, &zero_bytes);
  UASPARSE_CUDA_TRY(cudaMemsetAsync(workspace, 0, zero_bytes, stream));
  UASPARSE_CUDA_TRY(launch(histogram_kernel<T>, tiles, kThreads, stream, segments, work));
  UASPARSE_CUDA_TRY(launch(pick_kernel<T>, segments.count, kThreads, stream, segments, work, 0));
  UASPARSE_CUDA_TRY(launch(collect_kernel<T>, tiles, kThreads, stream, segments, work));
  UASPARSE_CUDA_TRY(launch(pick_kernel<T>, segments.count, kThreads, stream, segments, work, 1));
  for (int round = 2; round < kRounds<Key>; ++round) {
    UASPARSE_CUDA_TRY(launch(refine_kernel<T>, tiles, kThreads, stream, segments, work, round));
    UASPARSE_CUDA_TRY(launch(pick_kernel<T>, segments.count, kThreads, stream, segments, work, round));
  }
  UASPARSE_CUDA_TRY(launch(count_kernel<T>, tiles, kThreads, stream, segments, work));
  UASPARSE_CUDA_TRY(launch(scan_kernel<T>, segments.count, kThreads, stream, segments, work));
  return launch(emit_kernel<T>, tiles, kThreads, stream, segments, work);
}

}  // namespace

size_t topk_workspace_bytes(const TopkArguments& arguments) {
  const Segments segments = segments_of(arguments);
  size_t zero_bytes;
  Work<unsigned> narrow;
  Work<unsigned long long> wide;
  return arguments.is_double ? lay_out(segments, nullptr, &wide, &zero_bytes)
                             : lay_out(segments, nullptr, &narrow, &zero_bytes);
}

cudaError_t launch_topk(const TopkArguments& arguments, void* workspace, cudaStream_t stream) {
  return arguments.is_double ? run<double>(arguments, workspace, stream) : run<float>(arguments, workspace, stream);
}

}  // namespace uasparse
