// masked_conv2d with neighbouring positions of one image a vector: for wide images and stride 1.
//
// A group of image rows is copied once for each column shift of the kernel, shifted and with zeros where the padding is,
// to [channels][shifts][rows + reach][width]. Then every tap is a whole number of rows away from its output, so vectors are
// read where the caches like them, and a group is one run of rows * width positions, which the products cut into register
// tiles. Copies are plain (no transpose), and results go straight to their place in the output: where activations are
// large and weights few, this is what counts.

#include "cpu/conv_pass.h"

namespace uasparse {
namespace {

// A pass by space: destination row y reads source rows y + shift_y + origin_y, and likewise along x.
struct SpacePass {
  int64_t channels, height, width;  // of the source
  int64_t rows, columns;            // of the destination
  int64_t origin_y, reach;
  std::vector<int64_t> shift_y, shift_x;  // of each kernel row and column; shift_x with its origin
  int64_t group;                          // destination rows of a group
  int64_t plane, channel;                 // strides of the copies

  SpacePass(const AxisPass& y, const AxisPass& x, int64_t channels, int64_t group)
      : channels(channels),
        height(y.source.extent),
        width(x.source.extent),
        rows(y.destination.extent),
        columns(x.destination.extent),
        origin_y(y.source.origin),
        reach(y.reach),
        shift_y(y.shift),
        shift_x(x.shift),
        group(group),
        plane((group + y.reach) * columns),
        channel(int64_t(x.shift.size()) * plane) {
    for (int64_t& shift : shift_x) shift += x.source.origin;
    // Channels a multiple of 4096 bytes apart would share their sets of L1.
    if (channel % 512 == 0) channel += 32;
  }

  ConvTaps taps() const {
    ConvTaps taps{channel, {}, {}, 1};
    for (int64_t ky : shift_y)
      for (size_t kx = 0; kx < shift_x.size(); ++kx) {
        taps.offset.push_back(int64_t(kx) * plane + ky * columns);
        taps.phase.push_back(0);
      }
    return taps;
  }
};

// Rows of a group: enough for `vectors` vectors.
int64_t group_rows(int64_t rows, int64_t columns, int64_t lanes, int64_t vectors) {
  return std::min(rows, ceil_div(vectors * lanes, columns));
}

// The copies of destination rows [begin, end) of one image's planes.
template <typename T>
void copy_rows(const ConvKernels<T>& kernels, const SpacePass& p, const at::Tensor& images, int64_t n, int64_t begin,
               int64_t end, T* to) {
  const T* const data = images.const_data_ptr<T>();
  const int64_t plane_stride = images.stride(1), plane = p.height * p.width;
  const T* const last = data + (images.size(0) - 1) * images.stride(0) + (p.channels - 1) * plane_stride + plane;
  const int64_t first = begin + p.origin_y, count = end - begin + p.reach;
  const int64_t valid_begin = std::clamp<int64_t>(-first, 0, count);
  const int64_t valid_end = std::clamp<int64_t>(p.height - first, valid_begin, count);
  const int64_t valid = (valid_end - valid_begin) * p.columns, shifts = int64_t(p.shift_x.size());
  for (int64_t c = 0; c < p.channels; ++c) {
    const T* const from = data + n * images.stride(0) + c * plane_stride + (first + valid_begin) * p.width;
    // The next plane's rows are elsewhere, where the hardware does not look ahead.
    for (int64_t i = 0; c + 1 < p.channels && i < valid; i += 64 / sizeof(T)) __builtin_prefetch(from + plane_stride + i);
    T* const copy = to + c * p.channel + valid_begin * p.columns;
    kernels.shift_rows({from, data, last, valid_end - valid_begin, p.width, p.shift_x.data(),
                        shifts, copy, p.plane});
    // Rows above and below the image.
    for (int64_t k = 0; k < shifts && valid < count * p.columns; ++k) {
      T* const rows = to + c * p.channel + k * p.plane;
      std::fill(rows, rows + valid_begin * p.columns, T(0));
      std::fill(rows + valid_end * p.columns, rows + count * p.columns, T(0));
    }
  }
}

template <typename T>
int64_t source_block(const SpacePass& p, int64_t vectors, int64_t lanes, const ConvWeight& w, int64_t channels) {
  const int64_t bytes = sizeof(T) * int64_t(p.shift_x.size()) * (vectors * lanes + p.reach * p.columns);
  return channels_a_block(bytes, w.density() * double(w.taps), channels);
}

// Positions of a register tile, of `count` vectors.
int64_t tile_vectors(int64_t count, int64_t max_vectors) { return ceil_div(count, ceil_div(count, max_vectors)); }

template <typename T>
void run_product(const ConvKernels<T>& kernels, const ConvEntries<T>& lists, const T* source, T* destination,
                 int64_t destination_channel, int64_t vectors, int64_t tile, int64_t begin, int64_t end, const T* bias) {
  for (int64_t v = 0; v < vectors; v += tile)
    for (int64_t b = 0; b < lists.blocks; ++b)
      kernels.product({lists.entries(), lists.first(b), begin, end, source + v * kernels.lanes, 0,
                       destination + v * kernels.lanes, 0, destination_channel, b == 0, bias, 1,
                       int(std::min(tile, vectors - v))});
}

bool has_plain_planes(const at::Tensor& t) { return !t.defined() || (t.stride(3) == 1 && t.stride(2) == t.size(3)); }

}  // namespace

template <typename T>
bool goes_by_space(const Geometry& g, const ConvWeight&, std::initializer_list<at::Tensor> activations) {
  if (g.stride[0] != 1 || g.stride[1] != 1) return false;
  if (!std::all_of(activations.begin(), activations.end(), has_plain_planes)) return false;
  const int64_t lanes = conv_kernels<T>().lanes;
  return g.width == g.out_width && g.width % lanes == 0;
}

template <typename T>
void forward_by_space(const Geometry& g, const ConvWeight& w, const at::Tensor& input, const at::Tensor& weight,
                      const std::vector<T>& bias, const at::Tensor& output) {
  const ConvKernels<T>& kernels = conv_kernels<T>();
  const int64_t lanes = kernels.lanes, group = group_rows(g.out_height, g.out_width, lanes, kernels.max_vectors);
  const SpacePass pass(g.forward_y(), g.forward_x(), g.in, group);
  const int64_t tile = tile_vectors(group * pass.columns / lanes, kernels.max_vectors);
  const auto lists = ConvEntries<T>::forward(w, pass.taps(), source_block<T>(pass, tile, lanes, w, w.in),
                                             weight.const_data_ptr<T>());
  T* const to = output.mutable_data_ptr<T>();
  const int64_t groups = ceil_div(pass.rows, group);
  at::parallel_for(0, g.batch * groups, 1, [&](int64_t first, int64_t last) {
    const Workspace copies(sizeof(T) * g.in * pass.channel);
    for (int64_t task = first; task < last; ++task) {
      const int64_t image = task / groups, y = task % groups * group, end = std::min(y + group, pass.rows);
      copy_rows(kernels, pass, input, image, y, end, copies.as<T>());
      run_product(kernels, lists, copies.as<const T>(), to + image * output.stride(0) + y * pass.columns,
                  output.stride(1), (end - y) * pass.columns / lanes, tile, 0, g.out,
                  bias.empty() ? nullptr : bias.data());
    }
  });
}

template <typename T>
void backward_by_space(const Geometry& g, const ConvWeight& w, const at::Tensor& grad_output, const at::Tensor& input,
                       const at::Tensor& weight, const ConvGradients& gradients) {
  const ConvKernels<T>& kernels = conv_kernels<T>();
  const int64_t lanes = kernels.lanes;
  const bool wants_input = gradients.input.defined(), wants_weight = gradients.weight.defined();
  const SpacePass pass(g.backward_y(), g.backward_x(), g.out,
                       group_rows(g.height, g.width, lanes, kernels.max_vectors));
  const SpacePass forward(g.forward_y(), g.forward_x(), g.in,
                          group_rows(g.out_height, g.out_width, lanes, kernels.max_vectors));
  const int64_t tile = tile_vectors(pass.group * pass.columns / lanes, kernels.max_vectors);
  const NoWeight none(w);
  const ConvWeight& w_input = wants_input ? w : none.weight;
  const ConvWeight& w_weight = wants_weight ? w : none.weight;
  const auto lists =
      ConvEntries<T>::backward(w_input, pass.taps(), source_block<T>(pass, tile, lanes, w, w.out / w.groups),
                               weight.const_data_ptr<T>());
  const ConvPlaces places(w_weight, forward.taps(),
                          source_block<T>(forward, forward.group * forward.columns / lanes, lanes, w, w.in));
  PartialSums<T> sums(g.batch, w_weight.nonzeros(), g.out);
  const int64_t parts = sums.parts(g);
  const T* const from = grad_output.const_data_ptr<T>();
  at::parallel_for(0, sums.chunks * parts, 1, [&](int64_t first, int64_t last) {
    const Workspace grad_copies(wants_input ? sizeof(T) * g.out * pass.channel : 0);
    const Workspace copies(wants_weight ? sizeof(T) * g.in * forward.channel : 0);
    for (int64_t task = first; task < last; ++task) {
      const int64_t chunk = task / parts, part = task % parts;
      const int64_t in_begin = g.in * part / parts, in_end = g.in * (part + 1) / parts;
      const int64_t out_begin = g.out * part / parts, out_end = g.out * (part + 1) / parts;
      for (int64_t image = g.batch * chunk / sums.chunks; image < g.batch * (chunk + 1) / sums.chunks; ++image) {
        const T* const grad = from + image * grad_output.stride(0);
        for (int64_t y = 0; wants_input && y < pass.rows; y += pass.group) {
          const int64_t end = std::min(y + pass.group, pass.rows);
          copy_rows(kernels, pass, grad_output, image, y, end, grad_copies.as<T>());
          T* const to = gradients.input.mutable_data_ptr<T>() + image * gradients.input.stride(0) + y * pass.columns;
          run_product(kernels, lists, grad_copies.as<const T>(), to, gradients.input.stride(1),
                      (end - y) * pass.columns / lanes, tile, in_begin, in_end, static_cast<const T*>(nullptr));
        }
        for (int64_t y = 0; wants_weight && y < forward.rows; y += forward.group) {
          const int64_t end = std::min(y + forward.group, forward.rows);
          copy_rows(kernels, forward, input, image, y, end, copies.as<T>());
          for (int64_t b = 0; b < places.blocks; ++b)
            kernels.sddmm({places.offset(), places.first() + b, places.blocks, out_begin, out_end, copies.as<const T>(),
                           0, grad + y * forward.columns, 0, grad_output.stride(1), 1,
                           (end - y) * forward.columns / lanes, sums.weight(chunk)});
        }
        if (gradients.bias.defined())
          for (int64_t o = out_begin; o < out_end; ++o)
            sums.bias(chunk)[o] += sum_of(grad + o * grad_output.stride(1), g.out_height * g.out_width);
      }
    }
  });
  sums.template finish<T>(places, gradients);
}

#define INSTANTIATE(T)                                                                                                \
  template bool goes_by_space<T>(const Geometry&, const ConvWeight&, std::initializer_list<at::Tensor>);                            \
  template void forward_by_space<T>(const Geometry&, const ConvWeight&, const at::Tensor&, const at::Tensor&,        \
                                    const std::vector<T>&, const at::Tensor&);                                       \
  template void backward_by_space<T>(const Geometry&, const ConvWeight&, const at::Tensor&, const at::Tensor&,       \
                                     const at::Tensor&, const ConvGradients&);
INSTANTIATE(float)
INSTANTIATE(double)
#undef INSTANTIATE

}  // namespace uasparse
