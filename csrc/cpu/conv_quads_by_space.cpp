// masked_conv2d by space for weights in blocks (conv_quads.h): several taps, stride 1, planes that fit L2; float32, AVX-512.
//
// A vector of the source, once loaded, meets four numbers, so that it may lie anywhere: a load that crosses a cache line
// takes less time than the multiply-adds that it feeds. So neither sources nor sums are shifted. The rows of a plane
// follow each other, in them a few images side by side; each tap is one offset, a plane of results is one run of
// positions, and a register tile is any few vectors of it. What a tap would read beyond the end of a row is made zero
//   by masks    where rows of 4, 8, 16 or 32 make them the same every two vectors: they are loaded with the entry
//   by columns  elsewhere: between rows are as many zeros as the padding has, shared by both neighbours. Results of these
//               columns are not used, and grad_output is zero there for dot products.
// Beyond the last row of a part, in its last vector, grad_output is zero too. An infinity that meets one of these zeros of
// grad_output is not a number, as in conv_by_space.cpp.
// Where a plane of results is whole vectors without such columns, it is written, or grad_output read, where it is.

#include <limits>
#include <numeric>

#include "cpu/conv_planes.h"

namespace uasparse {
namespace {

constexpr int64_t kMapsBytes = 640 << 10;  // of L2 both maps of a group of rows
constexpr int64_t kDotsVectors = 18;     // of a plane that dot products take together: its sources stay in L1
// What a visit of a kernel costs beside its vectors, as so many of them: the end of a list; folded sums.
constexpr int64_t kProductVisit = 1, kDotsVisit = 3;

// The images of a tile, and their rows [begin, begin + rows) of the destination.
struct Part {
  int64_t image, images, begin, rows;
};

struct QuadPlanes {
  AxisPass y, x;
  int64_t lanes, batch, height, width, source_channels;  // height, width: of the destination
  Run columns;
  int64_t pitch;  // from an image to the next
  int period;     // of the masks, in vectors; 1 without masks
  bool masked;
  int64_t images = 0, row;  // side by side; from a row to the next
  int64_t group;            // rows that are packed together
  bool direct;              // the destination is where it belongs
  int64_t before;           // numbers before the first channel of the source
  int64_t source_channel, destination_channel;

  // `most`: vectors that a kernel takes at once, beside which each such visit costs as much as `visit` vectors more.
  QuadPlanes(AxisPass y_pass, AxisPass x_pass, int64_t source_channels, int64_t destination_channels, int64_t batch,
             int64_t lanes, int64_t most, int64_t visit)
      : y(std::move(y_pass)),
        x(std::move(x_pass)),
        lanes(lanes),
        batch(batch),
        height(y.destination.length),
        width(x.destination.length),
        source_channels(source_channels),
        columns(run_of(x.source, 0, 0, x.source.length)) {
    pitch = std::max(width, columns.size());
    masked = 2 * lanes % pitch == 0;
    period = masked && pitch > lanes ? 2 : 1;
    if (!masked)
      pitch = std::max(width, columns.size() + std::max(columns.begin, x.source.length - columns.end));
    const auto is_direct = [&](int64_t n) { return n == 1 && pitch == width && height * width % lanes == 0; };
    const auto row_bytes = [&](int64_t n) {
      return int64_t(sizeof(float)) * n * pitch * (source_channels + (is_direct(n) ? 0 : destination_channels));
    };
    double best = std::numeric_limits<double>::max();
    for (int64_t n = 1; n <= std::min(batch, lanes); ++n) {
      if (n > 1 && row_bytes(n) * (height + y.reach) > kMapsBytes) break;
      const int64_t vectors = ceil_div(height * n * pitch, lanes);
      const double copied = is_direct(n) ? 1 : 1.2;
      const double cost = copied * double((vectors + ceil_div(vectors, most) * visit) * ceil_div(batch, n));
      if (cost < 0.98 * best) {
        best = cost;
        images = n;
      }
    }
    row = images * pitch;
    const int64_t fit = std::max<int64_t>(1, kMapsBytes / row_bytes(images) - y.reach);
    group = ceil_div(height, ceil_div(height, fit));
    direct = is_direct(images);
    if (direct) {  // whole vectors
      const int64_t unit = lanes / std::gcd(lanes, width);
      group = ceil_div(group, unit) * unit;
    }
    before = ceil_div(columns.begin, lanes) * lanes;
    // The last vector of a run may end behind it, and a tap beyond that.
    source_channel = apart((group + y.reach) * row + x.reach + lanes);
    destination_channel = apart(vectors(group) * lanes);
  }

  // Where the planes overflow L2, or most positions are between rows, by_batch is quicker.
  bool fits() const {
    return int64_t(sizeof(float)) * source_channels * source_channel <= (1 << 20) && 4 * pitch <= 5 * width;
  }

  int64_t vectors(int64_t rows) const { return ceil_div(rows * row, lanes); }
  int64_t tiles() const { return ceil_div(batch, images); }
  int64_t groups() const { return ceil_div(height, group); }
  Part part(int64_t i) const {
    const int64_t image = i / groups() * images, begin = i % groups() * group;
    return {image, std::min(images, batch - image), begin, std::min(group, height - begin)};
  }

  ConvTaps taps() const {
    ConvTaps taps{source_channel, {}, {}, 1, {}};
    for (const int64_t shift_y : y.shift)
      for (const int64_t shift_x : x.shift) {
        taps.offset.push_back(shift_y * row + shift_x - columns.begin);
        taps.phase.push_back(0);
        taps.segment.push_back(0);
      }
    return taps;
  }

  // Of each tap: the masks of its sources.
  std::vector<ConvPlaneColumn> masks() const {
    std::vector<ConvPlaneColumn> masks(y.shift.size() * x.shift.size(), {0, {0xffff, 0xffff}});
    for (size_t tap = 0; masked && tap < masks.size(); ++tap) {
      const int64_t shift = x.shift[tap % x.shift.size()] - columns.begin;
      for (int64_t i = 0; i < 2 * lanes; ++i) {
        const int64_t to = i % pitch, from = to + shift;
        const bool inside = to < width && from >= 0 && from < columns.size();
        if (!inside) masks[tap].inside[i / lanes] &= uint16_t(~(1 << i % lanes));
      }
    }
    return masks;
  }

  int64_t source_block(int64_t vectors, const ConvWeight& w, int64_t channels) const {
    const int64_t bytes = sizeof(float) * (vectors * lanes + y.reach * row + x.reach);
    return channels_a_block(bytes, w.density() * double(w.taps), channels);
  }

  // `to` is zero where nothing was packed yet.
  void pack_source(const ConvKernels<float>& kernels, const at::Tensor& t, const Part& part, float* to) const {
    if (part.images < images) std::fill_n(to, source_channels * source_channel, 0.0f);
    const int64_t end = part.begin + part.rows + y.reach;
    const Run rows = run_of(y.source, 0, part.begin, end);
    for (int64_t c = 0; c < source_channels; ++c) {
      float* const channel = to + c * source_channel;
      std::fill(channel, channel + (rows.begin - part.begin) * row, 0.0f);
      std::fill(channel + (rows.end - part.begin) * row, channel + (end - part.begin) * row, 0.0f);
    }
    copy_rows<float>(kernels, {source_channels, part.images, rows.size(), columns.size(),
                               t.const_data_ptr<float>() + part.image * t.stride(0) +
                                   (rows.begin + y.source.origin) * t.stride(2) + columns.begin + x.source.origin,
                               t.stride(1), t.stride(0), t.stride(2), to + (rows.begin - part.begin) * row,
                               source_channel, pitch, row});
  }
};

// destination = product of the source with the weights at the places of `order`.
void run_products(const ConvKernels<float>& kernels, const QuadPlanes& p, const ConvQuadOrder& order, const float* values,
                  const at::Tensor& source, const at::Tensor& destination, const float* bias) {
  const int64_t channels = destination.size(1), quads = channels / 4, count = order.first(order.blocks)[0];
  const Workspace memory(sizeof(ConvPlaneQuad) * count);
  ConvPlaneQuad* const entries = memory.as<ConvPlaneQuad>();
  const auto masks = p.masks();
  at::parallel_for(0, count, 1 << 12, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) {
      const ConvQuadEntry<int32_t>& from = order.entries()[i];
      for (int r = 0; r < 4; ++r) entries[i].value[r] = values[from.value[r]];
      entries[i].column = masks[from.tap];
      entries[i].column.offset = from.offset;
    }
  });
  const int64_t parts = even_parts(p.tiles() * p.groups(), quads);
  at::parallel_for(0, p.tiles() * p.groups() * parts, 1, [&](int64_t first, int64_t last) {
    const int64_t numbers = p.before + p.source_channels * p.source_channel;
    const Workspace packed(sizeof(float) * numbers);
    const Workspace result(p.direct ? 0 : sizeof(float) * channels * p.destination_channel);
    std::fill_n(packed.as<float>(), numbers, 0.0f);
    float* const from = packed.as<float>() + p.before;
    for (int64_t task = first; task < last; ++task) {
      const Part part = p.part(task / parts);
      const int64_t quad_begin = quads * (task % parts) / parts, quad_end = quads * (task % parts + 1) / parts;
      p.pack_source(kernels, source, part, from);
      float* const place = destination.mutable_data_ptr<float>() + part.image * destination.stride(0) +
                           part.begin * destination.stride(2);
      float* const to = p.direct ? place : result.as<float>();
      const int64_t to_channel = p.direct ? destination.stride(1) : p.destination_channel;
      // Tiles of much the same size, that begin with even vectors.
      const int64_t vectors = p.vectors(part.rows), units = ceil_div(vectors, p.period);
      const int64_t tiles = ceil_div(vectors, kernels.max_quad_vectors);
      for (int64_t t = 0; t < tiles; ++t) {
        const int64_t at = units * t / tiles * p.period, stop = std::min(units * (t + 1) / tiles * p.period, vectors);
        for (int64_t b = 0; b < order.blocks; ++b)
          kernels.plane_quad_product({entries, order.first(b), quad_begin, quad_end, from + at * p.lanes,
                                      to + at * p.lanes, to_channel, b == 0, bias, int(stop - at)});
      }
      if (p.direct) continue;
      kernels.copy_planes({4 * (quad_end - quad_begin), part.images, part.rows, p.width,
                           to + 4 * quad_begin * to_channel, to_channel, p.pitch, p.row,
                           place + 4 * quad_begin * destination.stride(1), destination.stride(1),
                           destination.stride(0), destination.stride(2)});
    }
  });
}

// Where the i-th sum belongs.
struct Places {
  const ConvQuadOrder& order;
  int64_t place(int64_t i) const { return order.entries()[i / 4].value[i % 4]; }
};

// sums = dot products of grad_output with the input, over chunks of the tiles of images.
void run_dots(const ConvKernels<float>& kernels, const QuadPlanes& p, const ConvQuadOrder& order,
              const at::Tensor& grad_output, const at::Tensor& input, PartialSums<float>& sums, int64_t parts) {
  const int64_t channels = grad_output.size(1), quads = channels / 4, groups = p.groups();
  std::vector<ConvPlaneColumn> columns(order.first(order.blocks)[0]);
  const auto masks = p.masks();
  for (size_t i = 0; i < columns.size(); ++i) {
    columns[i] = masks[order.entries()[i].tap];
    columns[i].offset = order.entries()[i].offset;
  }
  at::parallel_for(0, sums.chunks * parts, 1, [&](int64_t first, int64_t last) {
    const int64_t numbers = p.before + p.source_channels * p.source_channel;
    const int64_t grad_numbers = p.direct ? 0 : channels * p.destination_channel;
    const Workspace packed(sizeof(float) * numbers), packed_grads(sizeof(float) * grad_numbers);
    std::fill_n(packed.as<float>(), numbers, 0.0f);
    std::fill_n(packed_grads.as<float>(), grad_numbers, 0.0f);
    float* const from = packed.as<float>() + p.before;
    for (int64_t task = first; task < last; ++task) {
      const int64_t chunk = task / parts;
      const int64_t quad_begin = quads * (task % parts) / parts, quad_end = quads * (task % parts + 1) / parts;
      const int64_t end = p.tiles() * (chunk + 1) / sums.chunks * groups;
      for (int64_t i = p.tiles() * chunk / sums.chunks * groups; i < end; ++i) {
        const Part part = p.part(i);
        p.pack_source(kernels, input, part, from);
        const float* const place = grad_output.const_data_ptr<float>() + part.image * grad_output.stride(0) +
                                   part.begin * grad_output.stride(2);
        const float* const grads = p.direct ? place : packed_grads.as<const float>();
        const int64_t grad_channel = p.direct ? grad_output.stride(1) : p.destination_channel;
        if (!p.direct) {
          if (part.images < p.images || part.rows < p.group) std::fill_n(packed_grads.as<float>(), grad_numbers, 0.0f);
          copy_rows<float>(kernels, {4 * (quad_end - quad_begin), part.images, part.rows, p.width,
                                     place + 4 * quad_begin * grad_output.stride(1), grad_output.stride(1),
                                     grad_output.stride(0), grad_output.stride(2),
                                     packed_grads.as<float>() + 4 * quad_begin * grad_channel, grad_channel, p.pitch,
                                     p.row});
        }
        const int64_t vectors = p.vectors(part.rows), units = ceil_div(vectors, p.period);
        const int64_t pieces = ceil_div(vectors, kDotsVectors);
        for (int64_t t = 0; t < pieces; ++t) {
          const int64_t at = units * t / pieces * p.period;
          const int64_t stop = std::min(units * (t + 1) / pieces * p.period, vectors);
          for (int64_t b = 0; b < order.blocks; ++b)
            kernels.plane_quad_dots({columns.data(), order.first(b), quad_begin, quad_end, from + at * p.lanes,
                                     grads + at * p.lanes, grad_channel, stop - at, p.period, sums.weight(chunk)});
        }
      }
    }
  });
}

// Whether there are kernels, and planes that they can read.
bool can(const Geometry& g, const ConvWeight& w, const at::Tensor& a, const at::Tensor& b) {
  return conv_kernels<float>().plane_quad_product != nullptr && g.batch > 0 && g.stride[0] == 1 && g.stride[1] == 1 &&
         g.kernel_h * g.kernel_w > 1 && w.has_short_places() && has_plain_planes(a) && has_plain_planes(b);
}

}  // namespace

bool forward_quads_by_space(const Geometry& g, const ConvWeight& w, const at::Tensor& input, const at::Tensor& weight,
                            const std::vector<float>& bias, const at::Tensor& output) {
  if (!can(g, w, input, output)) return false;
  const ConvKernels<float>& kernels = conv_kernels<float>();
  const QuadPlanes planes(g.forward_y(), g.forward_x(), g.in, g.out, g.batch, kernels.lanes, kernels.max_quad_vectors,
                          kProductVisit);
  if (!planes.fits()) return false;
  const auto order = forward_quad_order(w, planes.taps(), planes.source_block(kernels.max_quad_vectors, w, w.in));
  run_products(kernels, planes, *order, weight.const_data_ptr<float>(), input, output,
               bias.empty() ? nullptr : bias.data());
  return true;
}

bool input_gradient_quads_by_space(const Geometry& g, const ConvWeight& w, const at::Tensor& grad_output,
                                   const at::Tensor& weight, const at::Tensor& grad_input) {
  if (!can(g, w, grad_output, grad_input)) return false;
  const ConvKernels<float>& kernels = conv_kernels<float>();
  const QuadPlanes planes(g.backward_y(), g.backward_x(), g.out, g.in, g.batch, kernels.lanes, kernels.max_quad_vectors,
                          kProductVisit);
  if (!planes.fits()) return false;
  const int64_t block = planes.source_block(kernels.max_quad_vectors, w, w.out / w.groups);
  const auto order = backward_quad_order(w, planes.taps(), block);
  run_products(kernels, planes, *order, weight.const_data_ptr<float>(), grad_output, grad_input, nullptr);
  return true;
}

bool weight_gradient_quads_by_space(const Geometry& g, const ConvWeight& w, const at::Tensor& grad_output,
                                    const at::Tensor& input, const at::Tensor& grad_weight) {
  if (!can(g, w, grad_output, input)) return false;
  const ConvKernels<float>& kernels = conv_kernels<float>();
  const QuadPlanes planes(g.forward_y(), g.forward_x(), g.in, g.out, g.batch, kernels.lanes, kDotsVectors, kDotsVisit);
  if (!planes.fits()) return false;
  const auto order =
      dots_quad_order(w, planes.taps(), planes.source_block(std::min(kDotsVectors, planes.vectors(planes.group)), w, w.in));
  PartialSums<float> sums(planes.tiles(), w.nonzeros(), 0);
  run_dots(kernels, planes, *order, grad_output, input, sums, std::min(sums.parts(g), g.out / 4));
  sums.template finish<float>(Places{*order}, {at::Tensor(), grad_weight, at::Tensor()});
  return true;
}

}  // namespace uasparse
