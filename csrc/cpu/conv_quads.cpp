#include "cpu/conv_quads.h"

#include <ATen/Parallel.h>

#include <type_traits>

#include "cpu/conv_kept.h"

namespace uasparse {
namespace {

constexpr int64_t kGrain = 1 << 12;  // quads a thread sorts at least

// How weights of a block follow each other in the weight's storage.
struct Steps {
  int64_t row, column;
  explicit Steps(const ConvWeight& w)
      : row(w.packed ? w.block_columns : w.in * w.taps), column(w.packed ? 1 : w.taps) {}
};

// Calls visit(first output channel, first input channel of its group, tap, place of the first weight) for the blocks of
// the block rows [begin, end).
template <typename Visit>
void for_each_block(const ConvWeight& w, int64_t begin, int64_t end, Visit visit) {
  for (int64_t r = begin; r < end; ++r)
    for (int64_t i = w.crow[r]; i < w.crow[r + 1]; ++i) {
      const int64_t out = r * w.block_rows, in = w.col[i] / w.taps * w.block_columns, tap = w.col[i] % w.taps;
      visit(out, in, tap, w.packed ? i * w.block_rows * w.block_columns : (out * w.in + in) * w.taps + tap);
    }
}

// As above, for all block rows, which threads share.
template <typename Visit>
void for_all_blocks(const ConvWeight& w, Visit visit) {
  const int64_t rows = w.out / w.block_rows;
  const int64_t grain = std::max<int64_t>(1, kGrain * 4 * rows / std::max<int64_t>(1, w.nonzeros()));
  at::parallel_for(0, rows, grain, [&](int64_t begin, int64_t end) { for_each_block(w, begin, end, visit); });
}

void accumulate(std::vector<int32_t>& counts) {
  for (size_t i = 1; i < counts.size(); ++i) counts[i] += counts[i - 1];
}

}  // namespace

template <typename T>
ConvQuads<T>::ConvQuads(int64_t channels, int64_t blocks, int64_t phases, int64_t quads)
    : channels(channels),
      blocks(blocks),
      phases(phases),
      first_(blocks * channels + 1),
      memory_(std::make_unique<Workspace>(sizeof(ConvQuadEntry<T>) * quads)) {}

template <typename T>
template <typename Values>
ConvQuads<T> ConvQuads<T>::forward(const ConvWeight& w, const ConvTaps& taps, int64_t channels_a_block,
                                   Values values) {
  ConvQuads lists(w.out / 4, blocks_of(w.in, channels_a_block), 1, w.nonzeros() / 4);
  const Steps steps(w);
  std::vector<int32_t>& first = lists.first_;
  // A quad's keys are its block row's own.
  for_all_blocks(w, [&](int64_t out, int64_t in, int64_t, int64_t) {
    for (int64_t x = 0; x < w.block_columns; ++x)
      for (int64_t q = 0; q < w.block_rows / 4; ++q)
        ++first[(in + x) / channels_a_block * lists.channels + out / 4 + q + 1];
  });
  accumulate(first);
  std::vector<int32_t> next(first.begin(), first.end() - 1);
  ConvQuadEntry<T>* const to = lists.memory_->template as<ConvQuadEntry<T>>();
  for_all_blocks(w, [&](int64_t out, int64_t in, int64_t tap, int64_t place) {
    const int64_t base = out / (w.out / w.groups) * w.in;
    for (int64_t x = 0; x < w.block_columns; ++x)
      for (int64_t q = 0; q < w.block_rows / 4; ++q) {
        ConvQuadEntry<T>& entry = to[next[(in + x) / channels_a_block * lists.channels + out / 4 + q]++];
        entry.offset = decltype(entry.offset)((base + in + x) * taps.channel + taps.offset[tap]);
        for (int64_t r = 0; r < 4; ++r)
          entry.value[r] = number(values[place + (4 * q + r) * steps.row + x * steps.column]);
        if constexpr (std::is_same_v<T, int32_t>) entry.tap = int32_t(tap);
      }
  });
  return lists;
}

template <typename T>
template <typename Values>
ConvQuads<T> ConvQuads<T>::backward(const ConvWeight& w, const ConvTaps& taps, int64_t channels_a_block,
                                    Values values) {
  const int64_t out_a_group = w.out / w.groups, phases = taps.phases;
  ConvQuads lists(w.groups * w.in / 4 * phases, blocks_of(out_a_group, channels_a_block), phases, w.nonzeros() / 4);
  const Steps steps(w);
  std::vector<int32_t>& first = lists.first_;
  // Of row y and the first four columns of a block.
  const auto key = [&](int64_t out, int64_t in, int64_t tap, int64_t y) {
    const int64_t group = out / out_a_group, block = (out + y - group * out_a_group) / channels_a_block;
    return block * lists.channels + (group * w.in + in) / 4 * phases + taps.phase[tap];
  };
  const int64_t rows = w.out / w.block_rows, quads = w.block_columns / 4;
  for_each_block(w, 0, rows, [&](int64_t out, int64_t in, int64_t tap, int64_t) {
    for (int64_t y = 0; y < w.block_rows; ++y)
      for (int64_t q = 0; q < quads; ++q) ++first[key(out, in + 4 * q, tap, y) + 1];
  });
  accumulate(first);
  std::vector<int32_t> next(first.begin(), first.end() - 1);
  ConvQuadEntry<T>* const to = lists.memory_->template as<ConvQuadEntry<T>>();
  for_each_block(w, 0, rows, [&](int64_t out, int64_t in, int64_t tap, int64_t place) {
    for (int64_t y = 0; y < w.block_rows; ++y)
      for (int64_t q = 0; q < quads; ++q) {
        ConvQuadEntry<T>& entry = to[next[key(out, in + 4 * q, tap, y)]++];
        entry.offset = decltype(entry.offset)((out + y) * taps.channel + taps.offset[tap]);
        for (int64_t r = 0; r < 4; ++r)
          entry.value[r] = number(values[place + y * steps.row + (4 * q + r) * steps.column]);
        if constexpr (std::is_same_v<T, int32_t>) entry.tap = int32_t(tap);
      }
  });
  return lists;
}

ConvQuadPlaces::ConvQuadPlaces(const ConvWeight& w, const ConvTaps& taps, int64_t channels_a_block)
    : blocks(blocks_of(w.in, channels_a_block)),
      first_(blocks * (w.out / 4) + 1),
      offset_(w.nonzeros() / 4),
      place_(w.nonzeros() / 4),
      row_step_(Steps(w).row) {
  const Steps steps(w);
  for_all_blocks(w, [&](int64_t out, int64_t in, int64_t, int64_t) {
    for (int64_t x = 0; x < w.block_columns; ++x)
      for (int64_t q = 0; q < w.block_rows / 4; ++q)
        ++first_[(out / 4 + q) * blocks + (in + x) / channels_a_block + 1];
  });
  accumulate(first_);
  std::vector<int32_t> next(first_.begin(), first_.end() - 1);
  for_all_blocks(w, [&](int64_t out, int64_t in, int64_t tap, int64_t place) {
    const int64_t base = out / (w.out / w.groups) * w.in;
    for (int64_t q = 0; q < w.block_rows / 4; ++q)
      for (int64_t x = 0; x < w.block_columns; ++x) {
        const int64_t i = next[(out / 4 + q) * blocks + (in + x) / channels_a_block]++;
        offset_[i] = int32_t((base + in + x) * taps.channel + taps.offset[tap]);
        place_[i] = place + 4 * q * steps.row + x * steps.column;
      }
  });
}

std::shared_ptr<const ConvQuadOrder> forward_quad_order(const ConvWeight& w, const ConvTaps& taps,
                                                        int64_t channels_a_block) {
  static auto* const all = new AllKept<ConvQuadOrder>;
  return keep(*all, w, taps, channels_a_block,
              [&] { return ConvQuadOrder::forward(w, taps, channels_a_block, PlaceItself{}); });
}

std::shared_ptr<const ConvQuadOrder> backward_quad_order(const ConvWeight& w, const ConvTaps& taps,
                                                         int64_t channels_a_block) {
  static auto* const all = new AllKept<ConvQuadOrder>;
  return keep(*all, w, taps, channels_a_block,
              [&] { return ConvQuadOrder::backward(w, taps, channels_a_block, PlaceItself{}); });
}

std::shared_ptr<const ConvQuadOrder> dots_quad_order(const ConvWeight& w, const ConvTaps& taps,
                                                     int64_t channels_a_block) {
  static auto* const all = new AllKept<ConvQuadOrder>;
  return keep(*all, w, taps, channels_a_block,
              [&] { return ConvQuadOrder::forward(w, taps, channels_a_block, PlaceItself{}); });
}

template class ConvQuads<float>;
template class ConvQuads<double>;
#define INSTANTIATE(T, S)                                                                                      \
  template ConvQuads<T> ConvQuads<T>::forward(const ConvWeight&, const ConvTaps&, int64_t, const S*);          \
  template ConvQuads<T> ConvQuads<T>::backward(const ConvWeight&, const ConvTaps&, int64_t, const S*);
INSTANTIATE(float, float)
INSTANTIATE(float, BFloat16)
INSTANTIATE(double, double)
#undef INSTANTIATE

}  // namespace uasparse
