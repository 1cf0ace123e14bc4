// A kernel of one tap and no padding, over copies of the positions that it takes (conv_in_place.cpp does the rest):
//   with strides        they are copied out of the map. Where stride is 2, that reads half the lines of the map, and the
//                       products run over a quarter of it.
//   planes that are not whole vectors    each copied plane begins with a cache line: a vector that crosses two costs two
//                       loads, and a source is read once a nonzero. Small planes lie side by side, images together.
// T: the type of sums; S: of maps and weights.

#include <algorithm>

#include "cpu/conv_pass.h"

namespace uasparse {
namespace {

// A stride of 2 in bfloat16 goes by pairs of words, as numbers of 32 bits: compilers make twice as fast loops of that.
template <typename S, int64_t kStride>
void take_row(const S* from, int64_t stride, int64_t width, S* to) {
  const int64_t step = kStride ? kStride : stride;
  int64_t x = 0;
  if constexpr (kStride == 2 && std::is_same_v<S, BFloat16>)
    for (; x + 1 < width; ++x) {  // the last may have no other
      uint32_t pair;
      std::memcpy(&pair, from + 2 * x, sizeof pair);
      to[x].bits = uint16_t(pair);
    }
  for (; x < width; ++x) to[x] = from[x * step];
}

// A row of `extent` numbers, zero where nothing was taken.
template <typename S>
void put_row(const S* from, int64_t stride, int64_t width, int64_t extent, S* to) {
  if (stride == 2) {
    const int64_t pairs = std::min(width, extent / 2);
    for (int64_t x = 0; x < pairs; ++x) {
      if constexpr (std::is_same_v<S, BFloat16>) {
        const uint32_t pair = from[x].bits;
        std::memcpy(to + 2 * x, &pair, sizeof pair);
      } else {
        to[2 * x] = from[x];
        to[2 * x + 1] = 0;
      }
    }
    if (pairs < width) to[2 * pairs] = from[pairs];
    std::fill(to + std::min(extent, 2 * width), to + extent, S{});
  } else {
    std::fill_n(to, extent, S{});
    for (int64_t x = 0; x < width; ++x) to[x * stride] = from[x];
  }
}

// How copies lie: [tiles][channels][pitch], `images` of them side by side.
struct Side {
  int64_t positions, images, tiles, pitch;

  Side(const Geometry& g, int64_t lanes) : positions(g.out_height * g.out_width), images(1) {
    // Side by side where a plane is less than eight vectors, so that few are met; results must then be copied too. No more
    // images than come within 5 % of the fewest: threads that have images of their own read what they wrote.
    constexpr int64_t kVectors = 8, kMost = 32;
    const auto vectors = [&](int64_t n) { return ceil_div(g.batch, n) * ceil_div(n * positions, lanes); };
    const int64_t most = positions < kVectors * lanes ? std::min(g.batch, kMost * lanes / std::max<int64_t>(1, positions)) : 1;
    int64_t fewest = vectors(1);
    for (int64_t n = 2; n <= most; ++n) fewest = std::min(fewest, vectors(n));
    while (20 * vectors(images) > 21 * fewest) ++images;
    tiles = ceil_div(g.batch, images);
    pitch = ceil_div(images * positions, lanes) * lanes;
  }

  // The kernel over the copies.
  Geometry geometry(const Geometry& g) const {
    static constexpr int64_t kOnes[] = {1, 1};
    Geometry copies = g;
    copies.batch = tiles;
    copies.height = copies.out_height = images == 1 ? g.out_height : 1;
    copies.width = copies.out_width = images == 1 ? g.out_width : images * positions;
    copies.stride = at::IntArrayRef(kOnes, 2);
    return copies;
  }
};

// Copies of the positions of a map of some channels that the strides take.
template <typename S>
class Copies {
 public:
  Copies(const Geometry& g, const Side& side, int64_t channels, at::IntArrayRef stride)
      : side_(side), channels_(channels), batch_(g.batch), height_(g.out_height), width_(g.out_width), stride_(stride),
        memory_(sizeof(S) * side.tiles * channels * side.pitch) {}

  // As maps of side.geometry(), which live no longer than this.
  at::Tensor maps(const at::TensorOptions& options) const {
    const int64_t height = side_.images == 1 ? height_ : 1, width = side_.images == 1 ? width_ : side_.images * side_.positions;
    return at::from_blob(memory_.template as<S>(), {side_.tiles, channels_, height, width},
                         {channels_ * side_.pitch, side_.pitch, width, 1}, options);
  }

  at::Tensor take(const at::Tensor& map) const {
    const S* const data = numbers_of<S>(map);
    for_each_plane(side_.tiles * side_.images, [&](int64_t image, int64_t channel, S* to) {
      if (image >= batch_) return std::fill_n(to, side_.positions, S{}), void();
      const S* from = data + image * map.stride(0) + channel * map.stride(1);
      if (is_whole()) return std::copy_n(from, side_.positions, to), void();
      for (int64_t y = 0; y < height_; ++y, from += stride_[0] * map.stride(2), to += width_)
        stride_[1] == 2 ? take_row<S, 2>(from, 2, width_, to) : take_row<S, 0>(from, stride_[1], width_, to);
    });
    return maps(map.options());
  }

  // Writes them to their place, and zeros to all others.
  void put(const at::Tensor& map) const {
    S* const data = mutable_numbers_of<S>(map);
    for_each_plane(batch_, [&](int64_t image, int64_t channel, const S* from) {
      S* const plane = data + image * map.stride(0) + channel * map.stride(1);
      if (is_whole()) return std::copy_n(from, side_.positions, plane), void();
      const int64_t extent = map.size(3);
      for (int64_t y = 0; y < map.size(2); ++y) {
        S* const row = plane + y * map.stride(2);
        if (y % stride_[0] == 0 && y / stride_[0] < height_)
          put_row(from + y / stride_[0] * width_, stride_[1], width_, extent, row);
        else
          std::fill_n(row, extent, S{});
      }
    });
  }

 private:
  bool is_whole() const { return stride_[0] == 1 && stride_[1] == 1; }

  template <typename Visit>
  void for_each_plane(int64_t images, Visit visit) const {
    at::parallel_for(0, images * channels_, 8, [&](int64_t first, int64_t last) {
      for (int64_t i = first; i < last; ++i) {
        const int64_t image = i / channels_, channel = i % channels_;
        visit(image, channel,
              memory_.template as<S>() + (image / side_.images * channels_ + channel) * side_.pitch +
                  image % side_.images * side_.positions);
      }
    });
  }

  const Side& side_;
  int64_t channels_, batch_, height_, width_;
  at::IntArrayRef stride_;
  Workspace memory_;
};

bool is_strided(const Geometry& g) { return g.stride[0] * g.stride[1] > 1; }

// Whether copies can serve, and serve maps that no stride asks to copy: where a vector is a cache line that planes do not
// keep to.
template <typename T, typename S>
bool can(const Geometry& g, const ConvWeight& w, const at::Tensor& input, const at::Tensor& output, const Side& side) {
  constexpr int64_t kReads = 8;
  const auto& kernels = kernels_of<T, S>();
  const int64_t lanes = kernels.lanes;
  if (g.batch == 0 || g.kernel_h * g.kernel_w != 1 || g.padding[0] != 0 || g.padding[1] != 0 ||
      !has_plain_planes(input) || !has_plain_planes(output) || side.positions * side.images < lanes)
    return false;
  if (std::is_same_v<S, BFloat16> && ConvQuads<T>::can_forward(w)) return false;  // nor has in place
  if (is_strided(g)) return true;
  return lanes * int64_t(sizeof(S)) == 64 && side.positions % lanes != 0 &&
         3 * side.pitch >= 2 * kernels.max_vectors * lanes && w.nonzeros() >= kReads * std::max(g.in, g.out);
}

// Whether a product gains by a copy of its source that serves alignment alone: where enough nonzeros read it (14 x 14, 256
// channels to 1024 at 90 %, 102 a channel: 1.22 to 1.00 ms; back, 26: nothing).
bool pays(const Geometry& g, const ConvWeight& w, const Side& side, int64_t source_channels) {
  constexpr int64_t kReads = 40;
  return is_strided(g) || side.images > 1 || w.nonzeros() >= kReads * source_channels;
}

constexpr int64_t kUnit[] = {1, 1};
const at::IntArrayRef kUnitStride(kUnit, 2);

}  // namespace

template <typename T, typename S>
bool forward_taken(const Geometry& g, const ConvWeight& w, const at::Tensor& input, const at::Tensor& weight,
                   const std::vector<T>& bias, const at::Tensor& output) {
  if (!has_kernels<S>()) return false;
  const Side side(g, kernels_of<T, S>().lanes);
  if (!can<T, S>(g, w, input, output, side) || !pays(g, w, side, g.in)) return false;
  const Copies<S> from(g, side, g.in, g.stride);
  const at::Tensor source = from.take(input);
  if (side.images == 1) return forward_in_place<T, S>(side.geometry(g), w, source, weight, bias, output);
  const Copies<S> to(g, side, g.out, kUnitStride);
  if (!forward_in_place<T, S>(side.geometry(g), w, source, weight, bias, to.maps(output.options()))) return false;
  to.put(output);
  return true;
}

template <typename T, typename S>
void backward_taken(const Geometry& g, const ConvWeight& w, const at::Tensor& grad_output, const at::Tensor& input,
                    const at::Tensor& weight, ConvGradients* gradients) {
  if (!has_kernels<S>()) return;
  const int64_t lanes = kernels_of<T, S>().lanes;
  const Side side(g, lanes);
  if (!can<T, S>(g, w, input, grad_output, side)) return;
  const Geometry copies = side.geometry(g);
  // For alignment alone grad_output is copied, and for grad_input: dot products hold it in registers, and read of the input
  // too little to gain.
  if (side.images == 1 && !is_strided(g)) {
    if (!gradients->input.defined() || !has_plain_planes(gradients->input) || !pays(g, w, side, g.out)) return;
    const Copies<S> outputs(g, side, g.out, kUnitStride);
    if (input_gradient_in_place<T, S>(copies, w, outputs.take(grad_output), weight, gradients->input))
      gradients->input = at::Tensor();
    return;
  }
  const bool aligned = side.images == 1 && side.positions % lanes == 0;
  const Copies<S> inputs(g, side, g.in, g.stride), outputs(g, side, aligned ? 0 : g.out, kUnitStride);
  const at::Tensor grads = aligned ? grad_output : outputs.take(grad_output);
  if (gradients->weight.defined() &&
      weight_gradient_in_place<T, S>(copies, w, grads, inputs.take(input), gradients->weight))
    gradients->weight = at::Tensor();
  if (gradients->input.defined() && has_plain_planes(gradients->input) &&
      input_gradient_in_place<T, S>(copies, w, grads, weight, inputs.maps(input.options()))) {
    inputs.put(gradients->input);
    gradients->input = at::Tensor();
  }
}

#define INSTANTIATE(T, S)                                                                                          \
  template bool forward_taken<T, S>(const Geometry&, const ConvWeight&, const at::Tensor&, const at::Tensor&,        \
                                    const std::vector<T>&, const at::Tensor&);                                       \
  template void backward_taken<T, S>(const Geometry&, const ConvWeight&, const at::Tensor&, const at::Tensor&,       \
                                     const at::Tensor&, ConvGradients*);
INSTANTIATE(float, float)
INSTANTIATE(double, double)
INSTANTIATE(float, BFloat16)
#undef INSTANTIATE

}  // namespace uasparse
