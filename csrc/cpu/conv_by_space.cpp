// masked_conv2d with neighbouring positions of a row a vector.
//
// A few images lie side by side, so that a row of them is a whole number of vectors: planes [channels][phases][rows][images *
// columns], without columns of padding. A tap of the kernel is then a number of rows, which a vector is read away from its
// output, and a shift by a few columns, which differs between the columns of the kernel alone. The kernels sum all entries
// of one shift first and shift the sum, in registers (masked_conv2d_impl.h). So nothing is packed more than once, packing is
// a copy of rows (no transpose), and as many channels as possible fit L1. Where one image fills the vectors, results go
// straight to their place.

#include <limits>

#include "cpu/conv_pass.h"

namespace uasparse {
namespace {

constexpr int64_t kL2Bytes = 512 << 10;  // of it the packed source of a group of rows
constexpr int64_t kMaxSegments = 9;

int64_t ceil_quotient(int64_t a, int64_t b) { return a >= 0 ? (a + b - 1) / b : -(-a / b); }

// Image positions q * step + origin + remainder, for q in [begin, end).
struct Run {
  int64_t begin, end;
};
Run run_of(const Axis& axis, int64_t remainder, int64_t begin, int64_t end) {
  const int64_t first = std::clamp(ceil_quotient(-axis.origin - remainder, axis.step), begin, end);
  return {first, std::clamp(ceil_quotient(axis.extent - axis.origin - remainder, axis.step), first, end)};
}

// A pass over planes; source and destination planes have rows of the same pitch.
template <typename T>
struct Planes {
  AxisPass y, x;
  std::vector<Run> columns;  // of the source's remainders
  int64_t source_channels, width;
  int64_t images, pitch, rows;  // side by side; of a row; of a register tile
  int64_t group;                // rows of a group: what is packed together
  int64_t source_plane, source_channel, destination_plane;

  Planes(AxisPass y_pass, AxisPass x_pass, int64_t source_channels, int64_t batch, const ConvKernels<T>& kernels)
      : y(std::move(y_pass)), x(std::move(x_pass)), source_channels(source_channels), width(x.destination.length) {
    for (int64_t r = 0; r < x.source.step; ++r) {
      columns.push_back(run_of(x.source, r, 0, x.source.length));
      width = std::max(width, columns.back().end - columns.back().begin);
    }
    const int64_t height = y.destination.length, lanes = kernels.lanes;
    // The cheapest register tiles: a vector costs one, what comes with an entry about two.
    double best = std::numeric_limits<double>::max();
    images = pitch = rows = 0;
    for (int64_t n = 1; n <= batch && n <= 4 * lanes; ++n) {
      const int64_t vectors = ceil_div(n * width, lanes);
      if (vectors > kernels.max_vectors) break;
      const int64_t tiles = ceil_div(height, std::min(height, kernels.max_vectors / vectors));
      const double cost = double(2 * tiles + height * vectors) / double(n);
      if (cost < best) {
        best = cost;
        images = n;
        pitch = vectors * lanes;
        rows = ceil_div(height, tiles);
      }
    }
    if (images == 0) return;
    const int64_t phases = y.source.phases() * x.source.phases();
    const int64_t row_bytes = sizeof(T) * source_channels * phases * pitch;
    const int64_t fit = std::max<int64_t>(1, (kL2Bytes / row_bytes - y.reach) / rows);
    group = std::min(ceil_div(height, rows), fit) * rows;
    source_plane = (group + y.reach) * pitch;
    source_channel = phases * source_plane;
    // Channels a multiple of 4096 bytes apart would share their sets of L1.
    if (source_channel % 512 == 0) source_channel += 2 * 16;
    destination_plane = rows * pitch;
  }

  int64_t destination_phases() const { return y.destination.phases() * x.destination.phases(); }
  int64_t column_shift(size_t k) const { return x.shift[k] - columns[x.source_phase[k]].begin; }
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
        const int64_t phase = y.source_phase[ky] * x.source.phases() + x.source_phase[kx];
        taps.offset.push_back(phase * source_plane + y.shift[ky] * pitch);
        taps.phase.push_back(y.destination_phase[ky] * x.destination.phases() + x.destination_phase[kx]);
        taps.segment.push_back(zero() + column_shift(kx));
      }
    return taps;
  }

  int64_t source_block(double nonzeros_a_channel, int64_t channels) const {
    const int64_t phases = y.source.phases() * x.source.phases();
    return channels_a_block(sizeof(T) * phases * (rows + y.reach) * pitch, nonzeros_a_channel, channels);
  }
};

// What a shift by a column leaves (ConvEdges), for a register tile.
template <typename T>
class Edges {
 public:
  Edges(const Planes<T>& p) : left_(p.rows * p.pitch), right_(p.rows * p.pitch) {
    for (int64_t i = 0; i < p.rows * p.pitch; ++i) {
      const int64_t place = i % p.pitch, column = place % p.width;
      if (place >= p.images * p.width) continue;
      if (column != 0) std::memset(&left_[i], -1, sizeof(T));
      if (column != p.width - 1) std::memset(&right_[i], -1, sizeof(T));
    }
  }
  ConvEdges<T> get() const { return {left_.data(), right_.data()}; }

 private:
  std::vector<T> left_, right_;
};

// Whether rows of a plane are where a kernel can take them.
bool in_place(const Axis& y, const Axis& x, int64_t images, int64_t pitch) {
  return images == 1 && y.step == 1 && x.step == 1 && x.extent == pitch;
}

// Packed rows [begin, end) of the images from `image` onwards. `to` is zero where nothing was packed yet.
template <typename T>
void pack_source(const ConvKernels<T>& kernels, const Planes<T>& p, const at::Tensor& t, int64_t image, int64_t begin,
                 int64_t end, T* to) {
  const int64_t images = std::min(p.images, t.size(0) - image);
  if (images < p.images) std::fill_n(to, p.source_channels * p.source_channel, T(0));
  const Axis &y = p.y.source, &x = p.x.source;
  for (int64_t ry = 0; ry < y.step; ++ry)
    for (int64_t rx = 0; rx < x.step; ++rx) {
      if (y.phase[ry] < 0 || x.phase[rx] < 0) continue;
      T* const plane = to + (y.phase[ry] * x.phases() + x.phase[rx]) * p.source_plane;
      const Run run = run_of(y, ry, begin, end), columns = p.columns[rx];
      for (int64_t c = 0; c < p.source_channels; ++c) {
        T* const channel = plane + c * p.source_channel;
        std::fill(channel, channel + (run.begin - begin) * p.pitch, T(0));
        std::fill(channel + (run.end - begin) * p.pitch, channel + (end - begin) * p.pitch, T(0));
      }
      ConvPlanes<T> planes{p.source_channels, run.end - run.begin, images, columns.end - columns.begin, x.step,
                           t.stride(0), t.stride(1), y.step * t.stride(2), p.width, p.source_channel, p.pitch};
      if (p.images == 1 && planes.row == planes.width && planes.width == p.pitch) {
        planes.width *= planes.rows;
        planes.rows = 1;
      }
      kernels.pack_planes(planes,
                          t.const_data_ptr<T>() + image * t.stride(0) + (run.begin * y.step + y.origin + ry) * t.stride(2) +
                              columns.begin * x.step + x.origin + rx,
                          plane + (run.begin - begin) * p.pitch);
    }
}

// Calls move(planes, of the image, of the packed destination) for each phase of destination rows [begin, end).
template <typename T, typename Move>
void for_each_destination(const Planes<T>& p, const at::Tensor& t, int64_t channel_begin, int64_t channel_end,
                          int64_t image, int64_t begin, int64_t end, Move move) {
  const Axis &y = p.y.destination, &x = p.x.destination;
  for (int64_t ry = 0; ry < y.step; ++ry)
    for (int64_t rx = 0; rx < x.step; ++rx) {
      const Run run = run_of(y, ry, begin, end), columns = run_of(x, rx, 0, x.length);
      const int64_t phase = y.phase[ry] * x.phases() + x.phase[rx], phases = p.destination_phases();
      move(ConvPlanes<T>{channel_end - channel_begin, run.end - run.begin, std::min(p.images, t.size(0) - image),
                         columns.end - columns.begin, x.step, t.stride(0), t.stride(1), y.step * t.stride(2), p.width,
                         phases * p.destination_plane, p.pitch},
           image * t.stride(0) + channel_begin * t.stride(1) + (run.begin * y.step + ry) * t.stride(2) + rx,
           (channel_begin * phases + phase) * p.destination_plane + (run.begin - begin) * p.pitch);
    }
}

// destination = product of the source with the weights of the lists.
template <typename T>
void run_products(const ConvKernels<T>& kernels, const Planes<T>& p, const ConvEntries<T>& lists, const at::Tensor& source,
                  const at::Tensor& destination, const T* bias) {
  const int64_t height = p.y.destination.length, channels = destination.size(1), phases = p.destination_phases();
  const bool direct = in_place(p.y.destination, p.x.destination, p.images, p.pitch);
  const Edges<T> edges(p);
  const int64_t tiles = ceil_div(source.size(0), p.images), groups = ceil_div(height, p.group);
  const int64_t parts = std::clamp<int64_t>(ceil_div(at::get_num_threads(), tiles * groups), 1, channels);
  at::parallel_for(0, tiles * groups * parts, 1, [&](int64_t first, int64_t last) {
    const Workspace packed(sizeof(T) * p.source_channels * p.source_channel);
    const Workspace result(direct ? 0 : sizeof(T) * channels * phases * p.destination_plane);
    std::fill_n(packed.as<T>(), p.source_channels * p.source_channel, T(0));
    for (int64_t task = first; task < last; ++task) {
      const int64_t part = task % parts, image = task / parts / groups * p.images;
      const int64_t begin = task / parts % groups * p.group, end = std::min(begin + p.group, height);
      const int64_t channel_begin = channels * part / parts, channel_end = channels * (part + 1) / parts;
      pack_source(kernels, p, source, image, begin, end + p.y.reach, packed.as<T>());
      for (int64_t r = begin; r < end; r += p.rows) {
        const int64_t stop = std::min(r + p.rows, end);
        T* const to = destination.mutable_data_ptr<T>();
        for (int64_t b = 0; b < lists.blocks; ++b)
          kernels.shifted_product(
              {lists.entries(), lists.first(b), lists.segments, p.zero(), channel_begin * phases, channel_end * phases,
               packed.as<const T>() + (r - begin) * p.pitch,
               direct ? to + image * destination.stride(0) + r * p.pitch : result.as<T>(),
               direct ? destination.stride(1) : p.destination_plane, b == 0, bias, edges.get(),
               int((stop - r) * p.pitch / kernels.lanes)});
        if (direct) continue;
        for_each_destination(p, destination, channel_begin, channel_end, image, r, stop,
                             [&](const ConvPlanes<T>& planes, int64_t at, int64_t from) {
                               kernels.unpack_planes(planes, result.as<const T>() + from, to + at);
                             });
      }
    }
  });
}

// sums = dot products of grad_output with the input, over chunks of the batch.
template <typename T>
void run_dots(const ConvKernels<T>& kernels, const Planes<T>& p, const ConvPlaces& places, const at::Tensor& grad_output,
              const at::Tensor& input, PartialSums<T>& sums, int64_t parts) {
  const int64_t height = p.y.destination.length, channels = grad_output.size(1);
  const bool direct = in_place(p.y.destination, p.x.destination, p.images, p.pitch);
  const Edges<T> edges(p);
  const int64_t tiles = ceil_div(input.size(0), p.images);
  at::parallel_for(0, sums.chunks * parts, 1, [&](int64_t first, int64_t last) {
    const Workspace packed(sizeof(T) * p.source_channels * p.source_channel);
    const Workspace packed_grads(direct ? 0 : sizeof(T) * channels * p.destination_plane);
    const Workspace shifted(sizeof(T) * p.destination_plane);
    std::fill_n(packed.as<T>(), p.source_channels * p.source_channel, T(0));
    if (!direct) std::fill_n(packed_grads.as<T>(), channels * p.destination_plane, T(0));
    for (int64_t task = first; task < last; ++task) {
      const int64_t chunk = task / parts, part = task % parts;
      const int64_t channel_begin = channels * part / parts, channel_end = channels * (part + 1) / parts;
      for (int64_t tile = tiles * chunk / sums.chunks; tile < tiles * (chunk + 1) / sums.chunks; ++tile)
        for (int64_t begin = 0; begin < height; begin += p.group) {
          const int64_t image = tile * p.images, end = std::min(begin + p.group, height);
          pack_source(kernels, p, input, image, begin, end + p.y.reach, packed.as<T>());
          for (int64_t r = begin; r < end; r += p.rows) {
            const int64_t stop = std::min(r + p.rows, end);
            const T* const grads = grad_output.const_data_ptr<T>();
            if (!direct) {
              if (image + p.images > input.size(0))
                std::fill_n(packed_grads.as<T>(), channels * p.destination_plane, T(0));
              for_each_destination(p, grad_output, channel_begin, channel_end, image, r, stop,
                                   [&](const ConvPlanes<T>& planes, int64_t at, int64_t to) {
                                     kernels.pack_planes(planes, grads + at, packed_grads.as<T>() + to);
                                   });
            }
            for (int64_t b = 0; b < places.blocks; ++b)
              kernels.shifted_sddmm(
                  {places.offset(), places.first() + b, places.blocks, p.segments(), p.zero(), channel_begin, channel_end,
                   packed.as<const T>() + (r - begin) * p.pitch,
                   direct ? grads + image * grad_output.stride(0) + r * p.pitch : packed_grads.as<const T>(),
                   direct ? grad_output.stride(1) : p.destination_plane, edges.get(),
                   (stop - r) * p.pitch / kernels.lanes, p.pitch / kernels.lanes, shifted.as<T>(), sums.weight(chunk)});
          }
        }
    }
  });
}

template <typename T>
void add_bias_gradient(const at::Tensor& grad_output, PartialSums<T>& sums) {
  const int64_t batch = grad_output.size(0), positions = grad_output.size(2) * grad_output.size(3);
  at::parallel_for(0, sums.chunks, 1, [&](int64_t first, int64_t last) {
    for (int64_t chunk = first; chunk < last; ++chunk)
      for (int64_t n = batch * chunk / sums.chunks; n < batch * (chunk + 1) / sums.chunks; ++n)
        for (int64_t o = 0; o < grad_output.size(1); ++o)
          sums.bias(chunk)[o] +=
              sum_of(grad_output.const_data_ptr<T>() + n * grad_output.stride(0) + o * grad_output.stride(1), positions);
  });
}

bool has_plain_planes(const at::Tensor& t) { return !t.defined() || (t.stride(3) == 1 && t.stride(2) == t.size(3)); }

// A kernel of one tap sees no rows: a plane is one run of positions, where a register tile can hold it.
template <typename T>
Geometry without_rows(Geometry g, const ConvKernels<T>& kernels) {
  const int64_t positions = g.height * g.width;
  const bool one_tap = g.kernel_h * g.kernel_w == 1 && g.out_height == g.height && g.out_width == g.width &&
                       g.stride[0] == 1 && g.stride[1] == 1 && g.padding[0] == 0 && g.padding[1] == 0;
  if (!one_tap || positions > kernels.max_vectors * kernels.lanes) return g;
  g.height = g.out_height = 1;
  g.width = g.out_width = positions;
  return g;
}
at::Tensor without_rows(const at::Tensor& t, int64_t height, int64_t width) {
  return !t.defined() || t.size(2) == height
             ? t
             : t.as_strided({t.size(0), t.size(1), height, width}, {t.stride(0), t.stride(1), width, 1});
}

}  // namespace

template <typename T>
bool goes_by_space(const Geometry& geometry, const ConvWeight&, std::initializer_list<at::Tensor> activations) {
  if (!std::all_of(activations.begin(), activations.end(), has_plain_planes)) return false;
  const ConvKernels<T>& kernels = conv_kernels<T>();
  const Geometry g = without_rows(geometry, kernels);
  const auto fits = [&](const Planes<T>& p) {
    return p.images > 0 && p.segments() <= kMaxSegments &&
           p.source_channels * p.source_channel < std::numeric_limits<int32_t>::max();
  };
  return fits({g.forward_y(), g.forward_x(), g.in, g.batch, kernels}) &&
         fits({g.backward_y(), g.backward_x(), g.out, g.batch, kernels});
}

template <typename T>
void forward_by_space(const Geometry& geometry, const ConvWeight& w, const at::Tensor& input, const at::Tensor& weight,
                      const std::vector<T>& bias, const at::Tensor& output) {
  const ConvKernels<T>& kernels = conv_kernels<T>();
  const Geometry g = without_rows(geometry, kernels);
  const Planes<T> planes(g.forward_y(), g.forward_x(), g.in, g.batch, kernels);
  const auto lists =
      ConvEntries<T>::forward(w, planes.taps(), planes.source_block(w.density() * double(w.taps), w.in),
                              weight.const_data_ptr<T>());
  run_products(kernels, planes, lists, without_rows(input, g.height, g.width),
               without_rows(output, g.out_height, g.out_width), bias.empty() ? nullptr : bias.data());
}

template <typename T>
void backward_by_space(const Geometry& geometry, const ConvWeight& w, const at::Tensor& grad, const at::Tensor& input,
                       const at::Tensor& weight, const ConvGradients& gradients) {
  const ConvKernels<T>& kernels = conv_kernels<T>();
  const Geometry g = without_rows(geometry, kernels);
  const at::Tensor grad_output = without_rows(grad, g.out_height, g.out_width);
  if (gradients.input.defined()) {
    const Planes<T> planes(g.backward_y(), g.backward_x(), g.out, g.batch, kernels);
    const double nonzeros = w.density() * double(w.taps) / double(planes.destination_phases());
    const auto lists = ConvEntries<T>::backward(w, planes.taps(), planes.source_block(nonzeros, w.out / w.groups),
                                                weight.const_data_ptr<T>());
    run_products(kernels, planes, lists, grad_output, without_rows(gradients.input, g.height, g.width),
                 static_cast<const T*>(nullptr));
  }
  if (!gradients.weight.defined() && !gradients.bias.defined()) return;
  const Planes<T> planes(g.forward_y(), g.forward_x(), g.in, g.batch, kernels);
  const NoWeight none(w);
  const ConvPlaces places(gradients.weight.defined() ? w : none.weight, planes.taps(),
                          planes.source_block(w.density() * double(w.taps), w.in));
  PartialSums<T> sums(ceil_div(g.batch, planes.images), gradients.weight.defined() ? w.nonzeros() : 0, g.out);
  if (gradients.weight.defined())
    run_dots(kernels, planes, places, grad_output, without_rows(input, g.height, g.width), sums, sums.parts(g));
  if (gradients.bias.defined()) add_bias_gradient(grad_output, sums);
  sums.template finish<T>(places, gradients);
}

#define INSTANTIATE(T)                                                                                                \
  template bool goes_by_space<T>(const Geometry&, const ConvWeight&, std::initializer_list<at::Tensor>);             \
  template void forward_by_space<T>(const Geometry&, const ConvWeight&, const at::Tensor&, const at::Tensor&,        \
                                    const std::vector<T>&, const at::Tensor&);                                       \
  template void backward_by_space<T>(const Geometry&, const ConvWeight&, const at::Tensor&, const at::Tensor&,       \
                                     const at::Tensor&, const ConvGradients&);
INSTANTIATE(float)
INSTANTIATE(double)
#undef INSTANTIATE

}  // namespace uasparse
