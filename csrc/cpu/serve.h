// The kernels of inference as plain functions on raw pointers: what serve.cpp (the interpreter of a plan) asks of
// serve_impl.h, compiled once for each instruction set (isa.h).
//
// A feature map of a batch is held as planes, one a channel, `plane` numbers apart. A plane is one tall picture: image
// after image, each of `rows` rows of `pitch` numbers, of which height x width are pixels and the rest is zero. One zero
// column serves as the right padding of a row and the left padding of the next, one zero row as the bottom padding of
// an image and the top padding of the next; before the first plane and after each lie `gap` zeros. So a tap of a kernel
// is a constant offset, whatever the position, and a plane is one long vector. Stride s: the input is taken apart once
// into its s x s phases, each a plane like the output's; then taps are constant offsets again. A linear layer for many
// rows is a 1x1 convolution whose plane is the rows.
#pragma once

#include <cstdint>

namespace uasparse {

constexpr int64_t kServeFormat = 1;  // of plans in files (builder.py): one more where a step's fields change
constexpr int64_t kPlaneLanes = 16;  // a body is a whole number of vectors of any instruction set
constexpr int kLookupRows = 128;     // rows of a window and columns of a block of ServeLookup
constexpr int kLookupBatch = 8;      // rows of x that it serves at most
constexpr int kRowGroup = 4;         // output channels that share offsets where weights come in such groups
constexpr int kRowWindow = 64;       // output channels among which a block is in the order of its nonzeros

enum class Activation : int64_t { none, relu, clamp, leaky, hardswish, hardsigmoid, silu, sigmoid, gelu, gelu_tanh };

template <typename T>
struct ServeActivation {
  Activation kind;
  T a, b;  // clamp: bounds; leaky: slope
};

// y[r, :] = act(bias[r] + sum of val[k] * x[off[k] + :] + residual[r, :]), zero where the mask says so.
template <typename T>
struct ServeConv {
  const T* x;         // body of the first plane; offsets count from here
  T* y;
  const T* residual;  // or null
  int64_t y_plane, residual_plane;
  int64_t body, gap;  // numbers of a plane, and zeros written after each
  int64_t tile;       // vectors held in registers, at most
  int64_t group;      // 1, or kRowGroup output channels that share offsets
  int64_t rows, blocks, chunk;  // output channels; blocks of input channels; rows of a pass over all blocks
  // Rows of a block with equally many nonzeros follow each other, so that the processor foresees the end of their
  // loops: row order[i] is the i-th, where each kRowWindow rows are a permutation of themselves. Null for groups.
  const int32_t* order;         // [blocks][rows]
  const int32_t* ptr;           // [blocks][rows / group + 1], by the order
  const int32_t* off;           // [nonzeros / group]
  const T* val;                 // [nonzeros / group][group]
  const T* bias;                // [rows]
  const T* mask;                // [body], all bits set or none
  ServeActivation<T> act;
};

// Rows [M][K] times sparse weights in few rows: y[m, r] = act(bias[r] + sum of val[k] * x[m, idx[k]] + residual[m, r])
template <typename T>
struct ServeRows {
  const T* x;  // [K][width]: the rows side by side
  T* y;
  const T* residual;
  int64_t batch, width, y_stride;
  const int32_t* ptr;
  const uint16_t* idx;
  const T *val, *bias;
  ServeActivation<T> act;
};

// The same for one row or a few and AVX-512. Weights come in tiles of kLookupRows output features (a window) by
// kLookupRows columns (a block), whose numbers of x lie in eight registers. Within a tile the rows are sorted by their
// nonzeros and taken 16 at a time, a lane a row, as many slots as the fullest needs: what bounds the time is to read 5
// bytes a slot. place[r] tells where in this order row r is.
template <typename T>
struct ServeLookup {
  const T* x;  // [batch][blocks][kLookupRows], zeros after the last column
  T* y;
  const T* residual;
  int64_t batch, rows, blocks, y_stride;
  const int32_t* ptr;     // [windows][blocks][kLookupRows / 16], and the end: slots
  const uint8_t* index;   // [slots][16]: columns of the block, below kLookupRows
  const uint8_t* place;   // [windows][blocks][kLookupRows], a permutation of each window
  const T *val, *bias;    // [slots][16]; [rows]
  ServeActivation<T> act;
};

// y = (x - mean) / sqrt(variance + epsilon) * weight + bias over the channels, for each position.
template <typename T>
struct ServeNorm {
  const T* x;
  T* y;
  int64_t x_plane, y_plane, channels, body;
  const T *weight, *bias;  // by channel, or null
  const T* mask;
  T epsilon;
};

// Softmax attention: y[d, i] = sum over j of softmax(scale * q[:, i] . k[:, j]) * v[d, j] for each image and head.
// Pointers are to the first head's first plane, heads are so many planes apart and images so many numbers; those of y
// follow each other.
template <typename T>
struct ServeAttention {
  const T *q, *k, *v;
  T* y;
  int64_t q_plane, k_plane, v_plane, y_plane;
  int64_t q_image, k_image, v_image;
  int64_t q_head, k_head, v_head;
  int64_t images, heads, queries, keys, dim, value_dim;
  T scale;
};

template <typename T>
struct ServePool {
  const T* x;
  T* y;
  int64_t x_plane, y_plane;
  int64_t images, height, width, pitch, rows;           // of the input
  int64_t out_height, out_width, out_pitch, out_rows, out_body, gap;
  int64_t kernel_h, kernel_w, stride_h, stride_w, pad_h, pad_w;
  bool average, count_padding;
};

// Pixels from a tensor of any strides to planes, taken apart into phases.
template <typename T>
struct ServeLoad {
  const T* x;
  int64_t stride_n, stride_c, stride_h, stride_w;
  int64_t images, height, width;
  T* y;
  int64_t plane, pitch, rows, gap, body;
  int64_t phases, phase_h, phase_w;     // planes a channel, of phase_h x phase_w
  const int32_t* phase;                 // [phases]: y * phase_w + x
};

template <typename T>
struct ServeAffine {
  const T* x;
  T* y;
  const T* residual;
  int64_t x_plane, y_plane, residual_plane;
  int64_t body, gap;
  const T *scale, *shift;  // by channel, or null
  const T* mask;
  ServeActivation<T> act;
};

template <typename T>
struct ServeKernels {
  int64_t (*tiles)(const ServeConv<T>&);
  void (*conv)(const ServeConv<T>&, int64_t first, int64_t last, int64_t row, int64_t end);
  void (*rows)(const ServeRows<T>&, int64_t row, int64_t end);
  void (*pool)(const ServePool<T>&, int64_t channel, int64_t end);
  void (*load)(const ServeLoad<T>&, int64_t channel, int64_t end);
  void (*affine)(const ServeAffine<T>&, int64_t channel, int64_t end);
  // Planes of one row of `rows` numbers to [rows][stride], channels [channel, end).
  void (*store_rows)(const T* x, int64_t plane, T* y, int64_t stride, int64_t rows, int64_t channel, int64_t end);
  void (*norm)(const ServeNorm<T>&, int64_t vector, int64_t end);
  int64_t (*attention_tiles)(const ServeAttention<T>&);
  int64_t (*attention_room)(const ServeAttention<T>&);
  void (*attention)(const ServeAttention<T>&, int64_t image, int64_t head, int64_t tile, T* room);
  void (*lookup)(const ServeLookup<T>&, int64_t window, int64_t end);  // null where there is none
  int64_t lanes;
};

namespace portable {
extern const ServeKernels<float> serve_float;
extern const ServeKernels<double> serve_double;
}  // namespace portable
namespace avx2 {
extern const ServeKernels<float> serve_float;
extern const ServeKernels<double> serve_double;
}  // namespace avx2
namespace avx512 {
extern const ServeKernels<float> serve_float;
extern const ServeKernels<double> serve_double;
}  // namespace avx512

}  // namespace uasparse
