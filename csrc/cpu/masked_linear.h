// The kernels of masked_linear as plain functions on raw pointers: what masked_linear.cpp (checks, threads, workspaces)
// asks of masked_linear_impl.h, compiled once for each instruction set (isa.h).
//
// Activations are held in panels: kTileBytes of the batch together, [channels][width], so that one weight is a broadcast
// times `width` contiguous numbers. Only the last panel may be narrower; it is filled up with zeros to whole vectors.
#pragma once

#include <cstdint>

namespace uasparse {

constexpr int64_t kTileBytes = 256;  // a panel's width: 64 floats or 32 doubles
constexpr int64_t kNarrow = 8;       // batches that have a kernel of their own
constexpr int64_t kLaneBytes = 64;   // widths are multiples of this, the widest vector

// Nonzero blocks by grid rows, and how a kernel walks over them.
struct Blocks {
  const int32_t *ptr, *idx;  // blocks of each grid row, ascending
  int64_t begin, end;        // grid rows of this call
  // Grid columns are taken in blocks, so that their inputs stay in a near cache (segments.h).
  const int32_t* starts;
  int64_t stride, column_blocks;
};

// out[o, :] = bias[o] + sum of val * in[i, :] over the blocks of grid rows [begin, end), for each of a few panels.
// The weight's transpose is the same product with the order by columns and the strides exchanged.
// Numbers of type In, sums of type T.
template <typename T, typename In = T>
struct Product : Blocks {
  const In* val;                  // [blocks] of block_out x block_in numbers
  int64_t block_out, block_in;    // outputs and inputs of a block
  int64_t stride_out, stride_in;  // steps inside a block's values
  const T* bias;                  // for the output rows of begin onwards, or null
  const In* in;                   // panels [columns * block_in][width]
  T* out;                         // panels [(end - begin) * block_out][width]
  int64_t panels, width;
  int64_t in_panel, out_panel;    // steps from panel to panel

  void prefetch_values(int64_t block) const { __builtin_prefetch(val + block * block_out * block_in); }
};

// grad[block, y, x] (+)= grad_output[row * bh + y, :] . input[column * bw + x, :] over the panels' widths.
template <typename T, typename In = T>
struct Sddmm : Blocks {
  int64_t bh, bw;
  const In *grad_output, *input;  // panels of all outputs and inputs
  T* grad;                       // all values, in the order by rows
  int64_t panels, width;
  int64_t grad_panel, input_panel;
  bool accumulate;               // add to grad, or set it

  void prefetch_values(int64_t block) const { __builtin_prefetch(grad + block * bh * bw, 1); }
};

// Up to kNarrow inputs, 1x1 blocks: out[b, r] = bias[r] + sum of val * in[idx, b] for the rows [begin, end).
template <typename T>
struct Narrow {
  const int32_t *ptr, *idx;   // idx or
  const uint16_t* short_idx;  // short_idx, the other null
  const T* val;
  int64_t begin, end;
  int64_t batch, width;  // width: 1, 4 or 8, at least the batch
  const T* in;           // [columns][width]
  const T* bias;         // or null
  T* out;                // rows `out_stride` apart
  int64_t out_stride;
};

template <typename T>
struct LinearKernels {
  // Rows [batch][channels], `stride` apart, to and from a panel [channels][width].
  void (*pack)(const T* from, int64_t stride, int64_t batch, int64_t channels, T* to, int64_t width);
  void (*unpack)(const T* from, int64_t width, int64_t channels, T* to, int64_t stride, int64_t batch);
  void (*pack_bf16)(const uint16_t* from, int64_t stride, int64_t batch, int64_t channels, T* to, int64_t width);
  void (*unpack_bf16)(const T* from, int64_t width, int64_t channels, uint16_t* to, int64_t stride, int64_t batch);
  void (*product)(const Product<T>&);
  void (*sddmm)(const Sddmm<T>&);
  void (*narrow)(const Narrow<T>&);
  // Channels [begin, end) of the rows [batch][channels], `stride` apart, to Narrow's [channels][width].
  void (*pack_narrow)(const T* from, int64_t stride, int64_t batch, int64_t begin, int64_t end, T* to, int64_t width);
  // sums[c] (+)= sum of panel[c, :]
  void (*row_sums)(const T* panel, int64_t width, int64_t channels, T* sums, bool accumulate);
};

// The table for the machine's instruction set.
template <typename T>
const LinearKernels<T>& linear_kernels();

namespace portable {
extern const LinearKernels<float> linear_float;
extern const LinearKernels<double> linear_double;
}  // namespace portable
namespace avx2 {
extern const LinearKernels<float> linear_float;
extern const LinearKernels<double> linear_double;
}  // namespace avx2
namespace avx512 {
extern const LinearKernels<float> linear_float;
extern const LinearKernels<double> linear_double;
}  // namespace avx512

}  // namespace uasparse
