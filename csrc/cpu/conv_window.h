// A sliding window of packed rows of one tile of images.
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

inline void pack_rows(const ConvKernels<float>& k, const ConvMove<float>& m, const float* const* images) {
  k.pack(m, images);
}
inline void pack_rows(const ConvKernels<double>& k, const ConvMove<double>& m, const double* const* images) {
  k.pack(m, images);
}
inline void pack_rows(const ConvKernels<float>& k, const ConvMove<float>& m, const BFloat16* const* images) {
  k.pack_bf16(m, images);
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

// Moves the image rows of packed rows [begin, end) of the images from `image` onwards between them and `packed`.
template <typename T, typename S>
class RowMover {
 public:
  RowMover(const ConvKernels<T>& kernels, const Axis& y, const Axis& x, const PackedLayout& layout,
           const Images<S>& images)
      : kernels_(kernels), y_(y), x_(x), layout_(layout), images_(images), channel_offset_(layout.channels) {
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
    if (rows == 0) return;
    const bool one_run = images_.stride_h == width * images_.stride_w;
    const int64_t runs = one_run ? 1 : rows, length = one_run ? rows * width : width;
    const bool by_channels = images_.stride_c == 1 && (images_.stride_w != 1 || length < kernels_.lanes);
    for (int64_t run = 0; run < runs; ++run) {
      S* from[kMaxLanes];
      for (int64_t l = 0; l < kernels_.lanes; ++l) {
        const bool present = image + l < images_.batch;
        from[l] = present ? images_.data + (image + l) * images_.stride_n + channel_begin * images_.stride_c +
                                (positions_.first + run) * images_.stride_h
                          : nullptr;
      }
      const int64_t* offset = positions_.offset.data() + run * width;
      const int64_t* channel_offset = channel_offset_.data() + channel_begin;
      const int64_t channels = channel_end - channel_begin;
      if (by_channels)
        kernel(kernels_, {length, channels, images_.stride_w, 1, offset, channel_offset, packed}, from);
      else
        kernel(kernels_, {channels, length, images_.stride_c, images_.stride_w, channel_offset, offset, packed}, from);
    }
  }

 private:
  const ConvKernels<T>& kernels_;
  const Axis &y_, &x_;
  const PackedLayout& layout_;
  const Images<S> images_;
  std::vector<int64_t> channel_offset_;
  Positions positions_;
};

template <typename T, typename S>
class Window {
 public:
  // A window for `rows` rows at a time.
  Window(const ConvKernels<T>& kernels, const AxisPass& y, const AxisPass& x, const PackedLayout& layout,
         const Images<const S>& images, int64_t rows)
      : y_(y.source),
        layout_(layout),
        mover_(kernels, y.source, x.source, layout, images),
        capacity_(std::min(2 * rows + 4, std::max(rows, y.source.length))),
        memory_(sizeof(T) * (capacity_ * layout.row)) {}

  // Goes to packed row `row` of the images from `image` onwards.
  void restart(int64_t image, int64_t row) {
    image_ = image;
    first_ = packed_ = row;
    // Padding is zero and stays so: only positions of the image are written.
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
      for (int64_t q = packed_; q < end; ++q) {
        const int64_t y = q * y_.step + y_.origin;
        if (y < 0 || y + y_.step > y_.extent)
          std::memset(data + (q - first_) * layout_.row, 0, sizeof(T) * layout_.row);
      }
      mover_.move(image_, packed_, end, data + (packed_ - first_) * layout_.row,
                  [](const auto& k, const ConvMove<T>& m, const S* const* images) { pack_rows(k, m, images); });
      packed_ = end;
    }
    return data + (begin - first_) * layout_.row;
  }

 private:
  const Axis& y_;
  const PackedLayout& layout_;
  RowMover<T, const S> mover_;
  int64_t capacity_;
  Workspace memory_;
  int64_t image_ = 0, first_ = 0, packed_ = 0;
};

}  // namespace uasparse
