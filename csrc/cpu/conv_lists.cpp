#include "cpu/conv_lists.h"

#include <algorithm>
#include <cstring>

namespace uasparse {
namespace {

// Calls visit(output channel, column, place in the weight's storage) for each weight, by output channels.
template <typename Visit>
void for_each_weight(const ConvWeight& w, Visit visit) {
  const int64_t columns = w.in * w.taps, bh = w.block_rows, bw = w.block_columns;
  for (int64_t o = 0; o < w.out; ++o) {
    const int64_t begin = w.crow[o / bh], end = w.crow[o / bh + 1];
    if (bh == 1 && bw == 1) {
      for (int64_t i = begin; i < end; ++i) visit(o, w.col[i], w.packed ? i : o * columns + w.col[i]);
      continue;
    }
    for (int64_t i = begin; i < end; ++i) {
      const int64_t channel = w.col[i] / w.taps * bw, tap = w.col[i] % w.taps;
      for (int64_t x = 0; x < bw; ++x) {
        const int64_t column = (channel + x) * w.taps + tap;
        visit(o, column, w.packed ? (i * bh + o % bh) * bw + x : o * columns + column);
      }
    }
  }
}

template <typename T>
T number(T x) {
  return x;
}
float number(BFloat16 x) {
  const uint32_t bits = uint32_t(x.bits) << 16;
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

}  // namespace

ConvOrder forward_order(const ConvWeight& w, const Pass& pass, int64_t lanes, int64_t channels_a_block) {
  ConvOrder order;
  order.channels = w.out;
  order.blocks = (w.in + channels_a_block - 1) / channels_a_block;
  const int64_t out_a_group = w.out / w.groups;
  for (int64_t o = 0; o < w.out; ++o) {
    order.row_key.push_back(o);
    order.row_offset.push_back(o / out_a_group * w.in * pass.source.channel);
  }
  for (int64_t c = 0; c < w.in; ++c)
    for (int64_t k = 0; k < w.taps; ++k) {
      order.column_key.push_back(c / channels_a_block * order.channels);
      order.column_offset.push_back(c * pass.source.channel + pass.offset(k, lanes));
    }
  return order;
}

ConvOrder backward_order(const ConvWeight& w, const Pass& pass, int64_t lanes, int64_t channels_a_block) {
  ConvOrder order;
  const int64_t phases = pass.destination_phases(), out_a_group = w.out / w.groups;
  order.channels = w.groups * w.in * phases;
  order.blocks = (out_a_group + channels_a_block - 1) / channels_a_block;
  for (int64_t o = 0; o < w.out; ++o) {
    const int64_t group = o / out_a_group, block = o % out_a_group / channels_a_block;
    order.row_key.push_back(block * order.channels + group * w.in * phases);
    order.row_offset.push_back(o * pass.source.channel);
  }
  for (int64_t c = 0; c < w.in; ++c)
    for (int64_t k = 0; k < w.taps; ++k) {
      order.column_key.push_back(c * phases + pass.destination_phase(k));
      order.column_offset.push_back(pass.offset(k, lanes));
    }
  return order;
}

int64_t channels_a_block(int64_t channel_bytes, double nonzeros_a_channel, int64_t channels) {
  constexpr int64_t kL1Bytes = 24 << 10;
  const int64_t fits = std::max<int64_t>(1, kL1Bytes / channel_bytes);
  const double wanted = nonzeros_a_channel > 0 ? 10 / nonzeros_a_channel : 1e9;
  const int64_t block = wanted > double(channels) ? channels : std::max(fits, int64_t(wanted) + 1);
  // Blocks of one size.
  const int64_t blocks = std::max<int64_t>(1, (channels + block - 1) / block);
  return (channels + blocks - 1) / blocks;
}

ConvFirst::ConvFirst(const ConvWeight& weight, const ConvOrder& order) : first(order.blocks * order.channels + 1) {
  for_each_weight(weight, [&](int64_t o, int64_t column, int64_t) {
    ++first[order.row_key[o] + order.column_key[column] + 1];
  });
  for (size_t i = 1; i < first.size(); ++i) first[i] += first[i - 1];
}

template <typename T>
template <typename S>
ConvEntries<T>::ConvEntries(const ConvWeight& weight, const ConvOrder& order, const S* values)
    : ConvFirst(weight, order),
      memory(sizeof(ConvEntry<T>) * weight.nonzeros()),
      channels(order.channels),
      blocks(order.blocks) {
  std::vector<int64_t> next(first.begin(), first.end() - 1);
  ConvEntry<T>* to = memory.as<ConvEntry<T>>();
  for_each_weight(weight, [&](int64_t o, int64_t column, int64_t place) {
    const int64_t key = order.row_key[o] + order.column_key[column];
    using Offset = decltype(ConvEntry<T>::offset);
    to[next[key]++] = {number(values[place]), Offset(order.row_offset[o] + order.column_offset[column])};
  });
}

ConvPlaces::ConvPlaces(const ConvWeight& weight, const ConvOrder& order)
    : ConvFirst(weight, order),
      offset_memory(sizeof(int32_t) * weight.nonzeros()),
      place_memory(sizeof(int64_t) * weight.nonzeros()),
      channels(order.channels),
      blocks(order.blocks) {
  std::vector<int64_t> next(first.begin(), first.end() - 1);
  int32_t* offsets = offset_memory.as<int32_t>();
  int64_t* places = place_memory.as<int64_t>();
  for_each_weight(weight, [&](int64_t o, int64_t column, int64_t place) {
    const int64_t i = next[order.row_key[o] + order.column_key[column]]++;
    offsets[i] = int32_t(order.row_offset[o] + order.column_offset[column]);
    places[i] = place;
  });
}

template ConvEntries<float>::ConvEntries(const ConvWeight&, const ConvOrder&, const float*);
template ConvEntries<float>::ConvEntries(const ConvWeight&, const ConvOrder&, const BFloat16*);
template ConvEntries<double>::ConvEntries(const ConvWeight&, const ConvOrder&, const double*);

}  // namespace uasparse
