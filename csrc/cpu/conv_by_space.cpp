// masked_conv2d with neighbouring positions of a row a vector: for stride 1, and planes that fit L2.
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

#include <limits>

#include "cpu/conv_pass.h"

namespace uasparse {
namespace {

constexpr int64_t kL2Bytes = 512 << 10;  // of it the packed source of a group of rows
constexpr int64_t kMaxSegments = 9;

// Indices in [begin, end) that are inside the image.
struct Run {
  int64_t begin, end;
};
Run run_of(const Axis& axis, int64_t begin, int64_t end) {
  const int64_t first = std::clamp(-axis.origin, begin, end);
  return {first, std::clamp(axis.extent - axis.origin, first, end)};
}

// Channels a multiple of 4096 bytes apart would share their sets of L1.
int64_t apart(int64_t channel) { return channel % 512 == 0 ? channel + 2 * 16 : channel; }

// A pass over planes. For products, source and destination planes have rows of the same pitch.
template <typename T>
struct Planes {
  AxisPass y, x;
  Run columns;  // of the source
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
        columns(run_of(x.source, 0, x.source.length)),
        source_channels(source_channels),
        width(std::max(x.destination.length, columns.end - columns.begin)) {
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
      // The last images of a batch take as many vectors, however few they are.
      const double cost = (double(2 * tiles) + copied * double(height * vectors)) * double(ceil_div(batch, n));
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
  bool is_direct(int64_t images, int64_t pitch) const { return images == 1 && x.destination.extent == pitch; }

  // Of a channel.
  int64_t source_planes() const { return copies ? int64_t(x.shift.size()) : 1; }

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
  int64_t column_shift(size_t k) const { return copies || gap > 0 ? 0 : x.shift[k] - columns.begin; }
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
    ConvTaps taps{source_channel, {}, {}, 1, {}, segments()};
    for (const int64_t shift_y : y.shift)
      for (size_t kx = 0; kx < x.shift.size(); ++kx) {
        const int64_t column = copies ? int64_t(kx) * source_plane : gap > 0 ? gap + x.shift[kx] + x.source.origin : 0;
        taps.offset.push_back(shift_y * source_row + column);
        taps.phase.push_back(0);
        taps.segment.push_back(zero() + column_shift(kx));
      }
    return taps;
  }

  int64_t source_block(double nonzeros_a_channel, int64_t channels) const {
    const int64_t bytes = sizeof(T) * source_planes() * (rows + y.reach) * source_row;
    // Copies are three times as large, and dot products are not loaded and stored.
    return channels_a_block(bytes, nonzeros_a_channel, channels, copies ? 12 : 20);
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

// Packed rows [begin, end) of the images from `image` onwards. `to` is zero where nothing was packed yet.
template <typename T>
void pack_source(const ConvKernels<T>& kernels, const Planes<T>& p, const at::Tensor& t, int64_t image, int64_t begin,
                 int64_t end, T* to) {
  const int64_t images = std::min(p.images, t.size(0) - image);
  if (images < p.images) std::fill_n(to, p.source_channels * p.source_channel, T(0));
  const Axis &y = p.y.source, &x = p.x.source;
  const Run run = run_of(y, begin, end);
  for (int64_t k = 0; k < p.source_planes(); ++k) {
    T* const plane = to + k * p.source_plane;
    for (int64_t c = 0; c < p.source_channels; ++c) {
      T* const channel = plane + c * p.source_channel;
      std::fill(channel, channel + (run.begin - begin) * p.source_row, T(0));
      std::fill(channel + (run.end - begin) * p.source_row, channel + (end - begin) * p.source_row, T(0));
    }
    const Run columns = p.copies ? run_of(x, p.x.shift[k], p.x.shift[k] + p.pitch) : p.columns;
    const int64_t column = p.copies ? columns.begin - p.x.shift[k] : p.gap > 0 ? p.gap + columns.begin + x.origin : 0;
    copy_rows(kernels, {p.source_channels, images, run.end - run.begin, columns.end - columns.begin,
                        t.const_data_ptr<T>() + image * t.stride(0) + (run.begin + y.origin) * t.stride(2) +
                            columns.begin + x.origin,
                        t.stride(1), t.stride(0), t.stride(2), plane + (run.begin - begin) * p.source_row + column,
                        p.source_channel, p.width, p.source_row});
  }
}

// destination = product of the source with the weights of the lists.
template <typename T>
void run_products(const ConvKernels<T>& kernels, const Planes<T>& p, const ConvEntries<T>& lists,
                  const at::Tensor& source, const at::Tensor& destination, const T* bias) {
  const int64_t height = p.y.destination.length, channels = destination.size(1);
  const bool direct = p.is_direct(p.images, p.pitch);
  const Edges<T> edges(p, kernels.lanes);
  const int64_t tiles = ceil_div(source.size(0), p.images), groups = ceil_div(height, p.group);
  const int64_t parts = even_parts(tiles * groups, channels);
  at::parallel_for(0, tiles * groups * parts, 1, [&](int64_t first, int64_t last) {
    const Workspace packed(sizeof(T) * p.source_channels * p.source_channel);
    const Workspace result(direct ? 0 : sizeof(T) * channels * p.destination_plane);
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
              {lists.entries(), lists.first(b), lists.segments, p.zero(), channel_begin, channel_end,
               packed.as<const T>() + (r - begin) * p.pitch,
               direct ? to + image * destination.stride(0) + r * p.pitch : result.as<T>(),
               direct ? destination.stride(1) : p.destination_plane, b == 0, bias, edges.get(),
               int((stop - r) * p.pitch / kernels.lanes)});
        if (direct) continue;
        kernels.copy_planes({channel_end - channel_begin, std::min(p.images, destination.size(0) - image), stop - r,
                             p.x.destination.length, result.as<const T>() + channel_begin * p.destination_plane,
                             p.destination_plane, p.width, p.pitch,
                             to + image * destination.stride(0) + channel_begin * destination.stride(1) +
                                 r * destination.stride(2),
                             destination.stride(1), destination.stride(0), destination.stride(2)});
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
          pack_source(kernels, p, input, image, begin, end + p.y.reach, packed.as<T>());
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
          pack_source(kernels, p, input, image, begin, end + p.y.reach, packed.as<T>());
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
  return g.batch > 0 && g.stride[0] == 1 && g.stride[1] == 1 && has_plain_planes(a) && has_plain_planes(b);
}

// Whether the planes can be had, and fit L2: where they overflow it, by_batch is quicker.
template <typename T>
bool fits(const Planes<T>& p) {
  return p.images > 0 && p.segments() <= kMaxSegments &&
         int64_t(sizeof(T)) * p.source_channels * p.source_channel <= 2 * kL2Bytes;
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
  const int64_t block = planes.source_block(w.density() * double(w.taps), w.out / w.groups);
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
