// The nonzero weights in the order in which the kernels of masked_conv2d take them.
//
// Source channels are cut into blocks whose activations stay in L1 while all destination channels pass over them.
// Products take their weights by (block, destination channel), so that the entries stream; dot products (SDDMM) by
// (output channel, block), which for 1x1 blocks is the order of packed values.
#pragma once

#include <cstdint>
#include <cstring>
#include <memory>
#include <vector>

#include "cpu/masked_conv2d.h"
#include "cpu/workspace.h"

namespace at {
class Tensor;
}

namespace uasparse {

// The weight's pattern (csrc/bindings.cpp), its storage and its groups.
struct ConvWeight {
  const int32_t *crow, *col;
  const at::Tensor *crow_tensor, *col_tensor;  // whose numbers these are, or null
  int64_t out, in, taps, groups;  // `in` of a group
  int64_t block_rows, block_columns, blocks;
  bool packed;
  bool unstructured() const { return block_rows == 1 && block_columns == 1; }
  int64_t nonzeros() const { return blocks * block_rows * block_columns; }
  double density() const { return double(nonzeros()) / double(out * in * taps); }
  bool has_short_places() const { return out * in * taps <= INT32_MAX; }  // in its storage
};

// Where a pass finds its sources and puts its results, in numbers of the packed layout.
struct ConvTaps {
  int64_t channel;              // from a source channel to the next
  std::vector<int64_t> offset;  // of each tap
  std::vector<int64_t> phase;   // of the destination, of each tap
  int64_t phases;
  std::vector<int64_t> segment;  // of each tap: which shift its sums need
  int64_t segments = 1;
};

// Source channels a block for tiles that read `channel_bytes` a channel: what fits L1, but enough for about `least`
// nonzeros a destination channel, as a tile is loaded and stored once a block.
int64_t channels_a_block(int64_t channel_bytes, double nonzeros_a_channel, int64_t channels, double least = 20);

inline int64_t blocks_of(int64_t channels, int64_t channels_a_block) {
  return (channels + channels_a_block - 1) / channels_a_block;
}

// A weight as the kernels multiply it.
template <typename T>
T number(T x) {
  return x;
}
inline float number(BFloat16 x) {
  const uint32_t bits = uint32_t(x.bits) << 16;
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

// Entries of a product: those of key (block * channels + channel) * segments + segment are [first[key], first[key + 1]).
template <typename T>
class ConvEntries {
 public:
  using Entry = ConvEntry<T>;
  using Product = ConvProduct<T>;
  static constexpr int64_t kTogether = 1;  // destination channels of an entry
  template <typename Kernels>
  static int64_t max_vectors(const Kernels& kernels) {
    return kernels.max_vectors;
  }

  // Forward: destination channels are output channels. `values` are indexed by places in the weight's storage.
  template <typename Values>
  static ConvEntries forward(const ConvWeight& weight, const ConvTaps& taps, int64_t channels_a_block, Values values);
  // Backward: destination channels are input channels times phases.
  template <typename Values>
  static ConvEntries backward(const ConvWeight& weight, const ConvTaps& taps, int64_t channels_a_block, Values values);
  // With values[place] where `order` has the place as its value.
  ConvEntries(const ConvEntries<int32_t>& order, const T* values);

  const int32_t* first(int64_t block) const { return first_.data() + block * channels * segments; }
  const ConvEntry<T>* entries() const { return memory_->template as<const ConvEntry<T>>(); }

  int64_t channels, blocks, segments;
  static constexpr int64_t phases = 1;  // of a channel: they are channels of their own

 private:
  template <typename>
  friend class ConvEntries;
  ConvEntries(int64_t channels, int64_t blocks, int64_t segments, int64_t nonzeros);
  std::vector<int32_t> first_;
  std::unique_ptr<Workspace> memory_;
};

// Entries of shifted products, forward and backward. Their order is made when first asked for, and kept until the pattern
// changes or other taps are asked for; values are gathered at each call.
template <typename T>
ConvEntries<T> shifted_forward_entries(const ConvWeight& weight, const ConvTaps& taps, int64_t channels_a_block,
                                       const T* values);
template <typename T>
ConvEntries<T> shifted_backward_entries(const ConvWeight& weight, const ConvTaps& taps, int64_t channels_a_block,
                                        const T* values);

// Offsets of the dot products: those of key channel * blocks + block are [first[key], first[key + 1]).
class ConvPlaces {
 public:
  ConvPlaces(const ConvWeight& weight, const ConvTaps& taps, int64_t channels_a_block);

  const int32_t* first() const { return first_.data(); }
  const int32_t* offset() const { return offset_memory_.as<const int32_t>(); }
  // Index of the i-th one into the weight's storage.
  int64_t place(int64_t i) const { return place_.empty() ? i : place_[i]; }

  const int64_t blocks;

 private:
  std::vector<int32_t> first_;
  Workspace offset_memory_;
  std::vector<int64_t> place_;  // empty: the order of packed values
};

// Offsets of the dot products of shifted planes: those of key (block * channels + channel) * segments + segment are
// [first[key], first[key + 1]), so that they stream. Of a channel and segment all blocks but the last have whole groups.
class ConvShiftedPlaces {
 public:
  // Made when first asked for, and kept until the pattern changes or other taps are asked for.
  static std::shared_ptr<const ConvShiftedPlaces> of(const ConvWeight& weight, const ConvTaps& taps,
                                                     int64_t channels_a_block);
  ConvShiftedPlaces(const ConvWeight& weight, const ConvTaps& taps, int64_t channels_a_block);

  const int32_t* first(int64_t block) const { return first_.data() + block * channels * segments; }
  const int32_t* offset() const { return offset_.data(); }
  // Index of the i-th one into the weight's storage.
  int64_t place(int64_t i) const { return place_[i]; }

  const int64_t channels, segments, blocks;

 private:
  std::vector<int32_t> first_, offset_, place_;
};

}  // namespace uasparse
