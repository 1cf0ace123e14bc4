// A convolution as a unit-stride one over phases.
//
// Along one axis output i meets input y = i * stride + k * dilation - padding. Split y + padding into a phase (its
// remainder by the stride) and an index (the quotient): tap k then lives in ONE phase and its index is i plus a constant
// shift. So activations packed by [phase][index] turn every convolution, and its transpose in the backward pass (where
// grad_input is the one with phases), into sums over the same index plus constants: `source index = destination index +
// shift(k)`, with zeros stored where the padding is.
#pragma once

#include <cstdint>
#include <vector>

#include "cpu/conv_lists.h"

namespace uasparse {

// How the positions of an image along one axis map to packed ones.
struct Axis {
  int64_t extent;                    // positions in the image
  int64_t step;                      // positions a unit of index
  int64_t origin;                    // image position of index 0, remainder 0
  int64_t length;                    // indices
  std::vector<int64_t> phase;        // of each remainder, [step]; -1: no tap reads it
  int64_t phases() const { return step; }
};

// One axis of a pass: source positions to destination positions through the taps.
struct AxisPass {
  Axis source, destination;
  std::vector<int64_t> source_phase, destination_phase, shift;  // of each tap
  int64_t reach = 0;                                            // largest shift
  int64_t lead = 0;  // index of image position 0 in the source of a backward pass
};

AxisPass forward_axis(int64_t in, int64_t out, int64_t kernel, int64_t stride, int64_t padding, int64_t dilation);
AxisPass backward_axis(int64_t in, int64_t out, int64_t kernel, int64_t stride, int64_t padding, int64_t dilation);

// An activation packed to rows [channels][phases of y][phases of x][columns][lanes]; strides in numbers.
struct PackedLayout {
  int64_t channels, phase, channel, row;

  PackedLayout() = default;
  PackedLayout(const Axis& y, const Axis& x, int64_t channels, int64_t lanes);
};

// Both axes.
struct Pass {
  AxisPass y, x;
  PackedLayout source, destination;

  Pass(AxisPass y, AxisPass x, int64_t source_channels, int64_t destination_channels, int64_t lanes);
  // Offset in the packed source and phase of the destination, of each tap.
  ConvTaps conv_taps(int64_t lanes) const;
  int64_t destination_phases() const { return y.destination.phases() * x.destination.phases(); }
};

// Where each position of the image rows [first, last) that belong to packed rows [begin, end) lies, relative to packed
// row `begin`. Rows may lie outside the image.
struct Positions {
  int64_t first = 0, last = 0;
  std::vector<int64_t> offset;  // [(last - first) * width], -1: not packed
};
void find_positions(const Axis& y, const Axis& x, const PackedLayout& layout, int64_t lanes, int64_t begin, int64_t end,
                    Positions* positions);

}  // namespace uasparse
