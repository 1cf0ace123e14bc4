// The nonzero weights in the order in which the kernels of masked_conv2d take them.
//
// They are sorted by (block of source channels, destination channel), so that a block's activations stay in L1 while all
// destination channels pass over them, and the entries stream.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <vector>

#include "cpu/conv_geometry.h"
#include "cpu/masked_conv2d.h"
#include "cpu/workspace.h"

namespace uasparse {

// The weight's pattern (csrc/bindings.cpp), its storage and its groups.
struct ConvWeight {
  const int32_t *crow, *col;
  int64_t out, in, taps, groups;  // `in` of a group
  int64_t block_rows, block_columns, blocks;
  bool packed;
  int64_t nonzeros() const { return blocks * block_rows * block_columns; }
  double density() const { return double(nonzeros()) / double(out * in * taps); }
};

// Sort keys and offsets: a weight of output channel o and column c * taps + k (c inside its group) has the key
// row_key[o] + column_key[column], and likewise the offset.
struct ConvOrder {
  std::vector<int64_t> row_key, column_key, row_offset, column_offset;
  int64_t blocks, channels;  // keys are below blocks * channels
};

// channels_a_block: source channels (of a group) whose activations share L1.
ConvOrder forward_order(const ConvWeight& weight, const Pass& pass, int64_t lanes, int64_t channels_a_block);
ConvOrder backward_order(const ConvWeight& weight, const Pass& pass, int64_t lanes, int64_t channels_a_block);

// Source channels a block for tiles that read `channel_bytes` a channel: what fits L1, but enough for about ten
// nonzeros a destination channel, as a tile is loaded and stored once a block (docs/cpu-kernels.md).
int64_t channels_a_block(int64_t channel_bytes, double nonzeros_a_channel, int64_t channels);

// [first[key], first[key + 1]) are the weights of a key.
struct ConvFirst {
  std::vector<int64_t> first;
  ConvFirst(const ConvWeight& weight, const ConvOrder& order);
};

template <typename T>
struct ConvEntries : ConvFirst {
  Workspace memory;
  int64_t channels, blocks;

  template <typename S>
  ConvEntries(const ConvWeight& weight, const ConvOrder& order, const S* values);
  const ConvEntry<T>* entries() const { return memory.as<const ConvEntry<T>>(); }
};

// For the gradient of the weight: offsets, and the place of each in the weight's storage.
struct ConvPlaces : ConvFirst {
  Workspace offset_memory, place_memory;
  int64_t channels, blocks;

  ConvPlaces(const ConvWeight& weight, const ConvOrder& order);
  const int32_t* offset() const { return offset_memory.as<const int32_t>(); }
  const int64_t* place() const { return place_memory.as<const int64_t>(); }
};

}  // namespace uasparse
