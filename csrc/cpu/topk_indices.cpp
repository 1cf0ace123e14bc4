// topk_indices on the CPU: exact selection in about one pass over the scores, and no sort.
//
// 1. A sample brackets the threshold: better than `high` is selected, worse than `low` is not.
// 2. One pass over the scores at the speed of memory writes a bit a score, above the bracket or not, and collects the few
//    scores in the bracket as integer keys.
// 3. A radix histogram finds the exact threshold among the keys.
// 4. The bits, with the threshold applied, become ascending indices.
// Growth leaves blocks out, by bits too: they are neither above nor in the bracket.
// A bracket that misses (the counts of pass 2 tell) is replaced by one that holds everything; so the result is exact
// whatever the sample was. Threads share chunks of a fixed size: it does not depend on their number either.

#include "cpu/topk_indices.h"

#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <atomic>
#include <bit>
#include <cmath>
#include <functional>
#include <limits>
#include <mutex>
#include <optional>
#include <type_traits>
#include <vector>

#include "checks.h"
#include "cpu/bits.h"
#include "cpu/verified.h"
#include "cpu/workspace.h"

namespace uasparse {
namespace {

constexpr int64_t kChunkWords = 1024;  // of 64 scores each: a place in a chunk fits 16 bits
constexpr int64_t kBlockWords = 32;

struct Order {
  bool largest, magnitude;
};

template <typename T>
T preference(T score, Order order) {
  const T x = order.magnitude ? std::fabs(score) : score;
  return order.largest ? x : -x;
}

// A key rises with the preference; -0 and 0 are equal, and NaN is 0, below -inf.
uint32_t key_of(float x) {
  if (std::isnan(x)) return 0;
  const uint32_t bits = std::bit_cast<uint32_t>(x + 0.0f);
  return bits >> 31 ? ~bits : bits | (1u << 31);
}
uint64_t key_of(double x) {
  if (std::isnan(x)) return 0;
  const uint64_t bits = std::bit_cast<uint64_t>(x + 0.0);
  return bits >> 63 ? ~bits : bits | (uint64_t{1} << 63);
}

// The active blocks that stay, which growth leaves out: active ones that are not in `dropped`, by flat grid index.
struct Kept {
  const int32_t *crow, *col;
  int64_t columns;
  const int64_t *dropped, *dropped_end;

  // Sets the bits of those in [begin, end) in words of zeros; scratch has as many words, zeros as well.
  void mark(int64_t begin, int64_t end, uint64_t* words, uint64_t* scratch) const {
    for (int64_t r = begin / columns; r * columns < end; ++r) {
      const int32_t *first = col + crow[r], *last = col + crow[r + 1];
      const int64_t start = r * columns;
      if (start < begin) first = std::lower_bound(first, last, begin - start);
      if (start + columns > end) last = std::lower_bound(first, last, end - start);
      set_bits(first, last - first, begin - start, words);
    }
    const int64_t *first = std::lower_bound(dropped, dropped_end, begin), *last = std::lower_bound(first, dropped_end, end);
    set_bits(first, last - first, begin, scratch);
    for (int64_t w = 0; w < (end - begin + 63) / 64; ++w) words[w] &= ~scratch[w];
  }
};

struct Bracket {
  float low, high;
};

// Holds the rank-th best of n scores almost surely: four standard deviations of the sample's quantile to each side. Those
// with a bit in `excluded` (may be null) come last, as NaN does.
Bracket sample_bracket(const float* scores, int64_t n, int64_t rank, Order order, const uint64_t* excluded) {
  const int64_t size = std::clamp<int64_t>(n / 64, 1024, 32768);
  std::vector<float> sample(size);
  std::vector<int64_t> places(size);
  uint64_t state = 0x9e3779b97f4a7c15u;
  const uint64_t width = static_cast<uint64_t>((n << 16) / size);  // of `size` equal parts, in 2^-16; one draw from each
  for (int64_t i = 0; i < size; ++i) {
    state = state * 6364136223846793005u + 1442695040888963407u;
    places[i] = static_cast<int64_t>((i * width + (state >> 32) * width / (uint64_t{1} << 32)) >> 16);
  }
  for (int64_t i = 0; i < size; ++i) {
    __builtin_prefetch(scores + places[std::min(i + 32, size - 1)]);  // each is a cache miss
    const float x = preference(scores[places[i]], order);
    const bool out = excluded != nullptr && (excluded[places[i] / 64] >> (places[i] % 64) & 1);
    sample[i] = out || std::isnan(x) ? -std::numeric_limits<float>::infinity() : x;
  }
  const double quantile = static_cast<double>(rank) / n, middle = quantile * size;
  const double margin = 4 * std::sqrt(size * quantile * (1 - quantile)) + 1;
  const int64_t upper = static_cast<int64_t>(middle - margin), lower = static_cast<int64_t>(middle + margin) + 1;
  Bracket bracket{-std::numeric_limits<float>::infinity(), std::numeric_limits<float>::infinity()};
  if (upper > 0) {
    std::nth_element(sample.begin(), sample.begin() + upper, sample.end(), std::greater<>());
    bracket.high = sample[upper];
  }
  if (lower < size) {
    const auto rest = sample.begin() + std::max<int64_t>(upper, 0);
    std::nth_element(rest, sample.begin() + lower, sample.end(), std::greater<>());
    bracket.low = sample[lower];
  }
  return bracket;
}

template <typename Key>
struct Threshold {
  Key key;       // keys above are selected,
  int64_t ties;  // and the first so many equal to it
};

template <typename T>
class Selection {
  using Key = decltype(key_of(T()));
  struct Chunk {
    int64_t above = 0, maybe = 0, greater = 0, equal = 0;
  };

 public:
  Selection(const T* scores, int64_t n, Order order)
      : scores_(scores), n_(n), words_((n + 63) / 64), order_(order), bits_(8 * (words_ + kBlockWords)),
        above_(bits_.as<uint64_t>()), chunks_((words_ + kChunkWords - 1) / kChunkWords) {}

  // Leaves these out.
  void exclude(const Kept& kept) {
    excluded_bits_.emplace(8 * words_);
    excluded_ = excluded_bits_->as<uint64_t>();
    for_each_chunk([&](int64_t, int64_t begin, int64_t end) {
      const Workspace scratch(8 * kChunkWords);
      std::fill(excluded_ + begin, excluded_ + end, 0);
      std::fill_n(scratch.as<uint64_t>(), end - begin, 0);
      kept.mark(begin * 64, std::min(n_, end * 64), excluded_ + begin, scratch.as<uint64_t>());
    });
  }

  // How many may be selected.
  int64_t candidates() const { return excluded_ == nullptr ? n_ : n_ - count_bits(excluded_, words_); }

  // Writes the indices of the k best, ascending; 0 < k <= candidates().
  void run(int64_t k, int64_t* indices) {
    Entries few(chunks_.size(), kChunkWords * 8);
    if (bracketed(k, few)) {
      emit(few, k, indices);
    } else {
      Entries all(chunks_.size(), kChunkWords * 64);
      hold_all(all);
      emit(all, k, indices);
    }
  }

 private:
  // What is in the bracket: keys, and places in their chunk of scores. A chunk has room for `capacity` of them.
  struct Entries {
    Entries(size_t chunks, int64_t capacity)
        : capacity(capacity), memory(chunks * capacity * (sizeof(Key) + sizeof(uint16_t))), keys(memory.as<Key>()),
          places(reinterpret_cast<uint16_t*>(keys + chunks * capacity)) {}
    int64_t capacity;
    Workspace memory;
    Key* keys;
    uint16_t* places;
  };

  // False if the bracket misses the threshold, or holds too many.
  bool bracketed(int64_t k, Entries& entries) {
    if constexpr (std::is_same_v<T, float>) {
      if (n_ < 1 << 14 || k == n_) return false;
      const Bracket bracket = sample_bracket(scores_, n_, k, order_, excluded_);
      std::atomic<bool> fits = true;
      for_each_chunk([&](int64_t c, int64_t begin, int64_t end) {
        chunks_[c] = Chunk();
        // A block at a time: its scores are still in the L1 cache when those in the bracket are collected.
        for (int64_t w = begin; w < end && fits; w += kBlockWords)
          if (!classify(c, w, std::min(w + kBlockWords, end), begin, bracket, entries)) fits = false;
      });
      int64_t above = 0, maybe = 0;
      for (const Chunk& chunk : chunks_) {
        above += chunk.above;
        maybe += chunk.maybe;
      }
      return fits && above <= k && k <= above + maybe;
    }
    return false;
  }

  bool classify(int64_t c, int64_t begin, int64_t end, int64_t chunk_begin, Bracket bracket, Entries& entries) {
    uint64_t maybe[kBlockWords];
    const int64_t whole = std::min(end, n_ / 64);
    classify_scores(reinterpret_cast<const float*>(scores_) + begin * 64, (whole - begin) * 64, bracket.low,
                    bracket.high, order_.largest, order_.magnitude, above_ + begin, maybe);
    if (whole < end) {
      float last[64];
      std::fill_n(last, 64, std::numeric_limits<float>::quiet_NaN());
      std::copy(scores_ + whole * 64, scores_ + n_, last);
      classify_scores(last, 64, bracket.low, bracket.high, order_.largest, order_.magnitude, above_ + whole,
                      maybe + (whole - begin));
    }
    if (excluded_ != nullptr) {
      for (int64_t w = begin; w < end; ++w) {
        above_[w] &= ~excluded_[w];
        maybe[w - begin] &= ~excluded_[w];
      }
    }
    Chunk& chunk = chunks_[c];
    Key* keys = entries.keys + c * entries.capacity;
    uint16_t* places = entries.places + c * entries.capacity;
    chunk.above += count_bits(above_ + begin, end - begin);
    // Places first. Two are written whether they are there or not, which spares a mispredicted branch a word.
    int64_t count = chunk.maybe;
    for (int64_t w = begin; w < end; ++w) {
      if (count + 64 > entries.capacity) return false;
      const int64_t first = (w - chunk_begin) * 64;
      uint64_t bits = maybe[w - begin];
      places[count] = static_cast<uint16_t>(first + (std::countr_zero(bits) & 63));
      count += bits != 0;
      bits &= bits - 1;
      places[count] = static_cast<uint16_t>(first + (std::countr_zero(bits) & 63));
      count += bits != 0;
      for (bits &= bits - 1; bits != 0; bits &= bits - 1)
        places[count++] = static_cast<uint16_t>(first + std::countr_zero(bits));
    }
    const T* const scores = scores_ + chunk_begin * 64;
    for (int64_t i = chunk.maybe; i < count; ++i) keys[i] = key_of(preference(scores[places[i]], order_));
    chunk.maybe = count;
    return true;
  }

  void hold_all(Entries& entries) {
    for_each_chunk([&](int64_t c, int64_t begin, int64_t end) {
      const int64_t first = begin * 64, size = std::min(end * 64, n_) - first;
      std::fill(above_ + begin, above_ + end, 0);
      int64_t count = 0;
      for (int64_t i = 0; i < size; ++i) {
        if (excluded_ != nullptr && (excluded_[begin + i / 64] >> (i % 64) & 1)) continue;
        entries.keys[c * entries.capacity + count] = key_of(preference(scores_[first + i], order_));
        entries.places[c * entries.capacity + count++] = static_cast<uint16_t>(i);
      }
      chunks_[c] = {.maybe = count};
    });
  }

  void emit(const Entries& entries, int64_t k, int64_t* indices) {
    for (const Chunk& chunk : chunks_) k -= chunk.above;
    // With nothing left to choose the threshold is out of reach.
    Threshold<Key> threshold{std::numeric_limits<Key>::max(), 0};
    if (k > 0) threshold = find_threshold(entries, k);
    for_each_chunk([&](int64_t c, int64_t, int64_t) {
      const Key* keys = entries.keys + c * entries.capacity;
      for (int64_t i = 0; i < chunks_[c].maybe; ++i) {
        chunks_[c].greater += keys[i] > threshold.key;
        chunks_[c].equal += keys[i] == threshold.key;
      }
    });
    std::vector<int64_t> offset(chunks_.size() + 1, 0), ties(chunks_.size());
    for (size_t c = 0; c < chunks_.size(); ++c) {
      ties[c] = std::min(threshold.ties, chunks_[c].equal);
      threshold.ties -= ties[c];
      offset[c + 1] = offset[c] + chunks_[c].above + chunks_[c].greater + ties[c];
    }
    for_each_chunk([&](int64_t c, int64_t begin, int64_t end) {
      const Key* keys = entries.keys + c * entries.capacity;
      const uint16_t* places = entries.places + c * entries.capacity;
      int64_t ties_here = ties[c];
      for (int64_t i = 0; i < chunks_[c].maybe; ++i) {
        const bool equal = keys[i] == threshold.key, taken = keys[i] > threshold.key || (equal && ties_here > 0);
        ties_here -= equal;
        above_[begin + places[i] / 64] |= static_cast<uint64_t>(taken) << (places[i] % 64);
      }
      write_indices(above_ + begin, end - begin, begin * 64, indices + offset[c], indices + offset[c + 1]);
    });
  }

  // The key of the rank-th best entry (rank from 1), digit by digit from the top.
  Threshold<Key> find_threshold(const Entries& entries, int64_t rank) {
    Key prefix = 0, known = 0;
    for (int remaining = 8 * sizeof(Key); remaining > 0;) {
      const int width = std::min(11, remaining), shift = remaining - width;
      std::vector<int64_t> histogram(size_t{1} << width, 0);
      const Key digits = static_cast<Key>(histogram.size() - 1);
      std::mutex mutex;
      at::parallel_for(0, static_cast<int64_t>(chunks_.size()), 4, [&](int64_t first, int64_t last) {
        std::vector<int64_t> mine(histogram.size(), 0);
        for (int64_t c = first; c < last; ++c) {
          const Key* keys = entries.keys + c * entries.capacity;
          for (int64_t i = 0; i < chunks_[c].maybe; ++i)
            if ((keys[i] & known) == prefix) ++mine[keys[i] >> shift & digits];
        }
        const std::lock_guard<std::mutex> lock(mutex);
        for (size_t d = 0; d < mine.size(); ++d) histogram[d] += mine[d];
      });
      Key digit = digits;
      while (histogram[digit] < rank) rank -= histogram[digit--];
      prefix |= digit << shift;
      known |= digits << shift;
      remaining = shift;
    }
    return {prefix, rank};
  }

  // Calls visit(chunk, its first word, past its last word) in parallel.
  template <typename Visit>
  void for_each_chunk(Visit visit) {
    at::parallel_for(0, static_cast<int64_t>(chunks_.size()), 1, [&](int64_t first, int64_t last) {
      for (int64_t c = first; c < last; ++c) visit(c, c * kChunkWords, std::min(words_, (c + 1) * kChunkWords));
    });
  }

  const T* scores_;
  int64_t n_, words_;
  Order order_;
  Workspace bits_;
  uint64_t* above_;  // a bit a score: selected
  std::optional<Workspace> excluded_bits_;
  uint64_t* excluded_ = nullptr;
  std::vector<Chunk> chunks_;
};

at::Tensor topk_indices(const at::Tensor& scores, int64_t k, bool largest, bool magnitude) {
  TORCH_CHECK_VALUE(scores.dim() == 1, "Expected scores of one dimension, got ", scores.sizes(), ".");
  const int64_t n = scores.size(0);
  TORCH_CHECK_VALUE(k >= 0 && k <= n, "Expected k in [0, ", n, "], got ", k, ".");
  TORCH_CHECK_TYPE(at::isFloatingType(scores.scalar_type()), "Expected floating-point scores, got ",
                   scores.scalar_type(), ".");
  check_storage(scores, "scores");
  at::Tensor indices = at::empty({k}, at::kLong);
  if (k == 0) return indices;
  const at::ScalarType type = scores.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
  const at::Tensor source = scores.to(type).contiguous();
  AT_DISPATCH_FLOATING_TYPES(type, "topk_indices", [&] {
    Selection<scalar_t>(source.const_data_ptr<scalar_t>(), n, {largest, magnitude})
        .run(k, indices.mutable_data_ptr<int64_t>());
  });
  return indices;
}

// Layer after layer: each uses all threads.
std::vector<at::Tensor> topk_indices_many(at::TensorList scores, at::IntArrayRef k, bool largest, bool magnitude) {
  TORCH_CHECK_VALUE(scores.size() == k.size(), "Expected a k for each of ", scores.size(), " scores, got ", k.size(), ".");
  std::vector<at::Tensor> indices;
  for (size_t s = 0; s < scores.size(); ++s) indices.push_back(topk_indices(scores[s], k[s], largest, magnitude));
  return indices;
}

// Of unstructured patterns: the k largest magnitudes of all blocks but those that stay.
at::Tensor growth_indices(const at::Tensor& dense, int64_t k, const at::Tensor& crow, const at::Tensor& col,
                          const at::Tensor& dropped) {
  TORCH_CHECK_VALUE(crow.dim() == 1 && crow.size(0) >= 2, "growth_indices: expected crow of one dimension and at least "
                    "two entries, got ", crow.sizes(), ".");
  const int64_t rows = crow.size(0) - 1, n = dense.numel(), columns = n / rows;
  TORCH_CHECK_VALUE(dense.is_contiguous() && columns * rows == n,
                    "growth_indices: expected contiguous scores of ", rows, " rows, got sizes ", dense.sizes(), ".");
  TORCH_CHECK_TYPE(dense.scalar_type() == at::kFloat || dense.scalar_type() == at::kDouble,
                   "growth_indices: expected float32 or float64 scores, got ", dense.scalar_type(), ".");
  TORCH_CHECK_VALUE(dense.device() == crow.device() && dropped.device() == crow.device(),
                    "growth_indices: expected scores, pattern and dropped blocks on one device.");
  check_csr(crow, col, {rows, columns}, {1, 1});
  check_storage(dense, "scores");
  check_blocks(dropped, "dropped", n);
  verify_rows(crow, col, columns);
  const int64_t* const out = dropped.const_data_ptr<int64_t>();
  const Kept kept{crow.const_data_ptr<int32_t>(), col.const_data_ptr<int32_t>(), columns, out, out + dropped.size(0)};
  TORCH_CHECK_VALUE(k >= 0 && k <= n, "growth_indices: expected k in [0, ", n, "], got ", k, ".");
  at::Tensor indices = at::empty({k}, at::kLong);
  AT_DISPATCH_FLOATING_TYPES(dense.scalar_type(), "growth_indices", [&] {
    Selection<scalar_t> selection(dense.const_data_ptr<scalar_t>(), n, {true, true});
    selection.exclude(kept);
    TORCH_CHECK_VALUE(k <= selection.candidates(), "growth_indices: expected k in [0, ", selection.candidates(),
                      "], the inactive or dropped blocks, got ", k, ".");
    if (k > 0) selection.run(k, indices.mutable_data_ptr<int64_t>());
  });
  return indices;
}

template <typename T>
void mark_above(const T* scores, int64_t n, T threshold, uint64_t* above, uint64_t* scratch) {
  int64_t done = 0;
  if constexpr (std::is_same_v<T, float>) {
    done = n / 64 * 64;
    classify_scores(scores, done, threshold, threshold, true, false, above, scratch);
  }
  for (int64_t w = done / 64; w < (n + 63) / 64; ++w) {
    above[w] = 0;
    for (int64_t i = w * 64; i < std::min(n, w * 64 + 64); ++i)
      above[w] |= static_cast<uint64_t>(scores[i] > threshold) << (i % 64);
  }
}

// The indices of scores above a threshold, ascending; NaN is not above anything.
at::Tensor indices_above(const at::Tensor& scores, double threshold) {
  TORCH_CHECK_VALUE(scores.dim() == 1 && scores.is_contiguous(), "Expected contiguous scores of one dimension, got ",
                    scores.sizes(), ".");
  check_storage(scores, "scores");
  const int64_t n = scores.size(0), words = (n + 63) / 64;
  const Workspace memory(16 * words);
  uint64_t* const above = memory.as<uint64_t>();
  AT_DISPATCH_FLOATING_TYPES(scores.scalar_type(), "indices_above", [&] {
    mark_above(scores.const_data_ptr<scalar_t>(), n, static_cast<scalar_t>(threshold), above, above + words);
  });
  at::Tensor indices = at::empty({count_bits(above, words)}, at::kLong);
  int64_t* const to = indices.mutable_data_ptr<int64_t>();
  write_indices(above, words, 0, to, to + indices.size(0));
  return indices;
}

}  // namespace

TORCH_LIBRARY_IMPL(uasparse, CPU, m) {
  m.impl("growth_indices", &growth_indices);
  m.impl("indices_above", &indices_above);
  m.impl("topk_indices", &topk_indices);
  m.impl("topk_indices_many", &topk_indices_many);
}

}  // namespace uasparse
