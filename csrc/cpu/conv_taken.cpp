// A kernel of one tap with strides and no padding: the positions that it takes are copied out, and it is one of stride 1
// over them (conv_in_place.cpp). Where stride is 2, that reads half the lines of the map, and the products run over a
// quarter of it.

#include <algorithm>

#include "cpu/conv_pass.h"

namespace uasparse {
namespace {

template <typename T, int64_t kStride>
void take_row(const T* from, int64_t stride, int64_t width, T* to) {
  const int64_t step = kStride ? kStride : stride;
  for (int64_t x = 0; x < width; ++x) to[x] = from[x * step];
}

// A row of `extent` numbers, zero where nothing was taken.
template <typename T>
void put_row(const T* from, int64_t stride, int64_t width, int64_t extent, T* to) {
  if (stride == 2) {
    const int64_t pairs = std::min(width, extent / 2);
    for (int64_t x = 0; x < pairs; ++x) {
      to[2 * x] = from[x];
      to[2 * x + 1] = 0;
    }
    if (pairs < width) to[2 * pairs] = from[pairs];
    std::fill(to + std::min(extent, 2 * width), to + extent, T(0));
  } else {
    std::fill_n(to, extent, T(0));
    for (int64_t x = 0; x < width; ++x) to[x * stride] = from[x];
  }
}

constexpr int64_t kOnes[] = {1, 1};

}  // namespace

template <typename T>
TakenPositions<T>::TakenPositions(const Geometry& g)
    : geometry(g), stride_(g.stride), memory_(sizeof(T) * g.batch * g.in * g.out_height * g.out_width) {
  geometry.height = g.out_height;
  geometry.width = g.out_width;
  geometry.stride = at::IntArrayRef(kOnes, 2);
}

template <typename T>
bool TakenPositions<T>::can(const Geometry& g, const at::Tensor& map) {
  return g.kernel_h * g.kernel_w == 1 && g.stride[0] * g.stride[1] > 1 && g.padding[0] == 0 && g.padding[1] == 0 &&
         has_plain_planes(map) && g.out_height * g.out_width >= conv_kernels<T>().lanes;
}

template <typename T>
at::Tensor TakenPositions<T>::maps(const at::TensorOptions& options) const {
  return at::from_blob(memory_.template as<T>(), {geometry.batch, geometry.in, geometry.height, geometry.width}, options);
}

template <typename T>
at::Tensor TakenPositions<T>::take(const at::Tensor& map) const {
  const int64_t height = geometry.height, width = geometry.width;
  const T* const from = map.const_data_ptr<T>();
  at::parallel_for(0, geometry.batch * geometry.in, 8, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) {
      const T* row = from + i / geometry.in * map.stride(0) + i % geometry.in * map.stride(1);
      T* to = memory_.template as<T>() + i * height * width;
      for (int64_t y = 0; y < height; ++y, row += stride_[0] * map.stride(2), to += width)
        stride_[1] == 2 ? take_row<T, 2>(row, 2, width, to) : take_row<T, 0>(row, stride_[1], width, to);
    }
  });
  return maps(map.options());
}

template <typename T>
void TakenPositions<T>::put(const at::Tensor& map) const {
  const int64_t height = geometry.height, width = geometry.width, extent = map.size(3);
  T* const to = map.mutable_data_ptr<T>();
  at::parallel_for(0, geometry.batch * geometry.in, 8, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) {
      T* const plane = to + i / geometry.in * map.stride(0) + i % geometry.in * map.stride(1);
      const T* from = memory_.template as<const T>() + i * height * width;
      for (int64_t y = 0; y < map.size(2); ++y) {
        T* const row = plane + y * map.stride(2);
        if (y % stride_[0] == 0 && y / stride_[0] < height)
          put_row(from + y / stride_[0] * width, stride_[1], width, extent, row);
        else
          std::fill_n(row, extent, T(0));
      }
    }
  });
}

template class TakenPositions<float>;
template class TakenPositions<double>;

}  // namespace uasparse
