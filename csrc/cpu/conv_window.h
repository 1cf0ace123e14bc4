// A sliding window of packed rows of one tile: a lane each of its images, or of strips of their rows where there are
// fewer images than lanes.
//
// Rows are packed when the work reaches them, so that they are still in L2 when they are read and no activation is ever
// packed as a whole.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

#include "cpu/conv_geometry.h"
#include "cpu/masked_conv2d.h"
#include "cpu/workspace.h"

namespace uasparse {

// A tensor [N, C, H, W] of any strides.
template <typename S>
struct Images {
  S* data;
  int64_t batch, channels, stride_n, stride_c, stride_h, stride_w;
};

// What the lanes of a tile hold: `images` images in `strips` strips each, of `rows` rows of the pass; lane
// image * strips + strip.
struct Lanes {
  int64_t images, strips, rows;

  // For images of `height` rows of which each strip packs `reach` more.
  Lanes(int64_t batch, int64_t height, int64_t reach, int64_t lanes) : images(1), strips(1), rows(height) {
    double best = -1;
    for (int64_t n = std::min(batch, lanes); n >= 1; --n) {
      const int64_t of_strip = (height + lanes / n - 1) / (lanes / n), tiles = (batch + n - 1) / n;
      // Packing a row costs about half of what the products of a row do.
      const double cost = double(tiles) * (double(of_strip) + 0.5 * double(reach));
      if (best < 0 || cost < best) {
        best = cost;
        images = n;
        rows = of_strip;
        strips = (height + rows - 1) / rows;
      }
    }
  }
  int64_t tiles(int64_t batch) const { return (batch + images - 1) / images; }
};

inline void pack_rows(const ConvKernels<float>& k, const ConvMove<float>& m, const float* const* images) {
  k.pack(m, images);
}
inline void pack_rows(const ConvKernels<double>& k, const ConvMove<double>& m, const double* const* images) {
  k.pack(m, images);
}
inline void pack_rows(const ConvKernels<float>& k, const ConvMove<float>& m, const BFloat16* const* images) {
  k.pack_bf16(m, images);
}
inline void pack_rows(const ConvBf16Kernels& k, const ConvMove<BFloat16>& m, const BFloat16* const* images) {
  k.pack(m, images);
}
inline void unpack_rows(const ConvBf16Kernels& k, const ConvMove<float>& m, BFloat16* const* images) {
  k.unpack(m, images);
}
inline void unpack_rows(const ConvKernels<float>& k, const ConvMove<float>& m, float* const* images) {
  k.unpack(m, images);
}
inline void unpack_rows(const ConvKernels<double>& k, const ConvMove<double>& m, double* const* images) {
  k.unpack(m, images);
}
inline void unpack_rows(const ConvKernels<float>& k, const ConvMove<float>& m, BFloat16* const* images) {
  k.unpack_bf16(m, images);
}

// Moves packed rows [begin, end) of the strips of a tile of images, from `image` onwards, between them and `packed`. A
// lane without an image row is packed as zero and not unpacked. T: the type of what is packed; S: of the images.
template <typename Kernels, typename T, typename S>
class RowMover {
 public:
  RowMover(const Kernels& kernels, const Axis& y, const Axis& x, const PackedLayout& layout, const Lanes& lanes,
           const Images<S>& images)
      : kernels_(kernels), y_(y), x_(x), layout_(layout), lanes_(lanes), images_(images),
        channel_offset_(layout.channels) {
    for (int64_t c = 0; c < layout.channels; ++c) channel_offset_[c] = c * layout.channel;
  }

  template <typename Move>
  void move(int64_t image, int64_t begin, int64_t end, T* packed, Move&& kernel) {
    move_channels(image, begin, end, 0, layout_.channels, packed, kernel);
  }

  template <typename Move>
  void move_channels(int64_t image, int64_t begin, int64_t end, int64_t channel_begin, int64_t channel_end, T* packed,
                     Move&& kernel) {
    find_positions(y_, x_, layout_, kernels_.lanes, begin, end, &positions_);
    const int64_t rows = positions_.last - positions_.first, width = x_.extent;
    const bool joined = images_.stride_h == width * images_.stride_w;
    for (int64_t row = 0; row < rows;) {
      // Rows that follow each other in memory, and that the same lanes have, go together.
      int64_t count = 1;
      while (joined && row + count < rows && same_lanes(row, row + count)) ++count;
      S* from[kMaxLanes];
      for (int64_t l = 0; l < kernels_.lanes; ++l) {
        const int64_t n = image + l / lanes_.strips, y = image_row(row, l);
        from[l] = is_there(n, l, y) ? images_.data + n * images_.stride_n + channel_begin * images_.stride_c +
                                          y * images_.stride_h
                                    : nullptr;
      }
      const int64_t* offset = positions_.offset.data() + row * width;
      const int64_t* channel_offset = channel_offset_.data() + channel_begin;
      const int64_t channels = channel_end - channel_begin, length = count * width;
      if (images_.stride_c == 1 && (images_.stride_w != 1 || length < kernels_.lanes))
        kernel(kernels_, {length, channels, images_.stride_w, 1, offset, channel_offset, packed}, from);
      else
        kernel(kernels_, {channels, length, images_.stride_c, images_.stride_w, channel_offset, offset, packed}, from);
      row += count;
    }
  }

 private:
  int64_t image_row(int64_t row, int64_t lane) const {
    return positions_.first + row + lane % lanes_.strips * lanes_.rows * y_.step;
  }
  bool is_inside(int64_t y) const { return y >= 0 && y < y_.extent; }
  bool is_there(int64_t image, int64_t lane, int64_t y) const {
    return lane < lanes_.images * lanes_.strips && image < images_.batch && is_inside(y);
  }
  bool same_lanes(int64_t row, int64_t other) const {
    for (int64_t strip = 0; strip < lanes_.strips; ++strip)
      if (is_inside(image_row(row, strip)) != is_inside(image_row(other, strip))) return false;
    return true;
  }

  const Kernels& kernels_;
  const Axis &y_, &x_;
  const PackedLayout& layout_;
  const Lanes& lanes_;
  const Images<S> images_;
  std::vector<int64_t> channel_offset_;
  Positions positions_;
};

template <typename Kernels, typename T, typename S>
class Window {
 public:
  // A window for `rows` rows at a time, of `length`.
  Window(const Kernels& kernels, const AxisPass& y, const AxisPass& x, const PackedLayout& layout,
         const Lanes& lanes, const Images<const S>& images, int64_t rows, int64_t length)
      : layout_(layout),
        mover_(kernels, y.source, x.source, layout, lanes, images),
        capacity_(std::min(2 * rows + 4, std::max(rows, length))),
        memory_(sizeof(T) * (capacity_ * layout.row)) {}

  // Goes to packed row `row` of the images from `image` onwards.
  void restart(int64_t image, int64_t row) {
    image_ = image;
    first_ = packed_ = row;
    // Columns of padding are zero and stay so: only columns of the image are written.
    std::memset(memory_.template as<T>(), 0, sizeof(T) * capacity_ * layout_.row);
  }

  // Rows [begin, end), each layout.row after the one before; `begin` must not decrease.
  const T* rows(int64_t begin, int64_t end) {
    T* const data = memory_.template as<T>();
    if (end - first_ > capacity_) {
      const int64_t kept = std::max<int64_t>(0, packed_ - begin);
      if (kept > 0) std::memmove(data, data + (begin - first_) * layout_.row, sizeof(T) * kept * layout_.row);
      packed_ = std::max(packed_, begin);
      first_ = begin;
    }
    if (packed_ < end) {
      mover_.move(image_, packed_, end, data + (packed_ - first_) * layout_.row,
                  [](const auto& k, const ConvMove<T>& m, const S* const* images) { pack_rows(k, m, images); });
      packed_ = end;
    }
    return data + (begin - first_) * layout_.row;
  }

 private:
  const PackedLayout& layout_;
  RowMover<Kernels, T, const S> mover_;
  int64_t capacity_;
  Workspace memory_;
  int64_t image_ = 0, first_ = 0, packed_ = 0;
};

}  // namespace uasparse
