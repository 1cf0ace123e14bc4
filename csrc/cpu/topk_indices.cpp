// topk_indices on the CPU: exact selection in about one pass over the scores, and no sort.
//
// 1. A sample brackets the threshold: better than `high` is selected, worse than `low` is not.
// 2. One pass over the scores at the speed of memory writes two bits a score: above the bracket, or in it ("maybe").
// 3. The few scores in the bracket become integer keys, and a radix histogram finds the exact threshold among them.
// 4. The bits, with the threshold applied, become ascending indices.
// A bracket that misses (the counts of pass 2 tell) is replaced by one that holds everything; so the result is exact
// whatever the sample was. Threads share chunks of a fixed size: it does not depend on their number either.

#include "topk_indices.h"

#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <functional>
#include <limits>
#include <memory>
#include <mutex>
#include <vector>

namespace uasparse {
namespace {

constexpr int64_t kChunkWords = 1024;  // of 64 scores each

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

struct Bracket {
  float low, high;
};

// Holds the rank-th best of n scores almost surely: five standard deviations of the sample's quantile to each side.
Bracket sample_bracket(const float* scores, int64_t n, int64_t rank, Order order) {
  const int64_t size = std::clamp<int64_t>(n / 64, 1024, 32768);
  std::vector<float> sample(size);
  uint64_t state = 0x9e3779b97f4a7c15u;
  for (int64_t i = 0; i < size; ++i) {
    state = state * 6364136223846793005u + 1442695040888963407u;  // one draw from each of `size` equal parts
    const int64_t begin = i * n / size, end = (i + 1) * n / size;
    const float x = preference(scores[begin + static_cast<int64_t>(state >> 33) % (end - begin)], order);
    sample[i] = std::isnan(x) ? -std::numeric_limits<float>::infinity() : x;
  }
  const double quantile = static_cast<double>(rank) / n, middle = quantile * size;
  const double margin = 5 * std::sqrt(size * quantile * (1 - quantile)) + 1;
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

// The rank-th largest key (rank from 1), digit by digit from the top.
template <typename Key>
Threshold<Key> find_threshold(const Key* keys, int64_t count, int64_t rank) {
  Key prefix = 0, known = 0;
  for (int remaining = 8 * sizeof(Key); remaining > 0;) {
    const int width = std::min(11, remaining), shift = remaining - width;
    std::vector<int64_t> histogram(size_t{1} << width, 0);
    std::mutex mutex;
    at::parallel_for(0, count, 1 << 18, [&](int64_t begin, int64_t end) {
      std::vector<int64_t> mine(histogram.size(), 0);
      const Key digits = static_cast<Key>(mine.size() - 1);
      for (int64_t i = begin; i < end; ++i)
        if ((keys[i] & known) == prefix) ++mine[keys[i] >> shift & digits];
      const std::lock_guard<std::mutex> lock(mutex);
      for (size_t d = 0; d < mine.size(); ++d) histogram[d] += mine[d];
    });
    Key digit = static_cast<Key>(histogram.size() - 1);
    while (histogram[digit] < rank) rank -= histogram[digit--];
    prefix |= digit << shift;
    known |= static_cast<Key>(histogram.size() - 1) << shift;
    remaining = shift;
  }
  return {prefix, rank};
}

template <typename T>
class Selection {
  using Key = decltype(key_of(T()));
  struct Chunk {
    int64_t above = 0, maybe = 0, greater = 0, equal = 0;
  };

 public:
  Selection(const T* scores, int64_t n, Order order)
      : scores_(scores), n_(n), words_((n + 63) / 64), order_(order), above_(new uint64_t[words_]),
        maybe_(new uint64_t[words_]), chunks_((words_ + kChunkWords - 1) / kChunkWords) {}

  // Writes the indices of the k best, ascending; 0 < k <= n.
  void run(int64_t k, int64_t* indices) {
    if (!bracketed(k)) hold_all();
    std::vector<int64_t> key_offset(chunks_.size() + 1, 0);
    int64_t above = 0;
    for (size_t c = 0; c < chunks_.size(); ++c) {
      above += chunks_[c].above;
      key_offset[c + 1] = key_offset[c] + chunks_[c].maybe;
    }
    const std::unique_ptr<Key[]> keys(new Key[key_offset.back()]);
    collect_keys(keys.get(), key_offset);
    // With nothing left to choose the threshold is out of reach.
    Threshold<Key> threshold{std::numeric_limits<Key>::max(), 0};
    if (k > above) threshold = find_threshold(keys.get(), key_offset.back(), k - above);
    emit(keys.get(), key_offset, threshold, indices);
  }

 private:
  bool bracketed(int64_t k) {
    if constexpr (std::is_same_v<T, float>) {
      if (n_ < 1 << 14 || k == n_) return false;
      const Bracket bracket = sample_bracket(scores_, n_, k, order_);
      for_each_chunk([&](int64_t c, int64_t begin, int64_t end) {
        classify(begin, end, bracket);
        Chunk chunk;
        for (int64_t w = begin; w < end; ++w) {
          chunk.above += std::popcount(above_[w]);
          chunk.maybe += std::popcount(maybe_[w]);
        }
        chunks_[c] = chunk;
      });
      int64_t above = 0, maybe = 0;
      for (const Chunk& chunk : chunks_) {
        above += chunk.above;
        maybe += chunk.maybe;
      }
      return above <= k && k <= above + maybe;
    }
    return false;
  }

  void classify(int64_t begin, int64_t end, Bracket bracket) {
    const int64_t whole = std::min(end, n_ / 64);
    classify_scores(reinterpret_cast<const float*>(scores_) + begin * 64, (whole - begin) * 64, bracket.low,
                    bracket.high, order_.largest, order_.magnitude, &above_[begin], &maybe_[begin]);
    if (whole < end) {
      float last[64];
      std::fill_n(last, 64, std::numeric_limits<float>::quiet_NaN());
      std::copy(scores_ + whole * 64, scores_ + n_, last);
      classify_scores(last, 64, bracket.low, bracket.high, order_.largest, order_.magnitude, &above_[whole],
                      &maybe_[whole]);
    }
  }

  void hold_all() {
    for_each_chunk([&](int64_t c, int64_t begin, int64_t end) {
      std::fill(&above_[begin], &above_[begin] + (end - begin), 0);
      std::fill(&maybe_[begin], &maybe_[begin] + (end - begin), ~uint64_t{0});
      if (end * 64 > n_) maybe_[end - 1] = ~uint64_t{0} >> (end * 64 - n_);
      chunks_[c] = {.maybe = std::min(end * 64, n_) - begin * 64};
    });
  }

  void collect_keys(Key* keys, const std::vector<int64_t>& offset) {
    for_each_chunk([&](int64_t c, int64_t begin, int64_t end) {
      Key* to = keys + offset[c];
      for (int64_t w = begin; w < end; ++w)
        for (uint64_t bits = maybe_[w]; bits != 0; bits &= bits - 1)
          *to++ = key_of(preference(scores_[w * 64 + std::countr_zero(bits)], order_));
    });
  }

  void emit(const Key* keys, const std::vector<int64_t>& key_offset, Threshold<Key> threshold, int64_t* indices) {
    for_each_chunk([&](int64_t c, int64_t, int64_t) {
      for (int64_t i = key_offset[c]; i < key_offset[c + 1]; ++i) {
        chunks_[c].greater += keys[i] > threshold.key;
        chunks_[c].equal += keys[i] == threshold.key;
      }
    });
    std::vector<int64_t> offset(chunks_.size() + 1, 0), ties(chunks_.size());
    int64_t ties_left = threshold.ties;
    for (size_t c = 0; c < chunks_.size(); ++c) {
      ties[c] = std::min(ties_left, chunks_[c].equal);
      ties_left -= ties[c];
      offset[c + 1] = offset[c] + chunks_[c].above + chunks_[c].greater + ties[c];
    }
    for_each_chunk([&](int64_t c, int64_t begin, int64_t end) {
      const Key* key = keys + key_offset[c];
      int64_t* to = indices + offset[c];
      int64_t ties_here = ties[c];
      for (int64_t w = begin; w < end; ++w) {
        uint64_t selected = above_[w];
        for (uint64_t bits = maybe_[w]; bits != 0; bits &= bits - 1, ++key)
          if (*key > threshold.key || (*key == threshold.key && ties_here-- > 0)) selected |= bits & -bits;
        for (; selected != 0; selected &= selected - 1) *to++ = w * 64 + std::countr_zero(selected);
      }
    });
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
  std::unique_ptr<uint64_t[]> above_, maybe_;
  std::vector<Chunk> chunks_;
};

at::Tensor topk_indices(const at::Tensor& scores, int64_t k, bool largest, bool magnitude) {
  TORCH_CHECK_VALUE(scores.dim() == 1, "Expected scores of one dimension, got ", scores.sizes(), ".");
  const int64_t n = scores.size(0);
  TORCH_CHECK_VALUE(k >= 0 && k <= n, "Expected k in [0, ", n, "], got ", k, ".");
  TORCH_CHECK_TYPE(at::isFloatingType(scores.scalar_type()), "Expected floating-point scores, got ",
                   scores.scalar_type(), ".");
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

}  // namespace

TORCH_LIBRARY_IMPL(uasparse, CPU, m) { m.impl("topk_indices", &topk_indices); }

}  // namespace uasparse
