#include "cpu/conv_lists.h"

#include <ATen/Parallel.h>
#include <unistd.h>

#include <algorithm>

#include "cpu/remembered.h"

namespace uasparse {
namespace {

constexpr int64_t kGrain = 1 << 14;  // nonzeros a thread sorts at least

// Calls visit(output channel, column, place in the weight's storage) for each weight of the output channels
// [begin, end), in their order; a column is channel * taps + tap.
template <typename Visit>
inline void for_each_weight(const ConvWeight& w, int64_t begin, int64_t end, Visit visit) {
  const int64_t columns = w.in * w.taps, bh = w.block_rows, bw = w.block_columns;
  for (int64_t o = begin; o < end; ++o) {
    const int64_t from = w.crow[o / bh], to = w.crow[o / bh + 1];
    if (w.unstructured()) {
      if (w.packed)
        for (int64_t i = from; i < to; ++i) visit(o, w.col[i], i);
      else
        for (int64_t i = from; i < to; ++i) visit(o, w.col[i], o * columns + w.col[i]);
      continue;
    }
    for (int64_t i = from; i < to; ++i) {
      const int64_t channel = w.col[i] / w.taps * bw, tap = w.col[i] % w.taps;
      for (int64_t x = 0; x < bw; ++x) {
        const int64_t column = (channel + x) * w.taps + tap;
        visit(o, column, w.packed ? (i * bh + o % bh) * bw + x : o * columns + column);
      }
    }
  }
}

// Of each column: value(channel, tap).
template <typename Value>
std::vector<int32_t> column_table(const ConvWeight& w, Value value) {
  std::vector<int32_t> table(w.in * w.taps);
  for (int64_t c = 0; c < w.in; ++c)
    for (int64_t k = 0; k < w.taps; ++k) table[c * w.taps + k] = int32_t(value(c, k));
  return table;
}

// Counts at [1, size) become the index of the first of each key.
void accumulate(std::vector<int32_t>& counts) {
  for (size_t i = 1; i < counts.size(); ++i) counts[i] += counts[i - 1];
}

int64_t rows_a_task(const ConvWeight& w) { return std::max<int64_t>(1, kGrain * w.out / std::max<int64_t>(1, w.nonzeros())); }

}  // namespace

// Of the first-level cache, for sources: all of a small one; of a larger one all but what results and entries take.
static int64_t l1_bytes() {
  constexpr int64_t kSmall = 32 << 10, kRest = 4 << 10;
#ifdef _SC_LEVEL1_DCACHE_SIZE
  static const int64_t bytes = std::max<int64_t>(kSmall, sysconf(_SC_LEVEL1_DCACHE_SIZE) - kRest);
  return bytes;
#else
  return kSmall;
#endif
}

int64_t channels_a_block(int64_t channel_bytes, double nonzeros_a_channel, int64_t channels, double least) {
  const int64_t fits = std::max<int64_t>(1, l1_bytes() / channel_bytes);
  const double wanted = nonzeros_a_channel > 0 ? least / nonzeros_a_channel : 1e9;
  const int64_t block = wanted > double(channels) ? channels : std::max(fits, int64_t(wanted) + 1);
  // Blocks of one size.
  const int64_t blocks = std::max<int64_t>(1, blocks_of(channels, block));
  return (channels + blocks - 1) / blocks;
}

namespace {

// Calls visit(block, begin, end) for the entries of output channel o, unstructured, whose source channels are in a block.
template <typename Visit>
inline void for_each_run(const ConvWeight& w, int64_t o, int64_t blocks, int64_t channels_a_block, Visit visit) {
  const int32_t *at = w.col + w.crow[o], *const end = w.col + w.crow[o + 1];
  for (int64_t b = 0; b < blocks; ++b) {
    const int32_t* const next =
        b + 1 == blocks ? end : std::lower_bound(at, end, int32_t((b + 1) * channels_a_block * w.taps));
    visit(b, at - w.col, next - w.col);
    at = next;
  }
}

}  // namespace

template <typename T>
ConvEntries<T>::ConvEntries(int64_t channels, int64_t blocks, int64_t segments, int64_t nonzeros)
    : channels(channels),
      blocks(blocks),
      segments(segments),
      first_(blocks * channels * segments + 1),
      memory_(std::make_unique<Workspace>(sizeof(ConvEntry<T>) * nonzeros)) {}

template <typename T>
template <typename Values>
ConvEntries<T> ConvEntries<T>::forward(const ConvWeight& w, const ConvTaps& taps, int64_t channels_a_block,
                                       Values values) {
  using Offset = decltype(ConvEntry<T>::offset);
  const int64_t segments = taps.segments;
  ConvEntries lists(w.out, blocks_of(w.in, channels_a_block), segments, w.nonzeros());
  const auto key = column_table(
      w, [&](int64_t c, int64_t k) { return c / channels_a_block * lists.channels * segments + taps.segment[k]; });
  const auto offset = column_table(w, [&](int64_t c, int64_t k) { return c * taps.channel + taps.offset[k]; });
  std::vector<int32_t>& first = lists.first_;
  ConvEntry<T>* const to = lists.memory_->template as<ConvEntry<T>>();
  if (w.unstructured() && segments == 1) {  // an output channel's entries of a block follow each other already
    const auto for_each = [&](auto visit) {
      at::parallel_for(0, w.out, rows_a_task(w), [&](int64_t begin, int64_t end) {
        for (int64_t o = begin; o < end; ++o)
          for_each_run(w, o, lists.blocks, channels_a_block,
                       [&](int64_t b, int64_t i, int64_t last) { visit(o, b * lists.channels + o, i, last); });
      });
    };
    for_each([&](int64_t, int64_t k, int64_t i, int64_t last) { first[k + 1] = int32_t(last - i); });
    accumulate(first);
    for_each([&](int64_t o, int64_t k, int64_t i, int64_t last) {
      const int64_t base = o / (w.out / w.groups) * w.in * taps.channel, row = o * w.in * w.taps;
      ConvEntry<T>* entry = to + first[k];
      for (; i < last; ++i, ++entry)
        *entry = {number(values[w.packed ? i : row + w.col[i]]), Offset(base + offset[w.col[i]])};
    });
    return lists;
  }
  // An output channel's keys are its own, so threads share the output channels.
  at::parallel_for(0, w.out, rows_a_task(w), [&](int64_t begin, int64_t end) {
    for_each_weight(w, begin, end, [&](int64_t o, int64_t column, int64_t) { ++first[key[column] + o * segments + 1]; });
  });
  accumulate(first);
  std::vector<int32_t> next(first.begin(), first.end() - 1);
  at::parallel_for(0, w.out, rows_a_task(w), [&](int64_t begin, int64_t end) {
    for_each_weight(w, begin, end, [&](int64_t o, int64_t column, int64_t place) {
      const int64_t group = o / (w.out / w.groups);
      to[next[key[column] + o * segments]++] = {number(values[place]), Offset(group * w.in * taps.channel + offset[column])};
    });
  });
  return lists;
}

template <typename T>
template <typename Values>
ConvEntries<T> ConvEntries<T>::backward(const ConvWeight& w, const ConvTaps& taps, int64_t channels_a_block,
                                        Values values) {
  using Offset = decltype(ConvEntry<T>::offset);
  const int64_t out_a_group = w.out / w.groups, blocks = blocks_of(out_a_group, channels_a_block);
  const int64_t segments = taps.segments;
  ConvEntries lists(w.groups * w.in * taps.phases, blocks, segments, w.nonzeros());
  const auto key = column_table(
      w, [&](int64_t c, int64_t k) { return (c * taps.phases + taps.phase[k]) * segments + taps.segment[k]; });
  const auto offset = column_table(w, [&](int64_t, int64_t k) { return taps.offset[k]; });
  std::vector<int32_t>& first = lists.first_;
  // A block of output channels of a group has keys of its own, so threads share these.
  const auto for_each_block = [&](auto visit) {
    const int64_t grain = std::max<int64_t>(1, rows_a_task(w) / channels_a_block);
    at::parallel_for(0, w.groups * blocks, grain, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t group = i / blocks, block = i % blocks;
        const int64_t o = group * out_a_group + block * channels_a_block;
        const int64_t base = (block * lists.channels + group * w.in * taps.phases) * segments;
        for_each_weight(w, o, std::min(o + channels_a_block, (group + 1) * out_a_group),
                        [&](int64_t out, int64_t column, int64_t place) { visit(base + key[column], out, column, place); });
      }
    });
  };
  for_each_block([&](int64_t k, int64_t, int64_t, int64_t) { ++first[k + 1]; });
  accumulate(first);
  std::vector<int32_t> next(first.begin(), first.end() - 1);
  ConvEntry<T>* const to = lists.memory_->template as<ConvEntry<T>>();
  for_each_block([&](int64_t k, int64_t out, int64_t column, int64_t place) {
    to[next[k]++] = {number(values[place]), Offset(out * taps.channel + offset[column])};
  });
  return lists;
}

ConvPlaces::ConvPlaces(const ConvWeight& w, const ConvTaps& taps, int64_t channels_a_block)
    : blocks(blocks_of(w.in, channels_a_block)),
      first_(blocks * w.out + 1),
      offset_memory_(sizeof(int32_t) * w.nonzeros()),
      place_(w.unstructured() && w.packed ? 0 : w.nonzeros()) {
  const auto block = column_table(w, [&](int64_t c, int64_t) { return c / channels_a_block; });
  const auto offset = column_table(w, [&](int64_t c, int64_t k) { return c * taps.channel + taps.offset[k]; });
  at::parallel_for(0, w.out, rows_a_task(w), [&](int64_t begin, int64_t end) {
    if (w.unstructured())
      for (int64_t o = begin; o < end; ++o)
        for_each_run(w, o, blocks, channels_a_block,
                     [&](int64_t b, int64_t i, int64_t last) { first_[o * blocks + b + 1] = int32_t(last - i); });
    else
      for_each_weight(w, begin, end,
                      [&](int64_t o, int64_t column, int64_t) { ++first_[o * blocks + block[column] + 1]; });
  });
  accumulate(first_);
  std::vector<int32_t> next;
  if (!w.unstructured()) next.assign(first_.begin(), first_.end() - 1);
  // The kernel takes kConvGroup at a time: a block ends with a full group, and what is left goes to the next block.
  for (int64_t o = 0; o < w.out; ++o)
    for (int64_t b = 1; b < blocks; ++b) {
      const int32_t begin = first_[o * blocks];
      first_[o * blocks + b] = begin + (first_[o * blocks + b] - begin) / kConvGroup * kConvGroup;
    }
  int32_t* const offsets = offset_memory_.as<int32_t>();
  at::parallel_for(0, w.out, rows_a_task(w), [&](int64_t begin, int64_t end) {
    if (w.unstructured()) {  // in the order of packed values already
      for (int64_t o = begin; o < end; ++o) {
        const int64_t base = o / (w.out / w.groups) * w.in * taps.channel, row = o * w.in * w.taps;
        for (int64_t i = w.crow[o]; i < w.crow[o + 1]; ++i) offsets[i] = int32_t(base + offset[w.col[i]]);
        if (!place_.empty())
          for (int64_t i = w.crow[o]; i < w.crow[o + 1]; ++i) place_[i] = row + w.col[i];
      }
      return;
    }
    for_each_weight(w, begin, end, [&](int64_t o, int64_t column, int64_t place) {
      const int64_t i = next[o * blocks + block[column]]++, group = o / (w.out / w.groups);
      offsets[i] = int32_t(group * w.in * taps.channel + offset[column]);
      place_[i] = place;
    });
  });
}

ConvShiftedPlaces::ConvShiftedPlaces(const ConvWeight& w, const ConvTaps& taps, int64_t channels_a_block)
    : channels(w.out),
      segments(taps.segments),
      blocks(blocks_of(w.in, channels_a_block)),
      first_(blocks * w.out * segments + 1),
      offset_(w.nonzeros()),
      place_(w.nonzeros()) {
  const auto segment = column_table(w, [&](int64_t, int64_t k) { return taps.segment[k]; });
  const auto list = column_table(w, [&](int64_t c, int64_t k) {
    return c / channels_a_block * channels * segments + taps.segment[k];
  });
  const auto offset = column_table(w, [&](int64_t c, int64_t k) { return c * taps.channel + taps.offset[k]; });
  const int64_t stride = channels * segments;  // from a block's list to the next block's
  at::parallel_for(0, w.out, rows_a_task(w), [&](int64_t begin, int64_t end) {
    for_each_weight(w, begin, end, [&](int64_t o, int64_t column, int64_t) { ++first_[list[column] + o * segments + 1]; });
    // The kernel takes kConvGroup at a time: what is over goes to the next block.
    for (int64_t s = begin * segments; s < end * segments; ++s) {
      int32_t over = 0;
      for (int64_t b = 0; b < blocks; ++b) {
        int32_t& count = first_[b * stride + s + 1];
        count += over;
        over = b + 1 < blocks ? count % kConvGroup : 0;
        count -= over;
      }
    }
  });
  accumulate(first_);
  at::parallel_for(0, w.out, rows_a_task(w), [&](int64_t begin, int64_t end) {
    // Of each segment of a channel: where the next one goes, its list's end, and the list.
    std::vector<int32_t> next(segments), last(segments);
    std::vector<int64_t> key(segments);
    for (int64_t o = begin; o < end; ++o) {
      for (int64_t s = 0; s < segments; ++s) {
        key[s] = o * segments + s;
        next[s] = first_[key[s]];
        last[s] = first_[key[s] + 1];
      }
      const int64_t base = o / (w.out / w.groups) * w.in * taps.channel;
      for_each_weight(w, o, o + 1, [&](int64_t, int64_t column, int64_t place) {
        const int32_t s = segment[column];
        while (next[s] == last[s]) {
          key[s] += stride;
          next[s] = first_[key[s]];
          last[s] = first_[key[s] + 1];
        }
        offset_[next[s]] = int32_t(base + offset[column]);
        place_[next[s]++] = int32_t(place);
      });
    }
  });
}

namespace {

// Lists that a pattern had, and all that they depend on beside it.
template <typename Lists>
struct Kept {
  std::vector<int64_t> key;
  Lists lists;
};
template <typename Lists>
using AllKept = Remembered<2, std::shared_ptr<const Kept<Lists>>>;

// The lists that make() makes, now or before.
template <typename Lists, typename Make>
std::shared_ptr<const Lists> keep(AllKept<Lists>& all, const ConvWeight& w, const ConvTaps& taps,
                                  int64_t channels_a_block, Make make) {
  std::vector<int64_t> key = {w.out, w.in, w.taps, w.groups, w.block_rows, w.block_columns, w.packed,
                              channels_a_block, taps.channel, taps.phases, taps.segments};
  key.insert(key.end(), taps.offset.begin(), taps.offset.end());
  key.insert(key.end(), taps.phase.begin(), taps.phase.end());
  key.insert(key.end(), taps.segment.begin(), taps.segment.end());
  uint64_t number = 0;
  for (const int64_t part : key) {
    number = (number ^ uint64_t(part)) * 0x9e3779b97f4a7c15u;
    number ^= number >> 32;
  }
  const auto find = [&] { return std::make_shared<const Kept<Lists>>(Kept<Lists>{key, make()}); };
  auto kept = all.get({w.crow_tensor, w.col_tensor}, int64_t(number), find);
  if (kept->key != key) kept = find();  // another key of the same number
  return {kept, &kept->lists};
}

struct PlaceItself {
  int32_t operator[](int64_t place) const { return int32_t(place); }
};

}  // namespace

template <typename T>
ConvEntries<T>::ConvEntries(const ConvEntries<int32_t>& order, const T* values)
    : channels(order.channels),
      blocks(order.blocks),
      segments(order.segments),
      first_(order.first_),
      memory_(std::make_unique<Workspace>(sizeof(ConvEntry<T>) * first_.back())) {
  const ConvEntry<int32_t>* const from = order.entries();
  ConvEntry<T>* const to = memory_->template as<ConvEntry<T>>();
  at::parallel_for(0, first_.back(), kGrain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) to[i] = {values[from[i].value], from[i].offset};
  });
}

template <typename T>
ConvEntries<T> shifted_forward_entries(const ConvWeight& w, const ConvTaps& taps, int64_t channels_a_block,
                                       const T* values) {
  if (!w.has_short_places()) return ConvEntries<T>::forward(w, taps, channels_a_block, values);
  static auto* const all = new AllKept<ConvEntries<int32_t>>;
  const auto make = [&] { return ConvEntries<int32_t>::forward(w, taps, channels_a_block, PlaceItself{}); };
  return ConvEntries<T>(*keep(*all, w, taps, channels_a_block, make), values);
}

template <typename T>
ConvEntries<T> shifted_backward_entries(const ConvWeight& w, const ConvTaps& taps, int64_t channels_a_block,
                                        const T* values) {
  if (!w.has_short_places()) return ConvEntries<T>::backward(w, taps, channels_a_block, values);
  static auto* const all = new AllKept<ConvEntries<int32_t>>;
  const auto make = [&] { return ConvEntries<int32_t>::backward(w, taps, channels_a_block, PlaceItself{}); };
  return ConvEntries<T>(*keep(*all, w, taps, channels_a_block, make), values);
}

std::shared_ptr<const ConvShiftedPlaces> ConvShiftedPlaces::of(const ConvWeight& w, const ConvTaps& taps,
                                                               int64_t channels_a_block) {
  static auto* const all = new AllKept<ConvShiftedPlaces>;
  return keep(*all, w, taps, channels_a_block, [&] { return ConvShiftedPlaces(w, taps, channels_a_block); });
}

#define INSTANTIATE(T, S)                                                                                       \
  template ConvEntries<T> ConvEntries<T>::forward(const ConvWeight&, const ConvTaps&, int64_t, const S*);        \
  template ConvEntries<T> ConvEntries<T>::backward(const ConvWeight&, const ConvTaps&, int64_t, const S*);
INSTANTIATE(float, float)
INSTANTIATE(float, BFloat16)
INSTANTIATE(double, double)
#undef INSTANTIATE
template ConvEntries<float> shifted_forward_entries(const ConvWeight&, const ConvTaps&, int64_t, const float*);
template ConvEntries<double> shifted_forward_entries(const ConvWeight&, const ConvTaps&, int64_t, const double*);
template ConvEntries<float> shifted_backward_entries(const ConvWeight&, const ConvTaps&, int64_t, const float*);
template ConvEntries<double> shifted_backward_entries(const ConvWeight&, const ConvTaps&, int64_t, const double*);

}  // namespace uasparse
