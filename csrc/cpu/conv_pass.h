// What the ways of masked_conv2d share: in_place (one tap: neighbouring positions where they are), by_space (a vector
// holds neighbouring positions of a row) and by_batch (a vector holds one position of several images).
#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/from_blob.h>

#include <algorithm>
#include <cstring>
#include <numeric>
#include <type_traits>

#include "cpu/conv_geometry.h"
#include "cpu/conv_lists.h"
#include "cpu/conv_quads.h"
#include "cpu/isa.h"
#include "cpu/masked_conv2d.h"
#include "cpu/workspace.h"

namespace uasparse {

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

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

// Null where there are none: bfloat16 is packed as float32 then.
inline const ConvBf16Kernels* conv_bf16_kernels() {
#if defined(__x86_64__)
  if (has_bf16_pairs()) return &avx512bf16::conv;
#endif
  return nullptr;
}

// The kernels of sums of type T over numbers of type S, and whether there are any.
template <typename T, typename S>
const auto& kernels_of() {
  if constexpr (std::is_same_v<S, BFloat16>)
    return *conv_bf16_kernels();
  else
    return conv_kernels<T>();
}
template <typename S>
bool has_kernels() {
  return !std::is_same_v<S, BFloat16> || conv_bf16_kernels() != nullptr;
}

inline void multiply(const ConvBf16Kernels& kernels, const ConvProduct<float, BFloat16>& product) {
  kernels.product(product);
}
inline void multiply(const ConvBf16Kernels& kernels, const ConvBf16Product& product) { kernels.plane_product(product); }
template <typename T>
void multiply(const ConvKernels<T>& kernels, const ConvProduct<T>& product) {
  kernels.product(product);
}
template <typename T>
void multiply(const ConvKernels<T>& kernels, const ConvQuadProduct<T>& product) {
  kernels.quad_product(product);
}

// Vectors of a piece of piece_sddmm: few, so that many dot products go together, unless lists are too short for that.
template <typename Kernels>
int64_t piece_vectors(const Kernels& kernels, const ConvWeight& w) {
  const bool many = w.density() * double(w.in * w.taps) >= 2 * kConvGroup;
  return many ? std::min(kernels.max_piece, kSmallPiece) : kernels.max_piece;
}

struct Geometry {
  int64_t batch, in, height, width, out, out_height, out_width, kernel_h, kernel_w, groups;
  at::IntArrayRef stride, padding, dilation;

  // At every position, and at no other.
  bool is_one_tap() const {
    return kernel_h * kernel_w == 1 && stride[0] == 1 && stride[1] == 1 && padding[0] == 0 && padding[1] == 0;
  }
  AxisPass forward_y() const { return forward_axis(height, out_height, kernel_h, stride[0], padding[0], dilation[0]); }
  AxisPass forward_x() const { return forward_axis(width, out_width, kernel_w, stride[1], padding[1], dilation[1]); }
  AxisPass backward_y() const { return backward_axis(height, out_height, kernel_h, stride[0], padding[0], dilation[0]); }
  AxisPass backward_x() const { return backward_axis(width, out_width, kernel_w, stride[1], padding[1], dilation[1]); }
  Pass forward(int64_t lanes) const { return Pass(forward_y(), forward_x(), in, out, lanes); }
  Pass backward(int64_t lanes) const { return Pass(backward_y(), backward_x(), out, in, lanes); }
};

// Parts that each of `tasks` is cut into, at most `most`, so that all threads have equally many; where tasks are many, whole
// ones are shared out evenly enough, and a part costs what its others do too, packing its source.
inline int64_t even_parts(int64_t tasks, int64_t most) {
  const int64_t threads = at::get_num_threads();
  if (tasks >= 8 * threads) return 1;
  return std::clamp<int64_t>(threads / std::gcd(tasks, threads), 1, most);
}

template <typename T>
T to_number(T x) {
  return x;
}
inline float to_number(BFloat16 x) {
  const uint32_t bits = uint32_t(x.bits) << 16;
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}
template <typename T>
void from_number(T x, T* to) {
  *to = x;
}
inline void from_number(float x, BFloat16* to) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  to->bits = x != x ? uint16_t(0x7fc0) : uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}


// Numbers of a tensor of type S, as which BFloat16 is not torch's.
template <typename S>
const S* numbers_of(const at::Tensor& t) {
  return static_cast<const S*>(t.const_data_ptr());
}
template <typename S>
S* mutable_numbers_of(const at::Tensor& t) {
  return static_cast<S*>(t.mutable_data_ptr());
}

inline bool has_plain_planes(const at::Tensor& t) { return t.stride(3) == 1 && t.stride(2) == t.size(3); }

// The weight without its nonzeros, for lists of a gradient that is not asked for.
struct NoWeight {
  std::vector<int32_t> crow;
  ConvWeight weight;
  explicit NoWeight(const ConvWeight& w) : crow(w.out / w.block_rows + 1, 0), weight(w) {
    weight.crow = crow.data();
    weight.crow_tensor = weight.col_tensor = nullptr;
    weight.blocks = 0;
  }
};

// The gradients that are asked for; the others are undefined.
struct ConvGradients {
  at::Tensor input, weight, bias;
};

// The gradients of weight and bias are sums over fixed chunks of the batch, added in order whatever the threads.
template <typename T>
class PartialSums {
 public:
  static constexpr int64_t kMaxChunks = 16;

  PartialSums(int64_t images, int64_t nonzeros, int64_t out)
      : chunks(std::min(images, kMaxChunks)), nonzeros_(nonzeros), out_(out), memory_(sizeof(T) * chunks * (nonzeros + out)) {
    if (chunks > 0) std::fill_n(weight(0), chunks * (nonzeros + out), T(0));
  }
  T* weight(int64_t chunk) { return memory_.template as<T>() + chunk * nonzeros_; }
  T* bias(int64_t chunk) { return memory_.template as<T>() + chunks * nonzeros_ + chunk * out_; }

  template <typename S, typename Places>
  void finish(const Places& places, const ConvGradients& gradients) {
    if (gradients.weight.defined()) {
      S* to = static_cast<S*>(gradients.weight.mutable_data_ptr());
      at::parallel_for(0, nonzeros_, 1 << 14, [&](int64_t begin, int64_t end) {
        constexpr int64_t kTogether = 256;
        for (int64_t i = begin; i < end; i += kTogether) {
          const int64_t count = std::min(kTogether, end - i);
          T total[kTogether] = {};
          for (int64_t chunk = 0; chunk < chunks; ++chunk) {
            const T* const part = weight(chunk) + i;
            for (int64_t k = 0; k < count; ++k) total[k] += part[k];
          }
          for (int64_t k = 0; k < count; ++k) from_number(total[k], to + places.place(i + k));
        }
      });
    }
    if (gradients.bias.defined()) {
      S* to = static_cast<S*>(gradients.bias.mutable_data_ptr());
      for (int64_t o = 0; o < out_; ++o) {
        T total = 0;
        for (int64_t chunk = 0; chunk < chunks; ++chunk) total += bias(chunk)[o];
        from_number(total, to + o);
      }
    }
  }

  // Parts of the channels that share a chunk where there are more threads than chunks.
  int64_t parts(const Geometry& g) const {
    return chunks > 0 ? even_parts(chunks, std::min(g.out, g.in)) : 1;
  }

  const int64_t chunks;

 private:
  int64_t nonzeros_, out_;
  Workspace memory_;
};

// Sum of numbers that follow each other.
template <typename T, typename S>
T sum_of(const S* from, int64_t count) {
  constexpr int64_t kParts = 16;
  T parts[kParts] = {};
  int64_t i = 0;
  for (; i + kParts <= count; i += kParts)
    for (int64_t k = 0; k < kParts; ++k) parts[k] += to_number(from[i + k]);
  for (; i < count; ++i) parts[0] += to_number(from[i]);
  T total = 0;
  for (T part : parts) total += part;
  return total;
}

// T: the type of sums; S: of storage.
template <typename T, typename S>
void forward_by_batch(const Geometry& g, const ConvWeight& w, const at::Tensor& input, const at::Tensor& weight,
                      const std::vector<T>& bias, const at::Tensor& output);
template <typename T, typename S>
void backward_by_batch(const Geometry& g, const ConvWeight& w, const at::Tensor& grad_output, const at::Tensor& input,
                       const at::Tensor& weight, const ConvGradients& gradients);

// These return false, and do nothing, where they cannot do it, or another way is quicker.
template <typename T, typename S>
bool forward_in_place(const Geometry& g, const ConvWeight& w, const at::Tensor& input, const at::Tensor& weight,
                      const std::vector<T>& bias, const at::Tensor& output);
template <typename T, typename S>
bool input_gradient_in_place(const Geometry& g, const ConvWeight& w, const at::Tensor& grad_output,
                             const at::Tensor& weight, const at::Tensor& grad_input);
template <typename T, typename S>
bool weight_gradient_in_place(const Geometry& g, const ConvWeight& w, const at::Tensor& grad_output,
                              const at::Tensor& input, const at::Tensor& grad_weight);
template <typename T>
bool forward_by_space(const Geometry& g, const ConvWeight& w, const at::Tensor& input, const at::Tensor& weight,
                      const std::vector<T>& bias, const at::Tensor& output);
template <typename T>
bool input_gradient_by_space(const Geometry& g, const ConvWeight& w, const at::Tensor& grad_output,
                             const at::Tensor& weight, const at::Tensor& grad_input);
template <typename T>
bool weight_gradient_by_space(const Geometry& g, const ConvWeight& w, const at::Tensor& grad_output,
                              const at::Tensor& input, const at::Tensor& grad_weight);
template <typename T, typename S>
bool bias_gradient_by_space(const at::Tensor& grad_output, const at::Tensor& grad_bias);
// Of weights in blocks (conv_quads_by_space.cpp), which forward_by_space and the others ask first.
bool forward_quads_by_space(const Geometry& g, const ConvWeight& w, const at::Tensor& input, const at::Tensor& weight,
                            const std::vector<float>& bias, const at::Tensor& output);
bool input_gradient_quads_by_space(const Geometry& g, const ConvWeight& w, const at::Tensor& grad_output,
                                   const at::Tensor& weight, const at::Tensor& grad_input);
bool weight_gradient_quads_by_space(const Geometry& g, const ConvWeight& w, const at::Tensor& grad_output,
                                    const at::Tensor& input, const at::Tensor& grad_weight);

// Over copies of the positions that a kernel of one tap takes (conv_taken.cpp). The backward pass clears the gradients that
// it has written.
template <typename T, typename S>
bool forward_taken(const Geometry& g, const ConvWeight& w, const at::Tensor& input, const at::Tensor& weight,
                   const std::vector<T>& bias, const at::Tensor& output);
template <typename T, typename S>
void backward_taken(const Geometry& g, const ConvWeight& w, const at::Tensor& grad_output, const at::Tensor& input,
                    const at::Tensor& weight, ConvGradients* gradients);

}  // namespace uasparse
