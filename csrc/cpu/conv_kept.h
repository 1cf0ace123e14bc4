// Lists of a convolution's nonzeros that are kept with the pattern.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "cpu/conv_lists.h"
#include "cpu/remembered.h"

namespace uasparse {

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

// A place as its own value: lists of these say in which order values are gathered.
struct PlaceItself {
  int32_t operator[](int64_t place) const { return int32_t(place); }
};

}  // namespace uasparse
