// Kernels of inference for one instruction set (included by serve_<isa>.cpp; see serve.h).
//
// Tiling of a convolution. A tile is up to `most` vectors of positions, whose sums stay in registers while the nonzeros
// of one output channel go by: a multiply-add a vector for one broadcast and one offset. Input channels come in blocks
// whose part of the tile stays in L1 (larger kernels, which meet each channel several times) or L2, and sums wait in
// the output between blocks; bias, residual, activation and mask are in the last block's store. Narrow tiles take two
// or four nonzeros at once into sums of their own, for the latency of the multiply-add.

#include "cpu/vec.h"

namespace uasparse::UASPARSE_ISA {
namespace {

template <typename T>
using Bits = decltype(Vec<T>{} < Vec<T>{});

template <typename T>
UASPARSE_INLINE Vec<T> masked(Vec<T> x, const T* mask) {
  return reinterpret_cast<Vec<T>>(reinterpret_cast<Bits<T>>(x) & reinterpret_cast<Bits<T>>(load(mask)));
}

// NaN stays NaN: comparisons with it are false.
template <typename T>
UASPARSE_INLINE Vec<T> clamp_to(Vec<T> x, Vec<T> low, Vec<T> high) {
  x = x < low ? low : x;
  return x > high ? high : x;
}

// exp for float: 2^n times a polynomial of degree 6 on [-ln 2 / 2, ln 2 / 2]; relative error below 2e-7. Infinite above
// 88.7, so that sigmoids end at zero, and NaN where x is.
UASPARSE_INLINE Vec<float> exponential(Vec<float> given) {
  typedef Bits<float> Ints;
  const Vec<float> most = broadcast<float>(88.7f);
  const Vec<float> x = clamp_to<float>(given, broadcast<float>(-87.3f), most);
  const Vec<float> magic = broadcast<float>(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
  const Vec<float> rounded = x * 1.44269504f + magic;
  const Vec<float> n = rounded - magic;
  const Vec<float> r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  Vec<float> p = r * (1.0f / 720) + 1.0f / 120;
  p = p * r + 1.0f / 24;
  p = p * r + 1.0f / 6;
  p = p * r + 0.5f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  const Ints exponent = (reinterpret_cast<Ints>(rounded) - reinterpret_cast<Ints>(magic)) << 23;
  const Vec<float> y = reinterpret_cast<Vec<float>>(reinterpret_cast<Ints>(p) + exponent);
  return given <= most ? y : given + __builtin_inff();
}

UASPARSE_INLINE Vec<double> exponential(Vec<double> x) {
  Vec<double> y = {};
  for (int i = 0; i < kLanes<double>; ++i) y[i] = __builtin_exp(x[i]);
  return y;
}

// erf (Abramowitz and Stegun 7.1.26, absolute error below 2e-7).
UASPARSE_INLINE Vec<float> error_function(Vec<float> x) {
  const Vec<float> zero = {};
  const Vec<float> a = x < zero ? -x : x;
  const Vec<float> t = 1.0f / (1.0f + 0.3275911f * a);
  const Vec<float> poly =
      ((((1.061405429f * t - 1.453152027f) * t + 1.421413741f) * t - 0.284496736f) * t + 0.254829592f) * t;
  const Vec<float> y = 1.0f - poly * exponential(-a * a);
  return x < zero ? -y : y;
}

UASPARSE_INLINE Vec<double> error_function(Vec<double> x) {
  Vec<double> y = {};
  for (int i = 0; i < kLanes<double>; ++i) y[i] = __builtin_erf(x[i]);
  return y;
}

template <typename T>
UASPARSE_INLINE Vec<T> sigmoid(Vec<T> x) {
  return T{1} / (T{1} + exponential(-x));
}

template <typename T>
UASPARSE_INLINE Vec<T> heavy(Vec<T> x, const ServeActivation<T>& act) {
  switch (act.kind) {
    case Activation::silu: return x * sigmoid<T>(x);
    case Activation::sigmoid: return sigmoid<T>(x);
    case Activation::gelu: return T{0.5} * x * (T{1} + error_function(x * T{0.70710678118654752440}));
    case Activation::gelu_tanh: {
      const Vec<T> u = T{1.5957691216057308} * (x + T{0.044715} * x * x * x);
      return x * sigmoid<T>(u);
    }
    default: return x;
  }
}

template <typename T>
UASPARSE_INLINE Vec<T> light(Vec<T> x, const ServeActivation<T>& act) {
  const Vec<T> zero = {};
  switch (act.kind) {
    case Activation::relu: return x < zero ? zero : x;
    case Activation::clamp: return clamp_to<T>(x, broadcast<T>(act.a), broadcast<T>(act.b));
    case Activation::leaky: return x < zero ? x * act.a : x;
    case Activation::hardswish: return x * clamp_to<T>(x + T{3}, zero, broadcast<T>(6)) / T{6};
    case Activation::hardsigmoid: return clamp_to<T>(x + T{3}, zero, broadcast<T>(6)) / T{6};
    default: return x;
  }
}

UASPARSE_INLINE bool is_heavy(Activation kind) { return kind >= Activation::silu; }

template <typename T>
void activate(T* x, int64_t count, const ServeActivation<T>& act) {
  constexpr int L = kLanes<T>;
  int64_t i = 0;
  for (; i + L <= count; i += L) store<T>(x + i, light<T>(heavy<T>(load(x + i), act), act));
  if (i < count) {
    T lanes[L] = {};
    for (int64_t j = i; j < count; ++j) lanes[j - i] = x[j];
    store<T>(lanes, light<T>(heavy<T>(load(lanes), act), act));
    for (int64_t j = i; j < count; ++j) x[j] = lanes[j - i];
  }
}

// The last store of NV vectors of one output channel.
template <typename T, int NV>
UASPARSE_INLINE void finish(Vec<T> (&sum)[NV], T* y, const T* residual, const T* mask, const ServeActivation<T>& act) {
  constexpr int L = kLanes<T>;
  if (residual != nullptr) {
#pragma GCC unroll 32
    for (int v = 0; v < NV; ++v) sum[v] += load(residual + v * L);
  }
  if (act.kind == Activation::relu) {
    const Vec<T> zero = {};
#pragma GCC unroll 32
    for (int v = 0; v < NV; ++v) sum[v] = sum[v] < zero ? zero : sum[v];
  } else if (act.kind != Activation::none) {
#pragma GCC unroll 32
    for (int v = 0; v < NV; ++v) store<T>(y + v * L, sum[v]);
    if (is_heavy(act.kind)) {
      for (int v = 0; v < NV; ++v) store<T>(y + v * L, masked(heavy<T>(load(y + v * L), act), mask + v * L));
    } else {
      for (int v = 0; v < NV; ++v) store<T>(y + v * L, masked(light<T>(load(y + v * L), act), mask + v * L));
    }
    return;
  }
#pragma GCC unroll 32
  for (int v = 0; v < NV; ++v) store<T>(y + v * L, masked(sum[v], mask + v * L));
}

// Output channels [row, end) of one block of input channels, NV vectors of positions from `at` on.
template <typename T, int NV>
void conv_rows(const ServeConv<T>& p, int64_t at, int64_t block, int64_t row, int64_t end) {
  constexpr int L = kLanes<T>;
  constexpr int U = NV * 4 <= 12 ? 4 : NV * 2 <= 14 && UASPARSE_VECTOR_BYTES == 64 ? 2 : NV * 2 <= 12 ? 2 : 1;
  const int32_t* ptr = p.ptr + block * (p.rows + 1);
  const int32_t* const order = p.order + block * p.rows;
  const T* const x = p.x + at;
  const bool first = block == 0, last = block == p.blocks - 1;
  for (int64_t i = row; i < end; ++i) {
    const int64_t r = order[i];
    T* y = p.y + r * p.y_plane + at;
    Vec<T> sum[U][NV];
    if (first) {
      const Vec<T> bias = broadcast<T>(p.bias[r]);
#pragma GCC unroll 32
      for (int v = 0; v < NV; ++v) sum[0][v] = bias;
    } else {
#pragma GCC unroll 32
      for (int v = 0; v < NV; ++v) sum[0][v] = load(y + v * L);
    }
    if constexpr (U > 1) {
#pragma GCC unroll 32
      for (int u = 1; u < U; ++u)
#pragma GCC unroll 32
        for (int v = 0; v < NV; ++v) sum[u][v] = Vec<T>{};
    }
    const int32_t* off = p.off + ptr[i];
    const T* val = p.val + ptr[i];
    const int32_t* const stop = p.off + ptr[i + 1];
    if constexpr (U > 1) {
      for (; off + U <= stop; off += U, val += U) {
#pragma GCC unroll 32
        for (int u = 0; u < U; ++u) {
          const T* from = x + off[u];
          const Vec<T> w = broadcast<T>(val[u]);
#pragma GCC unroll 32
          for (int v = 0; v < NV; ++v) sum[u][v] += w * load(from + v * L);
        }
      }
#pragma GCC unroll 32
      for (int u = 1; u < U; ++u)
#pragma GCC unroll 32
        for (int v = 0; v < NV; ++v) sum[0][v] += sum[u][v];
    }
    for (; off < stop; ++off, ++val) {
      const T* from = x + *off;
      const Vec<T> w = broadcast<T>(*val);
#pragma GCC unroll 32
      for (int v = 0; v < NV; ++v) sum[0][v] += w * load(from + v * L);
    }
    if (last) {
      finish<T, NV>(sum[0], y, p.residual ? p.residual + r * p.residual_plane + at : nullptr, p.mask + at, p.act);
    } else {
#pragma GCC unroll 32
      for (int v = 0; v < NV; ++v) store<T>(y + v * L, sum[0][v]);
    }
  }
}

// The same for groups of kRowGroup output channels that share offsets.
template <typename T, int NV>
void conv_groups(const ServeConv<T>& p, int64_t at, int64_t block, int64_t row, int64_t end) {
  constexpr int L = kLanes<T>;
  constexpr int G = kRowGroup;
  const int32_t* ptr = p.ptr + block * (p.rows / G + 1);
  const T* const x = p.x + at;
  const bool first = block == 0, last = block == p.blocks - 1;
  for (int64_t g = row / G; g < end / G; ++g) {
    T* y = p.y + g * G * p.y_plane + at;
    Vec<T> sum[G][NV];
#pragma GCC unroll 32
    for (int i = 0; i < G; ++i) {
      const Vec<T> bias = broadcast<T>(p.bias[g * G + i]);
#pragma GCC unroll 32
      for (int v = 0; v < NV; ++v) sum[i][v] = first ? bias : load(y + i * p.y_plane + v * L);
    }
    const T* val = p.val + int64_t{ptr[g]} * G;
    for (int32_t k = ptr[g]; k < ptr[g + 1]; ++k, val += G) {
      const T* from = x + p.off[k];
      Vec<T> in[NV];
#pragma GCC unroll 32
      for (int v = 0; v < NV; ++v) in[v] = load(from + v * L);
#pragma GCC unroll 32
      for (int i = 0; i < G; ++i) {
        const Vec<T> w = broadcast<T>(val[i]);
#pragma GCC unroll 32
        for (int v = 0; v < NV; ++v) sum[i][v] += w * in[v];
      }
    }
#pragma GCC unroll 32
    for (int i = 0; i < G; ++i) {
      T* to = y + i * p.y_plane;
      if (last) {
        const T* residual = p.residual ? p.residual + (g * G + i) * p.residual_plane + at : nullptr;
        finish<T, NV>(sum[i], to, residual, p.mask + at, p.act);
      } else {
#pragma GCC unroll 32
        for (int v = 0; v < NV; ++v) store<T>(to + v * L, sum[i][v]);
      }
    }
  }
}

#if UASPARSE_VECTOR_BYTES == 64
constexpr int kMost = 24, kMostGrouped = 6;
#else
constexpr int kMost = 12, kMostGrouped = 2;
#endif

template <typename T>
using ConvRows = void (*)(const ServeConv<T>&, int64_t, int64_t, int64_t, int64_t);

template <typename T, int... NV>
constexpr ConvRows<T> ungrouped(int64_t vectors, std::integer_sequence<int, NV...>) {
  constexpr ConvRows<T> table[] = {conv_rows<T, NV + 1>...};
  return table[vectors - 1];
}

template <typename T, int... NV>
constexpr ConvRows<T> grouped(int64_t vectors, std::integer_sequence<int, NV...>) {
  constexpr ConvRows<T> table[] = {conv_groups<T, NV + 1>...};
  return table[vectors - 1];
}

template <typename T>
int64_t tiles_of(const ServeConv<T>& p) {
  const int64_t vectors = p.body / kLanes<T>, limit = p.group == 1 ? kMost : kMostGrouped;
  const int64_t most = p.tile < limit ? p.tile : limit;
  return (vectors + most - 1) / most;
}

// Tiles [first, last) of the positions and output channels [row, end).
template <typename T>
void conv(const ServeConv<T>& p, int64_t first, int64_t last, int64_t row, int64_t end) {
  const int64_t vectors = p.body / kLanes<T>, tiles = tiles_of(p);
  for (int64_t tile = first; tile < last; ++tile) {
    const int64_t v = vectors * tile / tiles, count = vectors * (tile + 1) / tiles - v;
    const ConvRows<T> run = p.group == 1 ? ungrouped<T>(count, std::make_integer_sequence<int, kMost>{})
                                         : grouped<T>(count, std::make_integer_sequence<int, kMostGrouped>{});
    for (int64_t r = row; r < end; r += p.chunk) {
      const int64_t stop = r + p.chunk < end ? r + p.chunk : end;
      for (int64_t block = 0; block < p.blocks; ++block) run(p, v * kLanes<T>, block, r, stop);
      if (tile == tiles - 1) {
        for (int64_t i = r; i < stop; ++i) __builtin_memset(p.y + i * p.y_plane + p.body, 0, p.gap * sizeof(T));
      }
    }
  }
}

// W rows of x, side by side, are met for one nonzero: scalars for one row, as gathers are no faster.
template <typename T>
void rows_of_one(const ServeRows<T>& p, int64_t row, int64_t end) {
  for (int64_t r = row; r < end; ++r) {
    int32_t k = p.ptr[r];
    const int32_t stop = p.ptr[r + 1];
    T sum[8] = {};
    for (; k + 8 <= stop; k += 8) {
#pragma GCC unroll 8
      for (int u = 0; u < 8; ++u) sum[u] += p.val[k + u] * p.x[p.idx[k + u]];
    }
    T total = p.bias[r];
    for (; k < stop; ++k) total += p.val[k] * p.x[p.idx[k]];
    total += ((sum[0] + sum[1]) + (sum[2] + sum[3])) + ((sum[4] + sum[5]) + (sum[6] + sum[7]));
    p.y[r] = p.residual ? total + p.residual[r] : total;
  }
}

template <typename T, int W>
void rows_of(const ServeRows<T>& p, int64_t row, int64_t end) {
  typedef T Narrow __attribute__((vector_size(W * sizeof(T))));
  constexpr int U = 4;
  for (int64_t r = row; r < end; ++r) {
    int32_t k = p.ptr[r];
    const int32_t stop = p.ptr[r + 1];
    Narrow sum[U] = {};
    for (; k + U <= stop; k += U) {
#pragma GCC unroll 8
      for (int u = 0; u < U; ++u) {
        Narrow in;
        __builtin_memcpy(&in, p.x + int64_t{p.idx[k + u]} * W, sizeof in);
        sum[u] += p.val[k + u] * in;
      }
    }
    for (; k < stop; ++k) {
      Narrow in;
      __builtin_memcpy(&in, p.x + int64_t{p.idx[k]} * W, sizeof in);
      sum[0] += p.val[k] * in;
    }
    const Narrow total = (sum[0] + sum[1]) + (sum[2] + sum[3]);
    for (int64_t m = 0; m < p.batch; ++m) {
      const T y = total[m] + p.bias[r];
      p.y[m * p.y_stride + r] = p.residual ? y + p.residual[m * p.y_stride + r] : y;
    }
  }
}

template <typename T>
void rows(const ServeRows<T>& p, int64_t row, int64_t end) {
  if (p.width == 1) rows_of_one<T>(p, row, end);
  else if (p.width == 4) rows_of<T, 4>(p, row, end);
  else rows_of<T, 8>(p, row, end);
  if (p.act.kind != Activation::none) {
    for (int64_t m = 0; m < p.batch; ++m) activate<T>(p.y + m * p.y_stride + row, end - row, p.act);
  }
}

// The larger of two; NaN stays NaN, as in torch.
template <typename T>
UASPARSE_INLINE T larger(T best, T value) {
  return (value > best) | (value != value) ? value : best;
}

template <typename T>
UASPARSE_INLINE Vec<T> larger_of(Vec<T> best, Vec<T> value) {
  return (value > best) | (value != value) ? value : best;
}

// `count` outputs side by side of which every window is inside, `start` the first one's: the largest down the columns,
// which lie side by side, then across.
template <typename T>
void max_pool_row(const ServePool<T>& p, const T* start, int64_t height, T* to, int64_t count) {
  constexpr int L = kLanes<T>;
  constexpr int64_t kRow = 1024;
  T down[kRow + L], across[kRow + L];
  const int64_t most = (kRow - p.kernel_w) / p.stride_w + 1;
  for (int64_t w = 0; w < count; w += most) {
    const int64_t some = count - w < most ? count - w : most, span = (some - 1) * p.stride_w + p.kernel_w;
    const T* const from = start + w * p.stride_w;
    const auto vector = [&](int64_t i) UASPARSE_LAMBDA {
      Vec<T> best = load(from + i);
      for (int64_t y = 1; y < height; ++y) best = larger_of<T>(best, load(from + y * p.pitch + i));
      store<T>(down + i, best);
    };
    for (int64_t i = 0; i + L <= span; i += L) vector(i);
    if (span >= L) vector(span - L);
    for (int64_t i = 0; span < L && i < span; ++i) {
      T best = from[i];
      for (int64_t y = 1; y < height; ++y) best = larger(best, from[y * p.pitch + i]);
      down[i] = best;
    }
    store<T>(down + span, Vec<T>{});
    for (int64_t i = 0; i + p.kernel_w <= span; i += L) {
      Vec<T> best = load(down + i);
      for (int64_t x = 1; x < p.kernel_w; ++x) best = larger_of<T>(best, load(down + i + x));
      store<T>(across + i, best);
    }
    if (p.stride_w == 1) {
      for (int64_t i = 0; i < some; ++i) to[w + i] = across[i];
    } else if (p.stride_w == 2) {
      for (int64_t i = 0; i < some; ++i) to[w + i] = across[2 * i];
    } else {
      for (int64_t i = 0; i < some; ++i) to[w + i] = across[i * p.stride_w];
    }
  }
}

template <typename T>
void pool(const ServePool<T>& p, int64_t channel, int64_t end) {
  for (int64_t c = channel; c < end; ++c) {
    T* const out = p.y + c * p.y_plane;
    __builtin_memset(out, 0, (p.out_body + p.gap) * sizeof(T));
    for (int64_t n = 0; n < p.images; ++n)
      for (int64_t h = 0; h < p.out_height; ++h) {
        const T* in = p.x + c * p.x_plane + n * p.rows * p.pitch;
        T* to = out + (n * p.out_rows + h) * p.out_pitch;
        int64_t top = h * p.stride_h - p.pad_h, bottom = top + p.kernel_h;
        const int64_t padded_h = (bottom < p.height + p.pad_h ? bottom : p.height + p.pad_h) - top;
        if (top < 0) top = 0;
        if (bottom > p.height) bottom = p.height;
        // Outputs whose window is all inside take the short way.
        int64_t inner = p.pad_w == 0 ? 0 : (p.pad_w + p.stride_w - 1) / p.stride_w;
        int64_t outer = (p.width - p.kernel_w + p.pad_w) / p.stride_w + 1;
        if (p.width + p.pad_w < p.kernel_w || p.kernel_w > 512) outer = 0;
        if (outer > p.out_width) outer = p.out_width;
        if (inner > outer) inner = outer;
        auto edge = [&](int64_t w) {
          int64_t left = w * p.stride_w - p.pad_w, right = left + p.kernel_w;
          const int64_t padded_w = (right < p.width + p.pad_w ? right : p.width + p.pad_w) - left;
          if (left < 0) left = 0;
          if (right > p.width) right = p.width;
          T best = p.average ? T{0} : in[top * p.pitch + left];
          for (int64_t y = top; y < bottom; ++y)
            for (int64_t x = left; x < right; ++x) {
              const T value = in[y * p.pitch + x];
              if (p.average) best += value;
              else best = larger(best, value);
            }
          if (p.average) best /= p.count_padding ? padded_h * padded_w : (bottom - top) * (right - left);
          to[w] = best;
        };
        for (int64_t w = 0; w < inner; ++w) edge(w);
        for (int64_t w = outer; w < p.out_width; ++w) edge(w);
        const T* start = in + top * p.pitch - p.pad_w;
        if (p.average) {
          const T scale = T{1} / (p.count_padding ? padded_h * p.kernel_w : (bottom - top) * p.kernel_w);
          for (int64_t w = inner; w < outer; ++w) {
            T total = 0;
            for (int64_t y = 0; y < bottom - top; ++y)
              for (int64_t x = 0; x < p.kernel_w; ++x) total += start[y * p.pitch + w * p.stride_w + x];
            to[w] = total * scale;
          }
        } else {
          max_pool_row(p, start + inner * p.stride_w, bottom - top, to + inner, outer - inner);
        }
      }
  }
}

// Channels come 16 at a time, so that rows [.., channels] are read by cache lines.
template <typename T>
void load_transposed(const ServeLoad<T>& p, int64_t channel, int64_t end) {
  for (int64_t c0 = channel; c0 < end; c0 += 16) {
    const int64_t count = end - c0 < 16 ? end - c0 : 16;
    for (int64_t w = 0; w < p.width; w += 16) {
      const int64_t wide = p.width - w < 16 ? p.width - w : 16;
      const T* from = p.x + w * p.stride_w + c0;
      T* to = p.y + c0 * p.plane + w;
      if (count == 16 && wide == 16) {
        T block[16][16];
        for (int i = 0; i < 16; ++i)
          for (int j = 0; j < 16; ++j) block[j][i] = from[i * p.stride_w + j];
        for (int j = 0; j < 16; ++j) __builtin_memcpy(to + j * p.plane, block[j], sizeof block[j]);
      } else {
        for (int64_t j = 0; j < count; ++j)
          for (int64_t i = 0; i < wide; ++i) to[j * p.plane + i] = from[i * p.stride_w + j];
      }
    }
    for (int64_t j = 0; j < count; ++j)
      __builtin_memset(p.y + (c0 + j) * p.plane + p.width, 0, (p.body + p.gap - p.width) * sizeof(T));
  }
}

template <typename T>
void load_planes(const ServeLoad<T>& p, int64_t channel, int64_t end) {
  if (p.stride_c == 1 && p.images == 1 && p.height == 1 && p.phases == 1 && p.phase_h * p.phase_w == 1)
    return load_transposed(p, channel, end);
  for (int64_t c = channel; c < end; ++c)
    for (int64_t i = 0; i < p.phases; ++i) {
      const int64_t py = p.phase[i] / p.phase_w, px = p.phase[i] % p.phase_w;
      T* const out = p.y + (c * p.phases + i) * p.plane;
      const int64_t height = (p.height - py + p.phase_h - 1) / p.phase_h;
      const int64_t width = (p.width - px + p.phase_w - 1) / p.phase_w;
      T* to = out;
      for (int64_t n = 0; n < p.images; ++n)
        for (int64_t h = 0; h < p.rows; ++h, to += p.pitch) {
          int64_t w = 0;
          if (h < height) {
            const T* from = p.x + n * p.stride_n + c * p.stride_c + (h * p.phase_h + py) * p.stride_h + px * p.stride_w;
            const int64_t step = p.phase_w * p.stride_w;
            if (step == 1) {
              for (; w < width; ++w) to[w] = from[w];
            } else if (step == 2) {
              for (; w < width; ++w) to[w] = from[2 * w];
            } else {
              for (; w < width; ++w) to[w] = from[w * step];
            }
          }
          for (; w < p.pitch; ++w) to[w] = 0;
        }
      __builtin_memset(to, 0, (out + p.body + p.gap - to) * sizeof(T));
    }
}

template <typename T>
void affine(const ServeAffine<T>& p, int64_t channel, int64_t end) {
  constexpr int L = kLanes<T>;
  for (int64_t c = channel; c < end; ++c) {
    const T* x = p.x + c * p.x_plane;
    T* y = p.y + c * p.y_plane;
    const T* residual = p.residual ? p.residual + c * p.residual_plane : nullptr;
    const Vec<T> scale = broadcast<T>(p.scale ? p.scale[c] : T{1}), shift = broadcast<T>(p.shift ? p.shift[c] : T{0});
    const bool plain = p.act.kind == Activation::none || p.act.kind == Activation::relu;
    for (int64_t i = 0; i < p.body; i += L) {
      Vec<T> v = load(x + i) * scale + shift;
      if (residual != nullptr) v += load(residual + i);
      if (plain) {
        if (p.act.kind == Activation::relu) v = v < Vec<T>{} ? Vec<T>{} : v;
      } else {
        v = light<T>(heavy<T>(v, p.act), p.act);
      }
      store<T>(y + i, masked(v, p.mask + i));
    }
    __builtin_memset(y + p.body, 0, p.gap * sizeof(T));
  }
}

template <typename T>
void store_rows(const T* x, int64_t plane, T* y, int64_t stride, int64_t rows, int64_t channel, int64_t end) {
  for (int64_t c0 = channel; c0 < end; c0 += 16) {
    const int64_t count = end - c0 < 16 ? end - c0 : 16;
    for (int64_t m = 0; m < rows; m += 16) {
      const int64_t wide = rows - m < 16 ? rows - m : 16;
      const T* from = x + c0 * plane + m;
      T* to = y + m * stride + c0;
      if (count == 16 && wide == 16) {
        T block[16][16];
        for (int j = 0; j < 16; ++j)
          for (int i = 0; i < 16; ++i) block[i][j] = from[j * plane + i];
        for (int i = 0; i < 16; ++i) __builtin_memcpy(to + i * stride, block[i], sizeof block[i]);
      } else {
        for (int64_t j = 0; j < count; ++j)
          for (int64_t i = 0; i < wide; ++i) to[i * stride + j] = from[j * plane + i];
      }
    }
  }
}

}  // namespace
}  // namespace uasparse::UASPARSE_ISA
