// What goes by space (conv_by_space.cpp): planes of images side by side, and how they are packed and unpacked.
//
// A strided convolution is one of stride 1 over phases of its rows and columns (conv_geometry.h): a channel of the source,
// or of the destination of a backward pass, is a plane a phase then. Rows of a phase are rows of the map; of columns at
// most two phases are served, the even ones and the odd ones, which are taken apart while rows are copied, or put together.
#pragma once

#include <algorithm>
#include <cstring>
#include <limits>
#include <utility>
#include <vector>

#include "cpu/conv_pass.h"

namespace uasparse {

constexpr int64_t kL2Bytes = 512 << 10;  // of it the packed source of a group of rows

// Indices of a phase in [begin, end) that are inside the image.
struct Run {
  int64_t begin, end;
  int64_t size() const { return end - begin; }
};
inline Run run_of(const Axis& axis, int64_t phase, int64_t begin, int64_t end) {
  const int64_t origin = axis.origin + phase;
  const int64_t first = std::clamp(ceil_div(-origin, axis.step), begin, end);
  return {first, std::clamp(ceil_div(axis.extent - origin, axis.step), first, end)};
}
inline int64_t position(const Axis& axis, int64_t phase, int64_t index) { return index * axis.step + axis.origin + phase; }

// Channels a multiple of 4096 bytes apart would share their sets of L1.
inline int64_t apart(int64_t channel) { return channel % 512 == 0 ? channel + 2 * 16 : channel; }

// A pass over planes. For products, source and destination planes have rows of the same pitch.
template <typename T>
struct Planes {
  AxisPass y, x;
  std::vector<Run> columns;    // of each phase of the source
  std::vector<int64_t> reach;  // rows that each reads beyond its result's
  int64_t source_channels, width;
  int64_t images, pitch, rows;  // side by side; of a row; of a register tile
  int64_t group;                // rows of a group: what is packed together
  bool copies = false;          // the source is there once for each column of the kernel (for dot products)
  int64_t gap = 0;              // columns between the source's rows, and before the first (for dot products)
  int64_t l2_bytes = kL2Bytes;  // of it the packed source of a group
  int64_t source_row, source_plane, source_channel, destination_plane;

  Planes(AxisPass y_pass, AxisPass x_pass, int64_t source_channels, int64_t batch, const ConvKernels<T>& kernels)
      : y(std::move(y_pass)),
        x(std::move(x_pass)),
        source_channels(source_channels),
        width(x.destination.length) {
    for (int64_t phase = 0; phase < x.source.phases(); ++phase) {
      columns.push_back(run_of(x.source, phase, 0, x.source.length));
      width = std::max(width, columns.back().size());
    }
    reach.resize(y.source.phases());
    for (size_t k = 0; k < y.shift.size(); ++k) reach[y.source_phase[k]] = std::max(reach[y.source_phase[k]], y.shift[k]);
    const int64_t height = y.destination.length, lanes = kernels.lanes;
    // The cheapest register tiles: a vector costs one, what comes with an entry about two, and results that have to be
    // copied to their place a tenth more.
    double best = std::numeric_limits<double>::max();
    images = pitch = rows = 0;
    for (int64_t n = 1; n <= batch && n <= 4 * lanes; ++n) {
      const int64_t vectors = ceil_div(n * width, lanes);
      if (vectors > kernels.max_vectors) break;
      const int64_t tiles = ceil_div(height, std::min(height, kernels.max_vectors / vectors));
      const double copied = is_direct(n, vectors * lanes) ? 1 : 1.1;
      // With strides four planes are packed for one, or one for four: with few rows a tile, the same rows again.
      const int64_t of_tile = ceil_div(height, tiles);
      const double packed = is_strided() ? 0.6 * double(of_tile + y.reach) / double(of_tile) : 0;
      // The last images of a batch take as many vectors, however few they are.
      const double cost =
          (double(2 * tiles) + (1 + packed) * copied * double(height * vectors)) * double(ceil_div(batch, n));
      if (cost < best) {
        best = cost;
        images = n;
        pitch = vectors * lanes;
        rows = ceil_div(height, tiles);
      }
    }
    if (images == 0) return;
    set_strides();
  }

  // The source of dot products: one image.
  static Planes for_dots(AxisPass y, AxisPass x, int64_t source_channels, const ConvKernels<T>& kernels) {
    Planes p(std::move(y), std::move(x), source_channels, 0, kernels);
    const int64_t height = p.y.destination.length;
    p.images = 1;
    p.width = p.pitch = p.x.destination.length;
    const int64_t padding = -p.x.source.origin;
    constexpr int64_t kLine = 64 / sizeof(T);
    if (kernels.lanes < kLine && p.width >= kLine && padding <= kernels.lanes)
      p.gap = kernels.lanes;
    else
      p.copies = true;
    // Dot products of so many vectors: a third of the source, so that twice as many fit L1.
    const int64_t vectors = p.copies ? 16 : 32;
    p.rows = ceil_div(height, ceil_div(height, std::clamp<int64_t>(vectors * kernels.lanes / p.pitch, 1, height)));
    p.set_strides();
    return p;
  }

  // For dot products, whose grad_output is packed too.
  void share_l2() {
    l2_bytes = kL2Bytes * 5 / 8;
    set_strides();
  }

  // Whether results are where they belong.
  bool is_direct(int64_t images, int64_t pitch) const {
    return images == 1 && x.destination.extent == pitch && destination_phases() == 1;
  }

  // Of a channel.
  int64_t source_planes() const {
    return copies ? int64_t(x.shift.size()) : y.source.phases() * x.source.phases();
  }
  bool is_strided() const { return y.source.step * x.source.step * destination_phases() > 1; }
  int64_t destination_phases() const { return y.destination.phases() * x.destination.phases(); }

  void set_strides() {
    source_row = gap > 0 ? x.source.extent + gap : pitch;
    const int64_t row_bytes = sizeof(T) * source_channels * source_planes() * source_row;
    const int64_t fit = std::max<int64_t>(1, (l2_bytes / row_bytes - y.reach) / rows);
    group = std::min(ceil_div(y.destination.length, rows), fit) * rows;
    source_plane = (group + y.reach) * source_row;
    source_channel = apart(source_planes() * source_plane + gap);
    destination_plane = rows * pitch;
  }

  // Of sums.
  int64_t column_shift(size_t k) const {
    return copies || gap > 0 ? 0 : x.shift[k] - columns[x.source_phase[k]].begin;
  }
  // The segment of entries that need no shift.
  int64_t zero() const {
    int64_t least = 0;
    for (size_t k = 0; k < x.shift.size(); ++k) least = std::min(least, column_shift(k));
    return -least;
  }
  int64_t segments() const {
    int64_t largest = 0;
    for (size_t k = 0; k < x.shift.size(); ++k) largest = std::max(largest, column_shift(k));
    return zero() + largest + 1;
  }

  ConvTaps taps() const {
    ConvTaps taps{source_channel, {}, {}, destination_phases(), {}, segments()};
    for (size_t ky = 0; ky < y.shift.size(); ++ky)
      for (size_t kx = 0; kx < x.shift.size(); ++kx) {
        const int64_t plane = copies ? int64_t(kx) : y.source_phase[ky] * x.source.phases() + x.source_phase[kx];
        const int64_t column = gap > 0 ? gap + x.shift[kx] + x.source.origin : 0;
        taps.offset.push_back(plane * source_plane + y.shift[ky] * source_row + column);
        taps.phase.push_back(y.destination_phase[ky] * x.destination.phases() + x.destination_phase[kx]);
        taps.segment.push_back(zero() + column_shift(kx));
      }
    return taps;
  }

  int64_t source_block(double nonzeros_a_channel, int64_t channels) const {
    const int64_t bytes = sizeof(T) * source_planes() * (rows + y.reach) * source_row;
    // Copies are three times as large, and dot products are not loaded and stored. With strides there are four planes.
    return channels_a_block(bytes, nonzeros_a_channel, channels, copies || is_strided() ? 12 : 20);
  }
};

// What a shift by a column leaves (ConvEdges), for a register tile.
template <typename T>
class Edges {
 public:
  Edges(const Planes<T>& p, int64_t lanes)
      : repeat_(2 * lanes % p.pitch == 0),
        // A kernel may read two vectors of either.
        left_(std::max(p.rows * p.pitch, 2 * lanes)),
        right_(left_.size()) {
    for (int64_t i = 0; i < p.rows * p.pitch; ++i) {
      const int64_t place = i % p.pitch, column = place % p.width;
      if (place >= p.images * p.width) continue;
      if (column != 0) std::memset(&left_[i], -1, sizeof(T));
      if (column != p.width - 1) std::memset(&right_[i], -1, sizeof(T));
    }
  }
  ConvEdges<T> get() const { return {left_.data(), right_.data(), repeat_}; }

 private:
  bool repeat_;
  std::vector<T> left_, right_;
};

// Rows that follow each other on both sides go as one.
template <typename T>
void copy_rows(const ConvKernels<T>& kernels, ConvPlanes<T> planes) {
  if (planes.from_row == planes.width && planes.to_row == planes.width) {
    planes.width *= planes.rows;
    planes.rows = 1;
  }
  kernels.copy_planes(planes);
}

// Rows of one phase, and `channels` channels from `first` onwards, for pack_source.
template <typename T>
void pack_rows_of(const ConvKernels<T>& kernels, const Planes<T>& p, const at::Tensor& t, int64_t image, int64_t first,
                  int64_t channels, int64_t phase, int64_t begin, int64_t end, T* to) {
  const int64_t images = std::min(p.images, t.size(0) - image);
  const Axis &y = p.y.source, &x = p.x.source;
  const int64_t planes = p.source_planes() / y.phases();
  const Run run = run_of(y, phase, begin, end);
  const T* const from = t.const_data_ptr<T>() + image * t.stride(0) + first * t.stride(1) +
                        position(y, phase, run.begin) * t.stride(2);
  T* const phase_to = to + first * p.source_channel + phase * planes * p.source_plane;
  for (int64_t c = 0; c < channels; ++c)
    for (int64_t k = 0; k < planes; ++k) {
      T* const plane = phase_to + c * p.source_channel + k * p.source_plane;
      std::fill(plane, plane + (run.begin - begin) * p.source_row, T(0));
      std::fill(plane + (run.end - begin) * p.source_row, plane + (end - begin) * p.source_row, T(0));
    }
  T* const rows_to = phase_to + (run.begin - begin) * p.source_row;
  if (x.step == 2) {
    // Column 0 of the map begins a phase's plane, column 1 the other's.
    const int64_t even = -x.origin % 2, odd = 1 - even;
    kernels.split_columns({channels, images, run.size(), p.columns[even].size(), p.columns[odd].size(), from, t.stride(1),
                           t.stride(0), y.step * t.stride(2), rows_to + even * p.source_plane,
                           rows_to + odd * p.source_plane, p.source_channel, p.width, p.source_row});
    return;
  }
  for (int64_t k = 0; k < planes; ++k) {
    const Run columns = p.copies ? run_of(x, 0, p.x.shift[k], p.x.shift[k] + p.pitch) : p.columns[0];
    const int64_t column = p.copies ? columns.begin - p.x.shift[k] : p.gap > 0 ? p.gap + columns.begin + x.origin : 0;
    copy_rows(kernels, {channels, images, run.size(), columns.size(), from + columns.begin + x.origin, t.stride(1),
                        t.stride(0), y.step * t.stride(2), rows_to + k * p.source_plane + column, p.source_channel,
                        p.width, p.source_row});
  }
}

// What rows [begin, end) of the result read of the images from `image` onwards. `to` is zero where nothing was packed yet.
template <typename T>
void pack_source(const ConvKernels<T>& kernels, const Planes<T>& p, const at::Tensor& t, int64_t image, int64_t begin,
                 int64_t end, T* to) {
  if (image + p.images > t.size(0)) std::fill_n(to, p.source_channels * p.source_channel, T(0));
  // Phases of a channel one after the other, which share its lines.
  const int64_t phases = p.y.source.phases(), together = phases > 1 ? 1 : p.source_channels;
  for (int64_t c = 0; c < p.source_channels; c += together)
    for (int64_t phase = 0; phase < phases; ++phase)
      if (p.y.source.phase[phase] >= 0)
        pack_rows_of(kernels, p, t, image, c, together, phase, begin, end + p.reach[phase], to);
}

// Results of the channels [first, last) of rows [begin, end) to their place.
template <typename T>
void unpack_results(const ConvKernels<T>& kernels, const Planes<T>& p, const T* results, const at::Tensor& t,
                    int64_t image, int64_t first, int64_t last, int64_t begin, int64_t end) {
  const int64_t images = std::min(p.images, t.size(0) - image), channel = p.destination_phases() * p.destination_plane;
  const Axis &y = p.y.destination, &x = p.x.destination;
  for (int64_t row = 0; row < y.step; ++row) {
    const int64_t rows = std::min(end, ceil_div(y.extent - row, y.step)) - begin;
    if (rows <= 0) continue;
    const T* const from = results + y.phase[row] * x.phases() * p.destination_plane;
    T* const to = t.mutable_data_ptr<T>() + image * t.stride(0) + first * t.stride(1) +
                  (begin * y.step + row) * t.stride(2);
    if (x.step == 2)
      kernels.join_columns({last - first, images, rows, (x.extent + 1) / 2, x.extent / 2, to, t.stride(1), t.stride(0),
                            y.step * t.stride(2), from + x.phase[0] * p.destination_plane,
                            from + x.phase[1] * p.destination_plane, channel, p.width, p.pitch});
    else
      kernels.copy_planes({last - first, images, rows, x.extent, from, channel, p.width, p.pitch, to, t.stride(1),
                           t.stride(0), y.step * t.stride(2)});
  }
}

}  // namespace uasparse
