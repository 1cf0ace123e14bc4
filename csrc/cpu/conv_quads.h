// Weights in blocks of at least four rows, as quads: four neighbouring destination channels that share their sources.
//
// An entry of a product then has four values for one offset, and a vector of the source, once loaded, is added to four
// sums; dot products take four channels of grad_output along the same columns. So a nonzero costs a quarter of the loads
// that bound unstructured ones. grad_input's destinations are input channels: its quads are the columns of a block.
#pragma once

#include "cpu/conv_lists.h"

namespace uasparse {

// Entries of a product by quads: those of (block of source channels, quad, phase) are [first(block)[key], ...[key + 1])
// with key = quad * phases + phase.
template <typename T>
class ConvQuads {
 public:
  using Entry = ConvQuadEntry<T>;
  using Product = ConvQuadProduct<T>;
  static constexpr int64_t kTogether = 4;
  static int64_t max_vectors(const ConvKernels<T>& kernels) { return kernels.max_quad_vectors; }
  static bool can_forward(const ConvWeight& w) { return w.block_rows % 4 == 0; }
  static bool can_backward(const ConvWeight& w) { return w.block_columns % 4 == 0; }

  // `values` are indexed by places in the weight's storage.
  template <typename Values>
  static ConvQuads forward(const ConvWeight& weight, const ConvTaps& taps, int64_t channels_a_block, Values values);
  template <typename Values>
  static ConvQuads backward(const ConvWeight& weight, const ConvTaps& taps, int64_t channels_a_block, Values values);

  const int32_t* first(int64_t block) const { return first_.data() + block * channels; }
  const ConvQuadEntry<T>* entries() const { return memory_->template as<const ConvQuadEntry<T>>(); }

  int64_t channels, blocks, phases;  // channels: quads times phases

 private:
  ConvQuads(int64_t channels, int64_t blocks, int64_t phases, int64_t quads);
  std::vector<int32_t> first_;
  std::unique_ptr<Workspace> memory_;
};

// The places of quads in the order in which a pass takes them: made when first asked for, and kept until the pattern
// changes or other taps are asked for.
using ConvQuadOrder = ConvQuads<int32_t>;
std::shared_ptr<const ConvQuadOrder> forward_quad_order(const ConvWeight& weight, const ConvTaps& taps,
                                                        int64_t channels_a_block);
std::shared_ptr<const ConvQuadOrder> backward_quad_order(const ConvWeight& weight, const ConvTaps& taps,
                                                         int64_t channels_a_block);
// As forward, for dot products.
std::shared_ptr<const ConvQuadOrder> dots_quad_order(const ConvWeight& weight, const ConvTaps& taps,
                                                     int64_t channels_a_block);

// Columns of the dot products of each quad of output channels: those of key quad * blocks + block are [first[key],
// first[key + 1]), and each stands for four weights.
class ConvQuadPlaces {
 public:
  ConvQuadPlaces(const ConvWeight& weight, const ConvTaps& taps, int64_t channels_a_block);

  const int32_t* first() const { return first_.data(); }
  const int32_t* offset() const { return offset_.data(); }
  // Index of the i-th weight into the weight's storage.
  int64_t place(int64_t i) const { return place_[i / 4] + i % 4 * row_step_; }

  const int64_t blocks;

 private:
  std::vector<int32_t> first_, offset_;
  std::vector<int64_t> place_;
  int64_t row_step_;
};

}  // namespace uasparse
