// masked_conv2d with neighbouring positions of a row a vector: for stride 1 and planes that fit L2, and with AVX-512 for
// float32 with strides, of rows by at most 4 and of columns by at most 2.
//
// A few images lie side by side, so that a row of them is a whole number of vectors: planes [channels][rows][images *
// columns], without columns of padding. A tap of the kernel is then a number of rows, which a vector is read away from
// its output, and a shift by a few columns, which the entries of one column of the kernel share.
//   products      sum the entries of one shift first and shift the sum, in registers (masked_conv2d_impl.h). So a source is
//                 packed once, by copying rows (no transpose), and as many channels as possible fit L1. Where one image
//                 fills the vectors, results go straight to their place.
//   dot products  with AVX-512 likewise shift grad_output, in registers, once for the entries of one shift. An infinity
//                 in a column of the input's edge meets the zeros that come in there: not a number. With fewer registers
//                 they take the source with a gap between rows, which are read as they come, aligned or not. Where a row
//                 is shorter than a vector, or the padding wider, the source is copied once for each column of the
//                 kernel, already shifted. (Lists by shift would be short here, and a branch mispredicted for each costs
//                 more than the copies.)
// Weights in blocks: conv_quads_by_space.cpp.

#include "cpu/conv_pass.h"
#include "cpu/conv_planes.h"

namespace uasparse {
namespace {

constexpr int64_t kResultBytes = 512 << 10;  // of L2 the results that a product adds to
constexpr int64_t kMaxSegments = 9;

// destination = product of the source with the weights of the lists.
template <typename T>
void run_products(const ConvKernels<T>& kernels, const Planes<T>& p, const ConvEntries<T>& lists,
                  const at::Tensor& source, const at::Tensor& destination, const T* bias) {
  const int64_t height = p.y.destination.length, channels = destination.size(1), phases = p.destination_phases();
  const bool direct = p.is_direct(p.images, p.pitch);
  // Results that stay in L2 while the blocks pass.
  const int64_t result_bytes = sizeof(T) * phases * p.destination_plane;
  const int64_t together = direct ? channels : std::clamp<int64_t>(kResultBytes / result_bytes, 1, channels);
  const Edges<T> edges(p, kernels.lanes);
  const int64_t tiles = ceil_div(source.size(0), p.images), groups = ceil_div(height, p.group);
  const int64_t parts = even_parts(tiles * groups, channels);
  at::parallel_for(0, tiles * groups * parts, 1, [&](int64_t first_task, int64_t last_task) {
    const Workspace packed(sizeof(T) * p.source_channels * p.source_channel);
    const Workspace result(direct ? 0 : together * result_bytes);
    std::fill_n(packed.as<T>(), p.source_channels * p.source_channel, T(0));
    for (int64_t task = first_task; task < last_task; ++task) {
      const int64_t part = task % parts, image = task / parts / groups * p.images;
      const int64_t begin = task / parts % groups * p.group, end = std::min(begin + p.group, height);
      const int64_t channel_begin = channels * part / parts, channel_end = channels * (part + 1) / parts;
      pack_source(kernels, p, source, image, begin, end, packed.as<T>());
      for (int64_t r = begin; r < end; r += p.rows) {
        const int64_t stop = std::min(r + p.rows, end);
        for (int64_t first = channel_begin; first < channel_end; first += together) {
          const int64_t last = std::min(first + together, channel_end);
          T* const out = direct ? destination.mutable_data_ptr<T>() + image * destination.stride(0) +
                                      first * destination.stride(1) + r * p.pitch
                                : result.as<T>();
          for (int64_t b = 0; b < lists.blocks; ++b)
            kernels.shifted_product({lists.entries(), lists.first(b) + first * phases * lists.segments, lists.segments,
                                     p.zero(), 0, (last - first) * phases, packed.as<const T>() + (r - begin) * p.pitch,
                                     out, direct ? destination.stride(1) : p.destination_plane, b == 0,
                                     bias ? bias + first : nullptr, edges.get(),
                                     int((stop - r) * p.pitch / kernels.lanes)});
          if (!direct) unpack_results(kernels, p, result.as<const T>(), destination, image, first, last, r, stop);
        }
      }
    }
  });
}

// sums = dot products of grad_output, where it is, with the input, over chunks of the batch.
template <typename T>
void run_dots(const ConvKernels<T>& kernels, const Planes<T>& p, const ConvPlaces& places,
              const at::Tensor& grad_output, const at::Tensor& input, PartialSums<T>& sums, int64_t parts) {
  const int64_t height = p.y.destination.length, channels = grad_output.size(1), batch = input.size(0);
  at::parallel_for(0, sums.chunks * parts, 1, [&](int64_t first, int64_t last) {
    const Workspace packed(sizeof(T) * p.source_channels * p.source_channel);
    std::fill_n(packed.as<T>(), p.source_channels * p.source_channel, T(0));
    for (int64_t task = first; task < last; ++task) {
      const int64_t chunk = task / parts, part = task % parts;
      for (int64_t image = batch * chunk / sums.chunks; image < batch * (chunk + 1) / sums.chunks; ++image)
        for (int64_t begin = 0; begin < height; begin += p.group) {
          const int64_t end = std::min(begin + p.group, height);
          pack_source(kernels, p, input, image, begin, end, packed.as<T>());
          for (int64_t r = begin; r < end; r += p.rows) {
            const int64_t rows = std::min(r + p.rows, end) - r, vectors = p.pitch / kernels.lanes;
            const int64_t first_channel = channels * part / parts, last_channel = channels * (part + 1) / parts;
            const T* const from = packed.as<const T>() + (r - begin) * p.source_row;
            const T* const to = grad_output.const_data_ptr<T>() + image * grad_output.stride(0) + r * p.pitch;
            for (int64_t b = 0; b < places.blocks; ++b)
              if (p.copies && rows * vectors <= kernels.max_piece)
                kernels.piece_sddmm({places.offset(), places.first() + b, places.blocks, first_channel, last_channel, from,
                                     0, to, 0, grad_output.stride(1), 1, int(rows * vectors),
                                     (rows * vectors - 1) * kernels.lanes, 0, sums.weight(chunk)});
              else
                kernels.sddmm({places.offset(), places.first() + b, places.blocks, first_channel, last_channel, from,
                               p.source_row, to, p.pitch, grad_output.stride(1), p.gap > 0 ? rows : 1,
                               p.gap > 0 ? vectors : rows * vectors, sums.weight(chunk)});
          }
        }
    }
  });
}

// sums = dot products of shifted grad_output with the input, over chunks of the tiles of images.
template <typename T>
void run_shifted_dots(const ConvKernels<T>& kernels, const Planes<T>& p, const ConvShiftedPlaces& places,
                      const at::Tensor& grad_output, const at::Tensor& input, PartialSums<T>& sums, int64_t parts) {
  const int64_t height = p.y.destination.length, channels = grad_output.size(1), batch = input.size(0);
  const int64_t tiles = ceil_div(batch, p.images);
  // Where a tile is a whole plane: parts of planes would come from far away, one by one.
  const bool direct = p.is_direct(p.images, p.pitch) && p.rows == height;
  const int64_t grad_channel = direct ? grad_output.stride(1) : apart(p.group * p.pitch);
  const Edges<T> edges(p, kernels.lanes);
  at::parallel_for(0, sums.chunks * parts, 1, [&](int64_t first, int64_t last) {
    const Workspace packed(sizeof(T) * p.source_channels * p.source_channel);
    const Workspace grads(direct ? 0 : sizeof(T) * channels * grad_channel);
    std::fill_n(packed.as<T>(), p.source_channels * p.source_channel, T(0));
    if (!direct) std::fill_n(grads.as<T>(), channels * grad_channel, T(0));
    for (int64_t task = first; task < last; ++task) {
      const int64_t chunk = task / parts, part = task % parts;
      const int64_t channel_begin = channels * part / parts, channel_end = channels * (part + 1) / parts;
      for (int64_t tile = tiles * chunk / sums.chunks; tile < tiles * (chunk + 1) / sums.chunks; ++tile) {
        const int64_t image = tile * p.images, images = std::min(p.images, batch - image);
        if (!direct && images < p.images) std::fill_n(grads.as<T>(), channels * grad_channel, T(0));
        for (int64_t begin = 0; begin < height; begin += p.group) {
          const int64_t end = std::min(begin + p.group, height);
          pack_source(kernels, p, input, image, begin, end, packed.as<T>());
          const T* const from =
              grad_output.const_data_ptr<T>() + image * grad_output.stride(0) + begin * grad_output.stride(2);
          if (!direct)
            copy_rows(kernels, {channel_end - channel_begin, images, end - begin, p.x.destination.length,
                                from + channel_begin * grad_output.stride(1), grad_output.stride(1),
                                grad_output.stride(0), grad_output.stride(2), grads.as<T>() + channel_begin * grad_channel,
                                grad_channel, p.width, p.pitch});
          for (int64_t r = begin; r < end; r += p.rows)
            for (int64_t b = 0; b < places.blocks; ++b)
              kernels.shifted_dots({places.offset(), places.first(b), places.segments, p.zero(), channel_begin, channel_end,
                                    packed.as<const T>() + (r - begin) * p.pitch,
                                    direct ? from : grads.as<const T>() + (r - begin) * p.pitch, grad_channel, edges.get(),
                                    int((std::min(r + p.rows, end) - r) * p.pitch / kernels.lanes), sums.weight(chunk)});
        }
      }
    }
  });
}

// A kernel of one tap sees no rows: a plane is one run of positions, where a register tile can hold it. What comes here
// was left by conv_in_place.cpp: planes that are not whole vectors, or too few of them for a tile.
template <typename T>
Geometry without_rows(Geometry g, const ConvKernels<T>& kernels) {
  const int64_t positions = g.height * g.width;
  if (!g.is_one_tap() || positions > kernels.max_vectors * kernels.lanes) return g;
  g.height = g.out_height = 1;
  g.width = g.out_width = positions;
  return g;
}
at::Tensor without_rows(const at::Tensor& t, int64_t height, int64_t width) {
  return t.size(2) == height
             ? t
             : t.as_strided({t.size(0), t.size(1), height, width}, {t.stride(0), t.stride(1), width, 1});
}

bool is_plain(const Geometry& g, const at::Tensor& a, const at::Tensor& b) {
  return g.batch > 0 && g.stride[0] <= 4 && g.stride[1] <= 2 && has_plain_planes(a) && has_plain_planes(b);
}

// Whether the planes can be had, and fit L2: where they overflow it, by_batch is quicker. With strides it is not, and there
// are kernels for those with AVX-512 alone.
template <typename T>
bool fits(const Planes<T>& p) {
  constexpr int64_t kStridedBytes = 8 << 20;
  if (p.is_strided() && !conv_kernels<T>().split_columns) return false;
  return p.images > 0 && p.segments() <= kMaxSegments &&
         int64_t(sizeof(T)) * p.source_channels * p.source_channel <= (p.is_strided() ? kStridedBytes : 2 * kL2Bytes);
}

}  // namespace

template <typename T>
bool forward_by_space(const Geometry& geometry, const ConvWeight& w, const at::Tensor& input, const at::Tensor& weight,
                      const std::vector<T>& bias, const at::Tensor& output) {
  if (ConvQuads<T>::can_forward(w)) {
    if constexpr (std::is_same_v<T, float>) return forward_quads_by_space(geometry, w, input, weight, bias, output);
    return false;
  }
  if (!is_plain(geometry, input, output)) return false;
  const ConvKernels<T>& kernels = conv_kernels<T>();
  const Geometry g = without_rows(geometry, kernels);
  const Planes<T> planes(g.forward_y(), g.forward_x(), g.in, g.batch, kernels);
  if (!fits(planes)) return false;
  const auto lists =
      shifted_forward_entries(w, planes.taps(), planes.source_block(w.density() * double(w.taps), w.in),
                              weight.const_data_ptr<T>());
  run_products(kernels, planes, lists, without_rows(input, g.height, g.width),
               without_rows(output, g.out_height, g.out_width), bias.empty() ? nullptr : bias.data());
  return true;
}

template <typename T>
bool input_gradient_by_space(const Geometry& geometry, const ConvWeight& w, const at::Tensor& grad_output,
                             const at::Tensor& weight, const at::Tensor& grad_input) {
  if (ConvQuads<T>::can_backward(w)) {
    if constexpr (std::is_same_v<T, float>)
      return input_gradient_quads_by_space(geometry, w, grad_output, weight, grad_input);
    return false;
  }
  if (!is_plain(geometry, grad_output, grad_input)) return false;
  const ConvKernels<T>& kernels = conv_kernels<T>();
  const Geometry g = without_rows(geometry, kernels);
  const Planes<T> planes(g.backward_y(), g.backward_x(), g.out, g.batch, kernels);
  if (!fits(planes)) return false;
  const double taps = double(w.taps) / double(planes.destination_phases());
  const int64_t block = planes.source_block(w.density() * taps, w.out / w.groups);
  const auto lists = shifted_backward_entries(w, planes.taps(), block, weight.const_data_ptr<T>());
  run_products(kernels, planes, lists, without_rows(grad_output, g.out_height, g.out_width),
               without_rows(grad_input, g.height, g.width), static_cast<const T*>(nullptr));
  return true;
}

template <typename T>
bool weight_gradient_by_space(const Geometry& g, const ConvWeight& w, const at::Tensor& grad_output,
                              const at::Tensor& input, const at::Tensor& grad_weight) {
  if (ConvQuads<T>::can_forward(w)) {
    if constexpr (std::is_same_v<T, float>)
      return weight_gradient_quads_by_space(g, w, grad_output, input, grad_weight);
    return false;
  }
  if (!is_plain(g, grad_output, input)) return false;
  const ConvKernels<T>& kernels = conv_kernels<T>();
  if (kernels.shifted_dots) {
    Planes<T> planes(g.forward_y(), g.forward_x(), g.in, g.batch, kernels);
    if (!fits(planes) || !w.has_short_places()) return false;
    planes.share_l2();
    const auto places =
        ConvShiftedPlaces::of(w, planes.taps(), planes.source_block(w.density() * double(w.taps), w.in));
    PartialSums<T> sums(ceil_div(g.batch, planes.images), w.nonzeros(), 0);
    run_shifted_dots(kernels, planes, *places, grad_output, input, sums, sums.parts(g));
    sums.template finish<T>(*places, {at::Tensor(), grad_weight, at::Tensor()});
    return true;
  }
  if (g.out_width % kernels.lanes != 0) return false;
  const Planes<T> planes = Planes<T>::for_dots(g.forward_y(), g.forward_x(), g.in, kernels);
  if (!fits(planes)) return false;
  const ConvPlaces places(w, planes.taps(), planes.source_block(w.density() * double(w.taps), w.in));
  PartialSums<T> sums(g.batch, w.nonzeros(), 0);
  run_dots(kernels, planes, places, grad_output, input, sums, sums.parts(g));
  sums.template finish<T>(places, {at::Tensor(), grad_weight, at::Tensor()});
  return true;
}

template <typename T, typename S>
bool bias_gradient_by_space(const at::Tensor& grad_output, const at::Tensor& grad_bias) {
  if (!has_plain_planes(grad_output)) return false;
  const S* const from = numbers_of<S>(grad_output);
  S* const to = mutable_numbers_of<S>(grad_bias);
  const int64_t positions = grad_output.size(2) * grad_output.size(3);
  at::parallel_for(0, grad_output.size(1), 1, [&](int64_t first, int64_t last) {
    for (int64_t o = first; o < last; ++o) {
      T total = 0;
      for (int64_t n = 0; n < grad_output.size(0); ++n)
        total += sum_of<T>(from + n * grad_output.stride(0) + o * grad_output.stride(1), positions);
      from_number(total, to + o);
    }
  });
  return true;
}

#define INSTANTIATE(T)                                                                                               \
  template bool forward_by_space<T>(const Geometry&, const ConvWeight&, const at::Tensor&, const at::Tensor&,        \
                                    const std::vector<T>&, const at::Tensor&);                                       \
  template bool input_gradient_by_space<T>(const Geometry&, const ConvWeight&, const at::Tensor&, const at::Tensor&, \
                                           const at::Tensor&);                                                       \
  template bool weight_gradient_by_space<T>(const Geometry&, const ConvWeight&, const at::Tensor&,                   \
                                            const at::Tensor&, const at::Tensor&);                                   \
  template bool bias_gradient_by_space<T, T>(const at::Tensor&, const at::Tensor&);
INSTANTIATE(float)
INSTANTIATE(double)
#undef INSTANTIATE
template bool bias_gradient_by_space<float, BFloat16>(const at::Tensor&, const at::Tensor&);

}  // namespace uasparse
