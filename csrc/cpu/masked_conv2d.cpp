// masked_conv2d on the CPU: checks, storage, threads and the order of work around the kernels of masked_conv2d.h.
//
// The batch is cut into tiles of `lanes` images. A task takes a tile (and a range of its rows or channels where there are
// more threads than tiles), walks down the rows in groups, packs what it meets (conv_window.h), and
//   forward      output rows      = product of the packed input with the weights            -> unpacked to the output
//   grad input   grad_input rows  = product of packed grad_output with the transposed ones  -> unpacked to grad_input
//   grad weight  dot products of the same packed grad_output with the packed input (SDDMM)
// Every output is summed in the order of the entries, and grad weight in the order of at most kChunks fixed chunks of the
// batch, so results do not depend on the number of threads. bfloat16 is computed in float32.

#include "cpu/masked_conv2d.h"

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <algorithm>
#include <limits>
#include <vector>

#include "checks.h"
#include "cpu/conv_geometry.h"
#include "cpu/conv_lists.h"
#include "cpu/conv_window.h"
#include "cpu/isa.h"
#include "cpu/workspace.h"

namespace uasparse {
namespace {

constexpr int64_t kChunks = 16;  // partial sums of grad weight
constexpr int64_t kGroupPositions = 16;  // positions a group of rows has at least, for long dot products

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

template <typename T>
const ConvKernels<T>& conv_kernels() {
#if defined(__x86_64__)
  if constexpr (sizeof(T) == 4) {
    if (cpu_isa() == Isa::avx512) return avx512::conv_float;
    if (cpu_isa() == Isa::avx2) return avx2::conv_float;
  } else {
    if (cpu_isa() == Isa::avx512) return avx512::conv_double;
    if (cpu_isa() == Isa::avx2) return avx2::conv_double;
  }
#endif
  if constexpr (sizeof(T) == 4)
    return portable::conv_float;
  else
    return portable::conv_double;
}

struct Geometry {
  int64_t batch, in, height, width, out, out_height, out_width, kernel_h, kernel_w, groups;
  at::IntArrayRef stride, padding, dilation;

  Pass forward(int64_t lanes) const {
    return Pass(forward_axis(height, out_height, kernel_h, stride[0], padding[0], dilation[0]),
                forward_axis(width, out_width, kernel_w, stride[1], padding[1], dilation[1]), in, out, lanes);
  }
  Pass backward(int64_t lanes) const {
    return Pass(backward_axis(height, out_height, kernel_h, stride[0], padding[0], dilation[0]),
                backward_axis(width, out_width, kernel_w, stride[1], padding[1], dilation[1]), out, in, lanes);
  }
};

// How a product cuts a group of rows into register tiles.
struct Tiling {
  int64_t rows, vectors;  // of a tile
  int64_t group;          // rows of a group

  Tiling(int64_t height, int64_t width, int max_vectors) {
    const int64_t strips = ceil_div(width, max_vectors);
    vectors = ceil_div(width, strips);
    rows = strips > 1 ? 1 : std::clamp<int64_t>(max_vectors / width, 1, std::min<int64_t>(4, height));
    group = std::min(height, ceil_div(std::max(rows, ceil_div(kGroupPositions, width)), rows) * rows);
  }
};

template <typename T>
int64_t source_block(const Pass& pass, int64_t rows, int64_t vectors, int64_t lanes, double nonzeros_a_channel,
                     int64_t channels) {
  const int64_t phases = pass.source.channel / pass.source.phase;
  const int64_t bytes = sizeof(T) * lanes * (rows + pass.y.reach) * (vectors + pass.x.reach) * phases;
  return channels_a_block(bytes, nonzeros_a_channel, channels);
}

// destination rows (channels [begin, end) of the lists) from source rows.
template <typename T>
void run_product(const ConvKernels<T>& kernels, const Pass& pass, const ConvEntries<T>& lists, const Tiling& tiling,
                 const T* source, T* destination, int64_t rows, int64_t begin, int64_t end, const T* bias) {
  const int64_t width = pass.x.destination.length;
  for (int64_t r = 0; r < rows; r += tiling.rows)
    for (int64_t x = 0; x < width; x += tiling.vectors)
      for (int64_t b = 0; b < lists.blocks; ++b)
        kernels.product({lists.entries(), lists.first.data() + b * lists.channels, begin, end,
                         source + r * pass.source.row + x * kernels.lanes, pass.source.row,
                         destination + r * pass.destination.row + x * kernels.lanes, pass.destination.row,
                         pass.destination.phase, b == 0, bias, int(std::min(tiling.rows, rows - r)),
                         int(std::min(tiling.vectors, width - x))});
}

template <typename S>
Images<S> images_of(const at::Tensor& t) {
  // The cast drops const for outputs alone; inputs are taken as Images<const S>.
  return {static_cast<S*>(const_cast<void*>(t.const_data_ptr())), t.size(0),  t.size(1), t.stride(0), t.stride(1),
          t.stride(2),                                            t.stride(3)};
}

ConvWeight weight_of(const at::Tensor& weight, const at::Tensor& crow, const at::Tensor& col, at::IntArrayRef shape,
                     at::IntArrayRef block, int64_t groups) {
  return {crow.const_data_ptr<int32_t>(), col.const_data_ptr<int32_t>(), shape[0], shape[1], shape[2] * shape[3],
          groups, block[0], block[1], col.size(0), weight.sizes() != shape};
}

template <typename T>
T to_number(T x) {
  return x;
}
float to_number(BFloat16 x) {
  const uint32_t bits = uint32_t(x.bits) << 16;
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}
template <typename T>
void from_number(T x, T* to) {
  *to = x;
}
void from_number(float x, BFloat16* to) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  to->bits = x != x ? uint16_t(0x7fc0) : uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

void check_offsets(const Pass& pass, int64_t rows) {
  TORCH_CHECK_VALUE(pass.source.row * (rows + pass.y.reach + 1) < std::numeric_limits<int32_t>::max(),
                    "masked_conv2d: an image row of ", pass.x.source.length, " columns and ", pass.source.channels,
                    " channels is too large for the sparse kernel; use the dense path (a dense weight).");
}

template <typename T, typename S>
void forward(const Geometry& g, const ConvWeight& w, const at::Tensor& input, const at::Tensor& weight,
             const S* bias, const at::Tensor& output) {
  const ConvKernels<T>& kernels = conv_kernels<T>();
  const int64_t lanes = kernels.lanes;
  const Pass pass = g.forward(lanes);
  const Tiling tiling(g.out_height, g.out_width, kernels.max_vectors);
  check_offsets(pass, tiling.group);
  const int64_t block =
      source_block<T>(pass, tiling.rows, tiling.vectors, lanes, w.density() * double(w.taps), w.in);
  const ConvEntries<T> lists(w, forward_order(w, pass, lanes, block), static_cast<const S*>(weight.const_data_ptr()));
  std::vector<T> biases;
  for (int64_t o = 0; bias != nullptr && o < g.out; ++o) biases.push_back(to_number(bias[o]));

  const int64_t tiles = ceil_div(g.batch, lanes), groups = ceil_div(g.out_height, tiling.group);
  const int64_t parts = std::clamp<int64_t>(ceil_div(at::get_num_threads(), tiles), 1, groups);
  at::parallel_for(0, tiles * parts, 1, [&](int64_t first, int64_t last) {
    Window<T, S> window(kernels, pass.y, pass.x, pass.source, images_of<const S>(input), tiling.group + pass.y.reach);
    RowMover<T, S> mover(kernels, pass.y.destination, pass.x.destination, pass.destination, images_of<S>(output));
    const Workspace rows(sizeof(T) * tiling.group * pass.destination.row);
    for (int64_t task = first; task < last; ++task) {
      const int64_t image = task / parts * lanes, part = task % parts;
      const int64_t begin = groups * part / parts * tiling.group;
      const int64_t end = std::min(g.out_height, groups * (part + 1) / parts * tiling.group);
      window.restart(image, begin);
      for (int64_t y = begin; y < end; y += tiling.group) {
        const int64_t stop = std::min(end, y + tiling.group);
        run_product(kernels, pass, lists, tiling, window.rows(y, stop + pass.y.reach), rows.as<T>(), stop - y, 0,
                    g.out, biases.empty() ? nullptr : biases.data());
        mover.move(image, y, stop, rows.as<T>(),
                   [](const auto& k, const ConvMove<T>& m, S* const* images) { unpack_rows(k, m, images); });
      }
    }
  });
}

// sums[c] += sum of the packed row's channel c.
template <typename T>
void add_channel_sums(const T* row, const PackedLayout& layout, int64_t begin, int64_t end, T* sums) {
  constexpr int64_t kParts = 16;
  for (int64_t c = begin; c < end; ++c) {
    const T* from = row + c * layout.channel;
    T parts[kParts] = {};
    int64_t i = 0;
    for (; i + kParts <= layout.channel; i += kParts)
      for (int64_t k = 0; k < kParts; ++k) parts[k] += from[i + k];
    for (; i < layout.channel; ++i) parts[0] += from[i];
    T total = 0;
    for (T part : parts) total += part;
    sums[c] += total;
  }
}

template <typename T, typename S>
void backward(const Geometry& g, const ConvWeight& w, const at::Tensor& grad_output, const at::Tensor& input,
              const at::Tensor& weight, const at::Tensor& grad_input, const at::Tensor& grad_weight,
              const at::Tensor& grad_bias) {
  const ConvKernels<T>& kernels = conv_kernels<T>();
  const int64_t lanes = kernels.lanes;
  const bool wants_input = grad_input.defined(), wants_weight = grad_weight.defined(), wants_bias = grad_bias.defined();
  const Pass pass = g.backward(lanes), forward_pass = g.forward(lanes);
  const int64_t rows = pass.y.destination.length, width = pass.x.destination.length;
  const Tiling tiling(rows, width, kernels.max_vectors);
  check_offsets(pass, tiling.group);
  check_offsets(forward_pass, tiling.group);
  const double density = w.density();

  // Lists for what is asked for; an empty pattern stands in for the rest.
  ConvWeight none = w;
  const std::vector<int32_t> no_rows(w.out / w.block_rows + 1, 0);
  none.crow = no_rows.data();
  none.blocks = 0;
  const ConvWeight& w_input = wants_input ? w : none;
  const ConvWeight& w_weight = wants_weight ? w : none;
  const int64_t out_a_group = w.out / w.groups;
  const int64_t input_block = source_block<T>(pass, tiling.rows, tiling.vectors, lanes,
                                              density * double(w.taps) / double(pass.destination_phases()), out_a_group);
  const ConvEntries<T> lists(w_input, backward_order(w_input, pass, lanes, input_block),
                             static_cast<const S*>(weight.const_data_ptr()));
  const int64_t weight_block =
      source_block<T>(forward_pass, std::min(tiling.group, g.out_height), g.out_width, lanes, density * double(w.taps), w.in);
  const ConvPlaces places(w_weight, forward_order(w_weight, forward_pass, lanes, weight_block));

  const int64_t tiles = ceil_div(g.batch, lanes), chunks = std::min(tiles, kChunks);
  const int64_t parts = std::clamp<int64_t>(chunks > 0 ? ceil_div(at::get_num_threads(), chunks) : 1, 1,
                                            std::min(g.out, g.in));
  const int64_t nonzeros = w_weight.nonzeros();
  const Workspace partial(sizeof(T) * chunks * (nonzeros + g.out));
  T* const partial_weight = partial.as<T>();
  T* const partial_bias = partial_weight + chunks * nonzeros;
  if (chunks > 0) std::fill_n(partial_weight, chunks * (nonzeros + g.out), T(0));

  at::parallel_for(0, chunks * parts, 1, [&](int64_t first, int64_t last) {
    Window<T, S> grads(kernels, pass.y, pass.x, pass.source, images_of<const S>(grad_output),
                       tiling.group + pass.y.reach);
    Window<T, S> inputs(kernels, forward_pass.y, forward_pass.x, forward_pass.source, images_of<const S>(input),
                        tiling.group + forward_pass.y.reach);
    RowMover<T, S> mover(kernels, pass.y.destination, pass.x.destination, pass.destination,
                         wants_input ? images_of<S>(grad_input) : Images<S>{});
    const Workspace result(wants_input ? sizeof(T) * tiling.group * pass.destination.row : 0);
    for (int64_t task = first; task < last; ++task) {
      const int64_t chunk = task / parts, part = task % parts;
      const int64_t phases = pass.destination_phases();
      const int64_t in_begin = g.in * part / parts, in_end = g.in * (part + 1) / parts;
      const int64_t out_begin = g.out * part / parts, out_end = g.out * (part + 1) / parts;
      for (int64_t tile = tiles * chunk / chunks; tile < tiles * (chunk + 1) / chunks; ++tile) {
        const int64_t image = tile * lanes;
        grads.restart(image, 0);
        if (wants_weight) inputs.restart(image, 0);
        for (int64_t y = 0; y < pass.y.source.length; y += tiling.group) {
          const int64_t stop = std::min(pass.y.source.length, y + tiling.group);
          const T* packed = grads.rows(y, std::min(pass.y.source.length, stop + pass.y.reach));
          if (wants_input && y < rows) {
            const int64_t count = std::min(stop, rows) - y;
            run_product(kernels, pass, lists, tiling, packed, result.as<T>(), count, in_begin * phases,
                        in_end * phases, static_cast<const T*>(nullptr));
            mover.move_channels(image, y, y + count, in_begin, in_end, result.as<T>(),
                                [](const auto& k, const ConvMove<T>& m, S* const* i) { unpack_rows(k, m, i); });
          }
          // Rows of grad_output among the packed ones: row i is packed row i + lead.
          const int64_t begin = std::max<int64_t>(0, y - pass.y.lead), end = std::min(g.out_height, stop - pass.y.lead);
          if (begin >= end) continue;
          const T* grad_rows = packed + (begin + pass.y.lead - y) * pass.source.row;
          if (wants_weight) {
            const T* input_rows = inputs.rows(begin, end + forward_pass.y.reach);
            for (int64_t b = 0; b < places.blocks; ++b)
              kernels.sddmm({places.offset(), places.first.data() + b * places.channels, out_begin, out_end, input_rows,
                             forward_pass.source.row, grad_rows + pass.x.lead * lanes, pass.source.row,
                             pass.source.channel, end - begin, g.out_width, partial_weight + chunk * nonzeros});
          }
          if (wants_bias)
            for (int64_t r = 0; r < end - begin; ++r)
              add_channel_sums(grad_rows + r * pass.source.row, pass.source, out_begin, out_end,
                               partial_bias + chunk * g.out);
        }
      }
    }
  });

  if (wants_weight) {
    S* to = static_cast<S*>(grad_weight.mutable_data_ptr());
    at::parallel_for(0, nonzeros, 1 << 14, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        T total = 0;
        for (int64_t chunk = 0; chunk < chunks; ++chunk) total += partial_weight[chunk * nonzeros + i];
        from_number(total, to + places.place()[i]);
      }
    });
  }
  if (wants_bias) {
    S* to = static_cast<S*>(grad_bias.mutable_data_ptr());
    for (int64_t o = 0; o < g.out; ++o) {
      T total = 0;
      for (int64_t chunk = 0; chunk < chunks; ++chunk) total += partial_bias[chunk * g.out + o];
      from_number(total, to + o);
    }
  }
}

// --- the ops

Geometry check(const at::Tensor& input, const at::Tensor& weight, const at::Tensor& crow, const at::Tensor& col,
               at::IntArrayRef shape, at::IntArrayRef block, at::IntArrayRef stride, at::IntArrayRef padding,
               at::IntArrayRef dilation, int64_t groups) {
  check_csr(crow, col, shape, block);
  TORCH_CHECK_VALUE(shape.size() == 4 && stride.size() == 2 && padding.size() == 2 && dilation.size() == 2,
                    "masked_conv2d: expected a weight shape of 4 sizes and pairs of stride, padding and dilation.");
  for (int i = 0; i < 2; ++i)
    TORCH_CHECK_VALUE(stride[i] >= 1 && dilation[i] >= 1 && padding[i] >= 0,
                      "masked_conv2d: expected stride and dilation >= 1 and padding >= 0, got ", stride, ", ",
                      dilation, " and ", padding, ".");
  TORCH_CHECK_VALUE(groups >= 1 && shape[0] % groups == 0 && shape[0] / groups % block[0] == 0,
                    "masked_conv2d: expected groups that divide the output size ", shape[0], " into whole blocks, got ",
                    groups, ".");
  TORCH_CHECK_VALUE(input.dim() == 4 && input.size(1) == shape[1] * groups, "masked_conv2d: expected an input [N, ",
                    shape[1] * groups, ", H, W] for a weight of shape ", shape, " and ", groups, " groups, got ",
                    input.sizes(), ".");
  const int64_t packed = col.size(0) * block[0] * block[1];
  TORCH_CHECK_VALUE(weight.sizes() == shape || weight.numel() == packed, "masked_conv2d: expected a weight of shape ",
                    shape, " or ", packed, " packed values, got ", weight.sizes(), ".");
  TORCH_CHECK_TYPE(weight.scalar_type() == input.scalar_type(), "masked_conv2d: expected input and weight of one dtype, got ",
                   input.scalar_type(), " and ", weight.scalar_type(), ".");
  Geometry g{input.size(0), input.size(1), input.size(2), input.size(3), shape[0], 0, 0, shape[2], shape[3],
             groups,        stride,        padding,       dilation};
  g.out_height = (g.height + 2 * padding[0] - dilation[0] * (g.kernel_h - 1) - 1) / stride[0] + 1;
  g.out_width = (g.width + 2 * padding[1] - dilation[1] * (g.kernel_w - 1) - 1) / stride[1] + 1;
  TORCH_CHECK_VALUE(g.height + 2 * padding[0] > dilation[0] * (g.kernel_h - 1) &&
                        g.width + 2 * padding[1] > dilation[1] * (g.kernel_w - 1),
                    "masked_conv2d: the kernel ", shape.slice(2), " with dilation ", dilation,
                    " is larger than the padded input ", input.sizes(), ".");
  return g;
}

// Calls run.operator()<accumulation type, storage type>().
template <typename Run>
void dispatch(at::ScalarType type, Run run) {
  switch (type) {
    case at::kFloat: return run.template operator()<float, float>();
    case at::kDouble: return run.template operator()<double, double>();
    case at::kBFloat16: return run.template operator()<float, BFloat16>();
    default:
      TORCH_CHECK_TYPE(false, "masked_conv2d: expected float32, float64 or bfloat16, got ", type, ".");
  }
}

at::Tensor masked_conv2d(const at::Tensor& input, const at::Tensor& weight, const std::optional<at::Tensor>& bias,
                         const at::Tensor& crow, const at::Tensor& col, const at::Tensor&, const at::Tensor&,
                         const at::Tensor&, at::IntArrayRef shape, at::IntArrayRef block, at::IntArrayRef stride,
                         at::IntArrayRef padding, at::IntArrayRef dilation, int64_t groups) {
  const Geometry g = check(input, weight, crow, col, shape, block, stride, padding, dilation, groups);
  const at::Tensor values = weight.contiguous();
  at::Tensor bias_values;
  if (bias.has_value() && bias->defined()) {
    TORCH_CHECK_VALUE(bias->dim() == 1 && bias->size(0) == g.out && bias->scalar_type() == input.scalar_type(),
                      "masked_conv2d: expected a bias of ", g.out, " numbers of the input's dtype, got ", bias->sizes(),
                      " of ", bias->scalar_type(), ".");
    bias_values = bias->contiguous();
  }
  const at::Tensor output = at::empty({g.batch, g.out, g.out_height, g.out_width}, input.options(),
                                      input.suggest_memory_format());
  if (output.numel() == 0) return output;
  const ConvWeight w = weight_of(values, crow, col, shape, block, groups);
  dispatch(input.scalar_type(), [&]<typename T, typename S>() {
    const S* bias_data = bias_values.defined() ? static_cast<const S*>(bias_values.const_data_ptr()) : nullptr;
    forward<T, S>(g, w, input, values, bias_data, output);
  });
  return output;
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> masked_conv2d_backward(
    const at::Tensor& grad_output, const at::Tensor& input, const at::Tensor& weight, const at::Tensor& crow,
    const at::Tensor& col, const at::Tensor&, const at::Tensor&, const at::Tensor&, at::IntArrayRef shape,
    at::IntArrayRef block, at::IntArrayRef stride, at::IntArrayRef padding, at::IntArrayRef dilation, int64_t groups,
    std::array<bool, 3> output_mask) {
  const Geometry g = check(input, weight, crow, col, shape, block, stride, padding, dilation, groups);
  TORCH_CHECK_VALUE(grad_output.sizes() == at::IntArrayRef({g.batch, g.out, g.out_height, g.out_width}),
                    "masked_conv2d: expected a grad_output of the output's shape, got ", grad_output.sizes(), ".");
  TORCH_CHECK_TYPE(grad_output.scalar_type() == input.scalar_type(),
                   "masked_conv2d: expected grad_output and input of one dtype, got ", grad_output.scalar_type(), " and ",
                   input.scalar_type(), ".");
  const at::Tensor values = weight.contiguous();
  const ConvWeight w = weight_of(values, crow, col, shape, block, groups);
  const auto plain = input.options().memory_format(at::MemoryFormat::Contiguous);
  // Dense storage: inactive entries keep zero.
  at::Tensor grad_input, grad_weight, grad_bias;
  if (output_mask[0]) grad_input = at::empty(input.sizes(), input.options(), input.suggest_memory_format());
  if (output_mask[1]) grad_weight = w.packed ? at::empty(weight.sizes(), plain) : at::zeros(weight.sizes(), plain);
  if (output_mask[2]) grad_bias = at::empty({g.out}, plain);
  dispatch(input.scalar_type(), [&]<typename T, typename S>() {
    backward<T, S>(g, w, grad_output, input, values, grad_input, grad_weight, grad_bias);
  });
  const auto or_empty = [&](const at::Tensor& t) { return t.defined() ? t : at::empty({0}, plain); };
  return {or_empty(grad_input), or_empty(grad_weight), or_empty(grad_bias)};
}

}  // namespace

TORCH_LIBRARY_IMPL(uasparse, CPU, m) {
  m.impl("masked_conv2d", &masked_conv2d);
  m.impl("masked_conv2d_backward", &masked_conv2d_backward);
}

}  // namespace uasparse
