#include "cpu/conv_geometry.h"

#include <algorithm>
#include <utility>

namespace uasparse {
namespace {

int64_t ceil_div(int64_t a, int64_t b) { return a >= 0 ? (a + b - 1) / b : -(-a / b); }
int64_t floor_div(int64_t a, int64_t b) { return -ceil_div(-a, b); }

Axis plain_axis(int64_t extent, int64_t origin, int64_t length) { return {extent, 1, origin, length, {0}}; }

}  // namespace

AxisPass forward_axis(int64_t in, int64_t out, int64_t kernel, int64_t stride, int64_t padding, int64_t dilation) {
  AxisPass pass;
  pass.destination = plain_axis(out, 0, out);
  pass.source = {in, stride, -padding, 0, std::vector<int64_t>(stride, -1)};
  for (int64_t k = 0; k < kernel; ++k) {
    const int64_t phase = k * dilation % stride, shift = k * dilation / stride;
    pass.source.phase[phase] = phase;
    pass.source_phase.push_back(phase);
    pass.destination_phase.push_back(0);
    pass.shift.push_back(shift);
    pass.reach = std::max(pass.reach, shift);
  }
  pass.source.length = out + pass.reach;
  return pass;
}

AxisPass backward_axis(int64_t in, int64_t out, int64_t kernel, int64_t stride, int64_t padding, int64_t dilation) {
  AxisPass pass;
  // The input y of phase r has index (y + padding) / stride - first[r], so that each phase begins at index 0.
  std::vector<int64_t> first(stride);
  pass.destination = {in, stride, 0, ceil_div(in, stride), std::vector<int64_t>(stride)};
  for (int64_t y = 0; y < stride; ++y) {
    pass.destination.phase[y] = (y + padding) % stride;
    first[(y + padding) % stride] = (y + padding) / stride;
  }
  for (int64_t k = 0; k < kernel; ++k) {
    const int64_t phase = k * dilation % stride, shift = first[phase] - k * dilation / stride;
    pass.source_phase.push_back(0);
    pass.destination_phase.push_back(phase);
    pass.shift.push_back(shift);
    pass.lead = std::max(pass.lead, -shift);
  }
  for (int64_t& shift : pass.shift) {
    shift += pass.lead;
    pass.reach = std::max(pass.reach, shift);
  }
  // All of grad_output, and all that some grad_input reads.
  pass.source = plain_axis(out, -pass.lead, std::max(pass.destination.length + pass.reach, out + pass.lead));
  return pass;
}

PackedLayout::PackedLayout(const Axis& y, const Axis& x, int64_t channels, int64_t lanes)
    : channels(channels),
      phase(x.length * lanes),
      channel(y.phases() * x.phases() * phase),
      // Rows a multiple of 4096 bytes apart would share their sets of L1.
      row(channels * channel + (channels * channel % 512 == 0 ? 2 * 16 : 0)) {}

Pass::Pass(AxisPass y_pass, AxisPass x_pass, int64_t source_channels, int64_t destination_channels, int64_t lanes)
    : y(std::move(y_pass)),
      x(std::move(x_pass)),
      source(y.source, x.source, source_channels, lanes),
      destination(y.destination, x.destination, destination_channels, lanes) {}

ConvTaps Pass::conv_taps(int64_t lanes) const {
  ConvTaps taps{source.channel, {}, {}, destination_phases(), std::vector<int64_t>(y.shift.size() * x.shift.size())};
  for (size_t ky = 0; ky < y.shift.size(); ++ky)
    for (size_t kx = 0; kx < x.shift.size(); ++kx) {
      const int64_t phase = y.source_phase[ky] * x.source.phases() + x.source_phase[kx];
      taps.offset.push_back(y.shift[ky] * source.row + phase * source.phase + x.shift[kx] * lanes);
      taps.phase.push_back(y.destination_phase[ky] * x.destination.phases() + x.destination_phase[kx]);
    }
  return taps;
}

void find_positions(const Axis& y, const Axis& x, const PackedLayout& layout, int64_t lanes, int64_t begin, int64_t end,
                    Positions* positions) {
  positions->first = begin * y.step + y.origin;
  positions->last = std::max(positions->first, end * y.step + y.origin);
  positions->offset.resize((positions->last - positions->first) * x.extent);
  int64_t* to = positions->offset.data();
  for (int64_t image_y = positions->first; image_y < positions->last; ++image_y) {
    const int64_t index_y = floor_div(image_y - y.origin, y.step);
    const int64_t phase_y = y.phase[image_y - y.origin - index_y * y.step];
    for (int64_t image_x = 0; image_x < x.extent; ++image_x, ++to) {
      const int64_t index_x = floor_div(image_x - x.origin, x.step);
      const int64_t phase_x = x.phase[image_x - x.origin - index_x * x.step];
      const bool packed = phase_y >= 0 && phase_x >= 0 && index_x >= 0 && index_x < x.length;
      *to = packed ? (index_y - begin) * layout.row + (phase_y * x.phases() + phase_x) * layout.phase + index_x * lanes
                   : -1;
    }
  }
}

}  // namespace uasparse
