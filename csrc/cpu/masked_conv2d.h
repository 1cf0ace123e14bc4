// The kernels of masked_conv2d as plain functions on raw pointers: what masked_conv2d.cpp (checks, threads, order of
// work) asks of masked_conv2d_impl.h, compiled once for each instruction set (isa.h).
//
// by_batch (conv_pass.h names the ways) packs activations: row q of a window of rows is [channels][phases][columns]
// [lanes], one lane an image of the batch. conv_geometry.h says how a strided convolution becomes a unit-stride one over
// phases. So a nonzero weight is one number times contiguous vectors at a fixed offset, whatever the kernel's size,
// stride or dilation.
#pragma once

#include <cstdint>

namespace uasparse {

struct BFloat16 {
  uint16_t bits;
};

// A nonzero weight: `offset` leads from the source position of an output to the one that this weight multiplies.
template <typename T>
struct ConvEntry;
template <>
struct ConvEntry<float> {
  float value;
  int32_t offset;
};
template <>
struct ConvEntry<double> {
  double value;
  int64_t offset;
};

// Of which the value is not known yet, only its place in the weight's storage (conv_lists.h).
template <>
struct ConvEntry<int32_t> {
  int32_t value, offset;
};

// Of four destination channels with one source (conv_quads.h).
template <typename T>
struct ConvQuadEntry {
  T value[4];
  decltype(ConvEntry<T>::offset) offset;
};

// Of which the values are not known yet, only their places in the weight's storage.
template <>
struct ConvQuadEntry<int32_t> {
  int32_t value[4], offset, tap;
};

// What the next call will read: `numbers` at the beginning of each of `rows` rows of each of `images` images. A call asks for
// it ahead, an even part with each of its channels; one of bfloat16 does not. Without `from`, source and `out` are near.
template <typename T>
struct ConvAhead {
  const T* from;
  int64_t images, image;
  int64_t rows, row;
  int64_t numbers;
};

// out[r][c][x][lane] (+)= sum over the entries of channel c of value * source[r][x][lane + offset], for a tile of
// rows x vectors positions and the channels [begin, end).
template <typename T, typename Entry, typename Packed = T, typename Out = T>
struct ConvProductOf {
  const Entry* entries;
  const int32_t* first;  // entries of channel c: [first[c], first[c + 1])
  int64_t begin, end;
  const Packed* source;
  int64_t source_row;
  Out* out;
  int64_t out_row, out_channel;
  bool start;     // begin with the bias (or zero) instead of what `out` holds
  const T* bias;  // of each channel, or null
  int rows, vectors;
  int64_t last;  // where a row's last vector begins: it may overlap the one before
  int64_t phases;
  ConvAhead<Packed> ahead = {};
};
template <typename T, typename Packed = T>
using ConvProduct = ConvProductOf<T, ConvEntry<T>, Packed>;
// Of bfloat16 where it lies: sums are float32 and rounded once, so that `start` is always true.
using ConvBf16Product = ConvProductOf<float, ConvEntry<float>, BFloat16, BFloat16>;
// For quads of channels: `begin`, `end` and `first` are of quad * phases + phase, whose sums begin at channel 4 * quad *
// phases + phase of `out` and lie `phases` channels apart.
template <typename T>
using ConvQuadProduct = ConvProductOf<T, ConvQuadEntry<T>>;

// What a shift by one column leaves: numbers[v] of lane l is all ones or zero, for the l-th number of vector v of a row
// (csrc/cpu/conv_by_space.cpp) that came from its left, or from its right.
template <typename T>
struct ConvEdges {
  const T *from_left, *from_right;
  bool repeat;  // every two vectors
};

// grad[i] (+)= sum over rows and vectors of grad_output[c][r][x] * input[r][x + offset[i]], i over the entries of the
// channels [begin, end).
template <typename T>
struct ConvSddmm {
  const int32_t* offset;
  const int32_t* first;  // entries of channel c: [first[c * first_stride], first[c * first_stride + 1])
  int64_t first_stride;
  int64_t begin, end;
  const T* input;
  int64_t input_row;
  const T* grad_output;
  int64_t grad_row, grad_channel;
  int64_t rows, vectors;
  T* grad;
};

// The same for pieces of a few planes: a piece is `vectors` vectors, of which the last begins at `last` and its first
// `known` numbers were in the vector before.
template <typename T, typename Packed = T>
struct ConvPieceSddmm {
  const int32_t* offset;
  const int32_t* first;
  int64_t first_stride;
  int64_t begin, end;
  const Packed* input;
  int64_t input_image;
  const Packed* grad_output;
  int64_t grad_image, grad_channel;
  int images, vectors;
  int64_t last, known;
  T* grad;
};

// The same for quads of channels: first[quad * first_stride], and grad[4 * i + q] of the quad's channel q.
template <typename T>
struct ConvQuadSddmm {
  const int32_t* offset;
  const int32_t* first;
  int64_t first_stride;
  int64_t begin, end;
  const T* input;
  int64_t input_row;
  const T* grad_output;
  int64_t grad_row, grad_channel;
  int64_t rows, vectors;
  int64_t last, known;
  T* grad;
};

// Moves [outer][inner] elements of `lanes` images to or from packed vectors at outer_offset[i] + inner_offset[j] (a
// negative offset: not stored). An image pointer is null where the batch has no image for the lane.
template <typename T>
struct ConvMove {
  int64_t outer, inner;
  int64_t outer_stride, inner_stride;  // of the image
  const int64_t *outer_offset, *inner_offset;
  T* packed;
};

// The product for planes without columns of padding: out[c][x] (+)= sum over the segments s and the entries of (c, s) of
// value * source[x + offset], shifted by segment - zero columns to the left. Entries of (c, s): [first[c * segments + s],
// first[c * segments + s + 1]).
template <typename T>
struct ConvShiftedProduct {
  const ConvEntry<T>* entries;
  const int32_t* first;
  int64_t segments, zero;
  int64_t begin, end;
  const T* source;
  T* out;
  int64_t out_channel;
  bool start;     // begin with the bias (or zero) instead of what `out` holds
  const T* bias;  // of each channel, or null
  ConvEdges<T> edges;
  int vectors;
};

// The dot products for such planes: grad[i] (+)= sum over x of grad_output[c][x] * input[x + offset[i]], where grad_output
// of segment s is shifted by s - zero columns to the right first, i over the entries of (c, s): [first[c * segments + s],
// first[c * segments + s + 1]).
template <typename T>
struct ConvShiftedDots {
  const int32_t* offset;
  const int32_t* first;
  int64_t segments, zero;
  int64_t begin, end;
  const T* input;
  const T* grad_output;
  int64_t grad_channel;
  ConvEdges<T> edges;
  int vectors;
  T* grad;
};

// What a quad of channels multiplies in planes whose rows follow each other (conv_quads_by_space.cpp): `inside` says of the
// lanes of even and of odd vectors whether their source lies in the image; elsewhere it is zero.
struct ConvPlaneColumn {
  int32_t offset;
  uint16_t inside[2];
};
struct ConvPlaneQuad {
  float value[4];
  ConvPlaneColumn column;
};

// out[4 * quad + q][x] (+)= sum over the entries of the quad of value[q] * source[x + offset], for a tile of vectors, of which
// the first is an even one.
struct ConvPlaneQuadProduct {
  const ConvPlaneQuad* entries;
  const int32_t* first;  // entries of a quad: [first[quad], first[quad + 1])
  int64_t begin, end;
  const float* source;
  float* out;
  int64_t out_channel;
  bool start;         // begin with the bias (or zero) instead of what `out` holds
  const float* bias;  // of each channel, or null
  int vectors;
};

// grad[4 * i + q] += sum over x of grad_output[4 * quad + q][x] * input[x + offset[i]], i over the columns of the quads
// [begin, end).
struct ConvPlaneQuadDots {
  const ConvPlaneColumn* columns;
  const int32_t* first;
  int64_t begin, end;
  const float* input;
  const float* grad_output;
  int64_t grad_channel;
  int64_t vectors;
  int period;  // 2: even and odd vectors differ
  float* grad;
};

// Copies rows of several images: to[c][i][r][x] = from[c][i][r][x].
template <typename T>
struct ConvPlanes {
  int64_t channels, images, rows, width;
  const T* from;
  int64_t from_channel, from_image, from_row;
  T* to;
  int64_t to_channel, to_image, to_row;
};

// Rows of a map whose even and odd columns lie apart, in two planes of `even` and `odd` columns: even[c][i][r][x] =
// map[c][i][r][2 * x], and so on, or back.
template <typename T, typename Map>
struct ConvColumns {
  int64_t channels, images, rows, even_width, odd_width;
  Map* map;
  int64_t map_channel, map_image, map_row;
  T *even, *odd;
  int64_t channel, image, row;  // of both planes
};

constexpr int kMaxLanes = 32;
constexpr int kConvGroup = 8;  // dot products that sddmm takes together
constexpr int kSmallPiece = 16;  // vectors of a piece of piece_sddmm, beside which registers have room for as many sums

template <typename T>
struct ConvKernels {
  int lanes;
  int max_vectors, max_rows;  // of one tile: accumulators, and rows of `product`
  void (*product)(const ConvProduct<T>&);
  void (*sddmm)(const ConvSddmm<T>&);
  int max_piece;  // vectors of `piece_sddmm`, images together
  void (*piece_sddmm)(const ConvPieceSddmm<T>&);
  int max_quad_vectors;  // of one tile of `quad_product`
  void (*quad_product)(const ConvQuadProduct<T>&);
  void (*quad_sddmm)(const ConvQuadSddmm<T>&);
  void (*shifted_product)(const ConvShiftedProduct<T>&);
  void (*shifted_dots)(const ConvShiftedDots<T>&);  // null where registers are too few for it
  void (*plane_quad_product)(const ConvPlaneQuadProduct&);  // null where registers are too few, and for other types
  void (*plane_quad_dots)(const ConvPlaneQuadDots&);
  void (*copy_planes)(const ConvPlanes<T>&);
  void (*split_columns)(const ConvColumns<T, const T>&);  // null, as join_columns, where by_batch serves strides
  void (*join_columns)(const ConvColumns<const T, T>&);
  void (*pack)(const ConvMove<T>&, const T* const* images);
  void (*unpack)(const ConvMove<T>&, T* const* images);
  void (*pack_bf16)(const ConvMove<T>&, const BFloat16* const* images);
  void (*unpack_bf16)(const ConvMove<T>&, BFloat16* const* images);
};

// The kernels on bfloat16 with float32 sums, of which `value` of an entry is one of bfloat16 too, in vectors of 32 words. Those
// of by_batch are packed in an order that `pack` and `product` share, and `unpack` takes sums in order.
struct ConvBf16Kernels {
  int lanes;
  int max_vectors, max_rows;
  void (*product)(const ConvProduct<float, BFloat16>&);
  void (*plane_product)(const ConvBf16Product&);
  int max_piece;
  void (*piece_sddmm)(const ConvPieceSddmm<float, BFloat16>&);
  void (*pack)(const ConvMove<BFloat16>&, const BFloat16* const* images);
  void (*unpack)(const ConvMove<float>&, BFloat16* const* images);
};

namespace portable {
extern const ConvKernels<float> conv_float;
extern const ConvKernels<double> conv_double;
}  // namespace portable
namespace avx2 {
extern const ConvKernels<float> conv_float;
extern const ConvKernels<double> conv_double;
}  // namespace avx2
namespace avx512 {
extern const ConvKernels<float> conv_float;
extern const ConvKernels<double> conv_double;
}  // namespace avx512
namespace avx512bf16 {
extern const ConvBf16Kernels conv;
}

}  // namespace uasparse
