// masked_linear on the CPU: checks, storage, threads and workspaces around the kernels of masked_linear.h.
//
// With B the batch (all leading dimensions), activations are packed to panels [channels][64 of the batch], a few panels a
// thread at a time; then
//   forward      output panel   = W x input panel             tasks: panels x ranges of grid rows
//   grad input   input panel    = W^T x grad_output panel     tasks: panels x ranges of grid columns
//   grad weight  dots of rows of the two panels (SDDMM)       tasks: ranges of grid rows, over all panels in order
// Every number is computed by one task in a fixed order, so results do not depend on the number of threads.
// Dense-stored weights are packed first and their gradient is unpacked. bfloat16 is computed in float32 panels, or, where
// masked_linear_bf16.h has kernels, in panels of its own. T is the type of sums, In that of panels and values.

#include "cpu/masked_linear.h"

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <algorithm>
#include <array>
#include <type_traits>
#include <vector>

#include "checks.h"
#include "cpu/isa.h"
#include "cpu/masked_linear_bf16.h"
#include "cpu/pattern.h"
#include "cpu/segments.h"
#include "cpu/verified.h"
#include "cpu/workspace.h"

namespace uasparse {

template <>
const LinearKernels<float>& linear_kernels<float>() {
#if defined(__x86_64__)
  if (cpu_isa() == Isa::avx512) return avx512::linear_float;
  if (cpu_isa() == Isa::avx2) return avx2::linear_float;
#endif
  return portable::linear_float;
}

template <>
const LinearKernels<double>& linear_kernels<double>() {
#if defined(__x86_64__)
  if (cpu_isa() == Isa::avx512) return avx512::linear_double;
  if (cpu_isa() == Isa::avx2) return avx2::linear_double;
#endif
  return portable::linear_double;
}

const Bf16Kernels* bf16_kernels() {
#if defined(__x86_64__)
  if (has_bf16_pairs()) return &avx512bf16::linear;
#endif
  return nullptr;
}

namespace {

// Outputs of a task, over all its panels: they stay in a core's L2 cache, as do the weights of one column block, which
// all panels of a task share.
constexpr int64_t kTaskOutputs = 512;
constexpr int64_t kTaskPanels = 2;

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

struct Grid {
  const int32_t *crow, *col;  // col or
  const uint16_t* short_col;  // short_col, the other null
  const int32_t *ccol, *row, *perm;
  std::array<const at::Tensor*, 2> by_rows, by_columns;  // crow and col, ccol and row
  int64_t rows, columns, blocks, bh, bw;

  int64_t out() const { return rows * bh; }
  int64_t in() const { return columns * bw; }
  int64_t values() const { return blocks * bh * bw; }
};

// How the batch, or the part of it from `start` on, is cut into panels of numbers of T.
template <typename T, typename In = T>
struct Panels {
  static constexpr int64_t tile = kTileBytes / sizeof(T);
  int64_t start, batch, count, last;

  explicit Panels(int64_t batch, int64_t start = 0) : start(start), batch(batch), count(ceil_div(batch, tile)) {
    constexpr int64_t unit = kLaneBytes / sizeof(In);
    last = ceil_div(batch - (count - 1) * tile, unit) * unit;
  }
  int64_t width(int64_t panel) const { return panel + 1 < count ? tile : last; }
  int64_t batch_of(int64_t panel) const { return std::min(tile, batch - panel * tile); }
  int64_t lanes() const { return (count - 1) * tile + last; }
  size_t bytes(int64_t channels) const { return sizeof(In) * lanes() * channels; }

  // Groups of at most `most` panels of one width.
  std::vector<Panels> groups(int64_t most) const {
    std::vector<Panels> parts;
    for (int64_t first = 0; first < count;) {
      const int64_t equal = last == tile || first + 1 == count ? count - first : count - first - 1;
      const int64_t size = std::min(equal, most);
      parts.push_back(Panels(std::min(batch - first * tile, size * tile), start + first * tile));
      first += size;
    }
    return parts;
  }
};

// Grid columns taken together: enough of them for ~30 blocks a row, for less does not pay for loading and storing the
// row's outputs, and no fewer than what L1 holds. Narrow panels (batch <= 16) are bound by the weights instead, which are
// read in order if no columns are set apart.
int64_t column_block(const Grid& grid, int64_t columns, int64_t inputs_per_column, int64_t width_bytes) {
  const double density = static_cast<double>(grid.blocks) / static_cast<double>(grid.rows * grid.columns);
  const int64_t near = std::max<int64_t>(1, (width_bytes <= kLaneBytes ? 512 : 48) * 1024 /
                                                 (inputs_per_column * width_bytes));
  const int64_t wanted = density > 0 ? static_cast<int64_t>(std::min(30 / density, 1e9)) : columns;
  return std::clamp<int64_t>(std::max(near, wanted), 1, columns);
}

// The panels that are packed and used together, before the next ones: so they are still in a near cache when they are used.
template <typename T, typename In>
std::vector<Panels<T, In>> parts_of(int64_t batch) {
  return Panels<T, In>(batch).groups(kTaskPanels * at::get_num_threads());
}

// The panels' rows of `tensor` [batch, channels], contiguous, packed.
template <typename T, typename In>
void pack_panels(const at::Tensor& tensor, const Panels<T, In>& panels, In* to) {
  const LinearKernels<T>& kernels = linear_kernels<T>();
  const int64_t channels = tensor.size(1), chunk = 256, chunks = ceil_div(channels, chunk);
  at::parallel_for(0, panels.count * chunks, 4, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t panel = task / chunks, c = task % chunks * chunk, width = panels.width(panel);
      const int64_t offset = (panels.start + panel * panels.tile) * channels + c, count = std::min(chunk, channels - c);
      In* out = to + panel * panels.tile * channels + c * width;
      if constexpr (!std::is_same_v<T, In>) {
        const auto* from = static_cast<const uint16_t*>(tensor.const_data_ptr()) + offset;
        bf16_kernels()->pack(from, channels, panels.batch_of(panel), count, out, width);
      } else if (tensor.scalar_type() == at::kBFloat16) {
        const auto* from = static_cast<const uint16_t*>(tensor.const_data_ptr()) + offset;
        kernels.pack_bf16(from, channels, panels.batch_of(panel), count, out, width);
      } else {
        kernels.pack(static_cast<const T*>(tensor.const_data_ptr()) + offset, channels, panels.batch_of(panel), count,
                     out, width);
      }
    }
  });
}

// The rows of result [batch, outputs] that are in the panels = what `product` describes. `rows` grid rows.
template <typename T, typename In>
void run_product(Product<T, In> product, const Segments& segments, int64_t rows, int64_t inputs,
                 const Panels<T, In>& panels, const at::Tensor& result) {
  const LinearKernels<T>& kernels = linear_kernels<T>();
  const int64_t outputs = result.size(1), block = product.block_out;
  const int64_t threads = at::get_num_threads();
  const std::vector<Panels<T, In>> groups = panels.groups(kTaskPanels);
  const int64_t most = std::min(kTaskPanels, panels.count);
  int64_t chunk = std::max<int64_t>(1, kTaskOutputs / (block * most));
  if (threads > 1) chunk = std::clamp<int64_t>(ceil_div(rows * std::ssize(groups), 2 * threads), 1, chunk);
  const int64_t chunks = ceil_div(rows, chunk);
  at::parallel_for(0, std::ssize(groups) * chunks, 1, [&](int64_t begin, int64_t end) {
    const Workspace outs(sizeof(T) * chunk * block * most * panels.tile);
    for (int64_t task = begin; task < end; ++task) {
      const Panels<T, In>& group = groups[task / chunks];
      const int64_t row = task % chunks * chunk, count = std::min(chunk, rows - row);
      Product<T, In> p = product;
      p.starts = segments.starts, p.stride = segments.stride, p.column_blocks = segments.blocks;
      p.begin = row;
      p.end = row + count;
      p.panels = group.count;
      p.width = group.last;
      p.in_panel = group.tile * inputs;
      p.out_panel = count * block * p.width;
      p.in = product.in + (group.start - panels.start) * inputs;
      p.out = outs.as<T>();
      p.bias = product.bias ? product.bias + row * block : nullptr;
      if constexpr (std::is_same_v<T, In>)
        kernels.product(p);
      else
        bf16_kernels()->product(p);
      for (int64_t panel = 0; panel < group.count; ++panel) {
        const T* from = p.out + panel * p.out_panel;
        const int64_t offset = (group.start + panel * group.tile) * outputs + row * block;
        if (result.scalar_type() == at::kBFloat16) {
          auto* to = static_cast<uint16_t*>(result.mutable_data_ptr()) + offset;
          kernels.unpack_bf16(from, p.width, count * block, to, outputs, group.batch_of(panel));
        } else {
          auto* to = static_cast<T*>(result.mutable_data_ptr()) + offset;
          kernels.unpack(from, p.width, count * block, to, outputs, group.batch_of(panel));
        }
      }
    }
  });
}

bool is_narrow(int64_t batch, int64_t block_size, at::ScalarType type) {
  return batch <= kNarrow && block_size == 1 && type != at::kBFloat16;
}

template <typename T>
void narrow_forward(const at::Tensor& input, const T* values, const T* bias, const Grid& grid, const at::Tensor& output) {
  const LinearKernels<T>& kernels = linear_kernels<T>();
  const int64_t batch = input.size(0), inputs = grid.in();
  const int64_t width = batch == 1 ? 1 : batch <= 4 ? 4 : 8;
  const Workspace packed(width == 1 ? 0 : sizeof(T) * width * inputs);
  const T* in = input.const_data_ptr<T>();
  if (width > 1) {
    at::parallel_for(0, inputs, 8192, [&](int64_t begin, int64_t end) {
      kernels.pack_narrow(in, inputs, batch, begin, end, packed.as<T>(), width);
    });
    in = packed.as<T>();
  }
  const int64_t grain = std::max<int64_t>(1, 32768 * grid.rows / std::max<int64_t>(1, grid.blocks));
  at::parallel_for(0, grid.rows, grain, [&](int64_t begin, int64_t end) {
    kernels.narrow({grid.crow, grid.col, grid.short_col, values, begin, end, batch, width, in, bias,
                    output.mutable_data_ptr<T>(), grid.out()});
  });
}

template <typename T, typename In>
void forward(const at::Tensor& input, const In* values, const T* bias, const Grid& grid, const at::Tensor& output) {
  if constexpr (std::is_same_v<T, In>)
    if (is_narrow(input.size(0), grid.bh * grid.bw, input.scalar_type()))
      return narrow_forward(input, values, bias, grid, output);
  const std::vector<Panels<T, In>> parts = parts_of<T, In>(input.size(0));
  const Workspace packed(parts.front().bytes(grid.in()));
  Product<T, In> p{};
  p.ptr = grid.crow, p.idx = grid.col, p.val = values;
  p.block_out = grid.bh, p.block_in = grid.bw;
  p.stride_out = grid.bw, p.stride_in = 1;
  p.bias = bias, p.in = packed.as<In>();
  for (const Panels<T, In>& part : parts) {
    pack_panels(input, part, packed.as<In>());
    const Segments segments = segments_of(*grid.by_rows[0], *grid.by_rows[1], grid.columns,
                                          column_block(grid, grid.columns, grid.bw, sizeof(In) * part.width(0)));
    run_product(p, segments, grid.rows, grid.in(), part, output);
  }
}

// Values in the order by columns.
template <typename T>
void transpose_values(const T* values, const Grid& grid, T* to) {
  const int64_t size = grid.bh * grid.bw;
  at::parallel_for(0, grid.blocks, 16384, [&](int64_t begin, int64_t end) {
    if (size == 1)
      for (int64_t i = begin; i < end; ++i) to[i] = values[grid.perm[i]];
    else
      for (int64_t i = begin; i < end; ++i) std::copy_n(values + grid.perm[i] * size, size, to + i * size);
  });
}

template <typename T, typename In>
void input_gradient(const In* grad_panels, const Panels<T, In>& panels, const In* transposed, const Grid& grid,
                    const at::Tensor& grad_input) {
  Product<T, In> p{};
  p.ptr = grid.ccol, p.idx = grid.row, p.val = transposed;
  p.block_out = grid.bw, p.block_in = grid.bh;
  p.stride_out = 1, p.stride_in = grid.bw;
  p.in = grad_panels;
  const Segments segments = segments_of(*grid.by_columns[0], *grid.by_columns[1], grid.rows,
                                        column_block(grid, grid.rows, grid.bh, sizeof(In) * panels.width(0)));
  run_product(p, segments, grid.columns, grid.out(), panels, grad_input);
}

template <typename T, typename In>
void weight_gradient(const In* grad_panels, const In* input_panels, const Panels<T, In>& panels, const Grid& grid,
                     T* grad_values) {
  const std::vector<Panels<T, In>> groups = panels.groups(kTaskPanels);
  const int64_t most = std::max<int64_t>(1, kTaskOutputs / (grid.bh * std::min(kTaskPanels, panels.count)));
  const int64_t chunk = std::clamp<int64_t>(ceil_div(grid.rows, 4 * at::get_num_threads()), 1, most);
  const Segments segments = segments_of(*grid.by_rows[0], *grid.by_rows[1], grid.columns,
                                        column_block(grid, grid.columns, grid.bw, sizeof(In) * panels.width(0)));
  at::parallel_for(0, ceil_div(grid.rows, chunk), 1, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      Sddmm<T, In> s{};
      s.ptr = grid.crow, s.idx = grid.col;
      s.begin = task * chunk, s.end = std::min(grid.rows, s.begin + chunk);
      s.starts = segments.starts, s.stride = segments.stride, s.column_blocks = segments.blocks;
      s.bh = grid.bh, s.bw = grid.bw;
      s.grad = grad_values;
      s.grad_panel = panels.tile * grid.out(), s.input_panel = panels.tile * grid.in();
      for (const Panels<T, In>& group : groups) {
        s.grad_output = grad_panels + (group.start - panels.start) * grid.out();
        s.input = input_panels + (group.start - panels.start) * grid.in();
        s.panels = group.count;
        s.width = group.last;
        s.accumulate = group.start > 0;
        if constexpr (std::is_same_v<T, In>)
          linear_kernels<T>().sddmm(s);
        else
          bf16_kernels()->sddmm(s);
      }
    }
  });
}

template <typename T, typename In>
void bias_gradient(const In* grad_panels, const Panels<T, In>& panels, int64_t outputs, T* sums) {
  at::parallel_for(0, outputs, 512, [&](int64_t begin, int64_t end) {
    for (int64_t panel = 0; panel < panels.count; ++panel) {
      const int64_t width = panels.width(panel);
      const In* from = grad_panels + panel * panels.tile * outputs + begin * width;
      if constexpr (std::is_same_v<T, In>)
        linear_kernels<T>().row_sums(from, width, end - begin, sums + begin, panels.start + panel > 0);
      else
        bf16_kernels()->row_sums(from, width, end - begin, sums + begin, panels.start + panel > 0);
    }
  });
}

// ---- the ops ----------------------------------------------------------------------------------------------------

at::ScalarType compute_type(at::ScalarType type) { return type == at::kBFloat16 ? at::kFloat : type; }

// The pattern's tensors, checked against the weight's shape, block and device. With `or_short` col may hold the low 16 bits.
Grid check_grid(const at::Tensor& crow, const at::Tensor& col, const at::Tensor& ccol, const at::Tensor& row,
                const at::Tensor& perm, at::IntArrayRef shape, at::IntArrayRef block, bool or_short = false) {
  TORCH_CHECK_VALUE(shape.size() == 2, "masked_linear: expected a weight shape [out, in], got ", shape, ".");
  const BlockGrid grid = check_csr(crow, col, shape, block, or_short && shape[1] <= 1 << 16);
  check_transposed(ccol, row, perm, col, grid);
  const bool is_short = col.scalar_type() == at::kShort;
  return {crow.const_data_ptr<int32_t>(), is_short ? nullptr : col.const_data_ptr<int32_t>(),
          is_short ? reinterpret_cast<const uint16_t*>(col.const_data_ptr<int16_t>()) : nullptr,
          ccol.const_data_ptr<int32_t>(), row.const_data_ptr<int32_t>(), perm.const_data_ptr<int32_t>(),
          {&crow, &col}, {&ccol, &row}, grid.rows, grid.columns, col.numel(), block[0], block[1]};
}

void check_input(const at::Tensor& input, const at::Tensor& weight, const Grid& grid) {
  TORCH_CHECK_VALUE(input.dim() >= 1 && input.size(-1) == grid.in(), "masked_linear: expected an input [..., ",
                    grid.in(), "], got ", input.sizes(), ".");
  check_storage(input, "input");
  check_like(weight, "weight", input, "masked_linear");
}

// Whether bfloat16 is multiplied as it lies.
bool in_words(at::ScalarType type, int64_t batch, const Grid& grid) {
  return type == at::kBFloat16 && batch > 16 && grid.bh * grid.bw == 1 && bf16_kernels() != nullptr;
}

// Packed, contiguous values in the type of the panels.
template <typename T, typename In>
at::Tensor compute_values(const at::Tensor& weight, bool dense, const at::Tensor& crow, const at::Tensor& col,
                          at::IntArrayRef block) {
  const at::Tensor packed = dense ? pack(weight, crow, col, block) : weight.contiguous();
  return std::is_same_v<T, In> ? packed.to(compute_type(weight.scalar_type())) : packed;
}

// Calls body(T, In).
template <typename Body>
void dispatch(at::ScalarType type, bool words, Body body) {
  switch (type) {
    case at::kFloat:
    case at::kBFloat16: return words ? body(float{}, uint16_t{}) : body(float{}, float{});
    case at::kDouble: return body(double{}, double{});
    default:
      TORCH_CHECK_TYPE(false, "masked_linear: expected float32, float64 or bfloat16, got ", type, ".");
  }
}

at::Tensor masked_linear(const at::Tensor& input, const at::Tensor& weight, const std::optional<at::Tensor>& bias,
                         const at::Tensor& crow, const at::Tensor& col, const at::Tensor& ccol, const at::Tensor& row,
                         const at::Tensor& perm, at::IntArrayRef shape, at::IntArrayRef block) {
  const int64_t batch = input.dim() > 0 ? input.numel() / std::max<int64_t>(1, input.size(-1)) : 1;
  const bool or_short = weight.sizes() != shape && block == at::IntArrayRef({1, 1}) &&
                        is_narrow(batch, 1, input.scalar_type());
  const Grid grid = check_grid(crow, col, ccol, row, perm, shape, block, or_short);
  check_input(input, weight, grid);
  const bool dense = check_weight(weight, col, shape, block, "masked_linear");
  verify_rows(crow, col, grid.columns);  // the order by columns is not read here
  if (bias) {
    check_like(*bias, "bias", input, "masked_linear");
    TORCH_CHECK_VALUE(bias->dim() == 1 && bias->size(0) == grid.out(), "masked_linear: expected a bias [", grid.out(),
                      "], got ", bias->sizes(), ".");
  }
  std::vector<int64_t> sizes = input.sizes().vec();
  sizes.back() = grid.out();
  at::Tensor output = at::empty(sizes, input.options().memory_format(at::MemoryFormat::Contiguous));
  if (output.numel() == 0) return output;
  dispatch(input.scalar_type(), in_words(input.scalar_type(), batch, grid), [&]<typename T, typename In>(T, In) {
    const at::Tensor rows = input.reshape({-1, grid.in()}).contiguous();
    const at::Tensor values = compute_values<T, In>(weight, dense, crow, col, block);
    const at::Tensor offset = bias ? bias->contiguous().to(compute_type(bias->scalar_type())) : at::Tensor();
    forward<T, In>(rows, static_cast<const In*>(values.const_data_ptr()), bias ? offset.const_data_ptr<T>() : nullptr, grid,
                   output.view({-1, grid.out()}));
  });
  return output;
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> masked_linear_backward(
    const at::Tensor& grad_output, const at::Tensor& input, const at::Tensor& weight, const at::Tensor& crow,
    const at::Tensor& col, const at::Tensor& ccol, const at::Tensor& row, const at::Tensor& perm,
    at::IntArrayRef shape, at::IntArrayRef block, std::array<bool, 3> output_mask) {
  const Grid grid = check_grid(crow, col, ccol, row, perm, shape, block);
  check_input(input, weight, grid);
  std::vector<int64_t> sizes = input.sizes().vec();
  sizes.back() = grid.out();
  TORCH_CHECK_VALUE(grad_output.sizes() == at::IntArrayRef(sizes), "masked_linear: expected a grad_output ", sizes,
                    ", got ", grad_output.sizes(), ".");
  check_like(grad_output, "grad_output", input, "masked_linear");
  const bool dense = check_weight(weight, col, shape, block, "masked_linear");
  if (output_mask[0])
    verify_both(crow, col, ccol, row, perm);
  else
    verify_rows(crow, col, grid.columns);

  const auto options = input.options().memory_format(at::MemoryFormat::Contiguous);
  at::Tensor grad_input = output_mask[0] ? at::empty(input.sizes(), options) : at::empty({0}, options);
  at::Tensor grad_weight, grad_bias = at::empty({output_mask[2] ? grid.out() : 0}, options);
  const at::ScalarType compute = compute_type(input.scalar_type());
  const int64_t batch = input.numel() / grid.in();
  if (batch == 0) {
    grad_weight = at::zeros(output_mask[1] ? weight.sizes() : at::IntArrayRef{0}, options);
    return {grad_input, grad_weight, grad_bias.zero_()};
  }
  dispatch(input.scalar_type(), in_words(input.scalar_type(), batch, grid), [&]<typename T, typename In>(T, In) {
    const auto [to_input, to_weight, to_bias] = output_mask;
    const std::vector<Panels<T, In>> parts = parts_of<T, In>(batch);
    const Workspace grads(parts.front().bytes(grid.out())), inputs(to_weight ? parts.front().bytes(grid.in()) : 0);
    const Workspace transposed(to_input ? sizeof(In) * grid.values() : 0);
    if (to_input)
      transpose_values(static_cast<const In*>(compute_values<T, In>(weight, dense, crow, col, block).const_data_ptr()), grid,
                       transposed.as<In>());
    std::vector<int64_t> packed_sizes = {to_weight ? grid.blocks : 0};
    if (to_weight && grid.bh * grid.bw > 1) packed_sizes.insert(packed_sizes.end(), {grid.bh, grid.bw});
    const at::Tensor values = at::empty(packed_sizes, options.dtype(compute));
    const at::Tensor sums = at::empty(grad_bias.sizes(), options.dtype(compute));
    const at::Tensor grad_rows = grad_output.reshape({-1, grid.out()}).contiguous();
    const at::Tensor input_rows = to_weight ? input.reshape({-1, grid.in()}).contiguous() : at::Tensor();
    for (const Panels<T, In>& part : parts) {
      pack_panels(grad_rows, part, grads.as<In>());
      if (to_input)
        input_gradient(grads.as<In>(), part, transposed.as<In>(), grid, grad_input.view({-1, grid.in()}));
      if (to_weight) {
        pack_panels(input_rows, part, inputs.as<In>());
        weight_gradient(grads.as<In>(), inputs.as<In>(), part, grid, values.mutable_data_ptr<T>());
      }
      if (to_bias) bias_gradient(grads.as<In>(), part, grid.out(), sums.mutable_data_ptr<T>());
    }
    grad_weight = values.to(input.scalar_type());
    if (to_weight && dense) grad_weight = unpack(grad_weight, crow, col, shape, block);
    grad_bias = sums.to(input.scalar_type());
  });
  return {grad_input, grad_weight, grad_bias};
}

}  // namespace

TORCH_LIBRARY_IMPL(uasparse, CPU, m) {
  m.impl("masked_linear", &masked_linear);
  m.impl("masked_linear_backward", &masked_linear_backward);
}

}  // namespace uasparse
