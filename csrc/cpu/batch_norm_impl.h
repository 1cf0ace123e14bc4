// Batch norm of some neighbouring channels (uasparse_kernels/ops/batch_norm.py has the formulas), for one instruction set
// (isa.h).
//
// A channel is `batch` rows of `pixels` floats, a row for each image. Statistics are taken by chunks of about 4096
// floats, which stay in the L1 cache: a first pass gives a chunk's mean, a second its moments about that mean; chunks are
// merged in double (Chan, Golub, LeVeque), so that a mean far above the deviation costs no digits. Then the channels are
// read once more, from the L2 cache as a rule, and written, while those that come next are asked for: memory would have
// nothing to do meanwhile. Where maps are small, several channels go together, for whole pieces of memory. Maps smaller
// than a vector are first gathered into one row.

#include "cpu/vec.h"

namespace uasparse::UASPARSE_ISA {

constexpr int64_t kVector = kLanes<float>;
constexpr int kUnroll = 4;
constexpr int64_t kChunk = 4096;

// `count` rows of `length` floats, `stride` apart.
struct Rows {
  int64_t count, stride, length;
};

// Calls visit(u, at) for the whole vectors of each row, u < kUnroll telling neighbours apart, and last(at, skip) for the
// vector that ends with the row where a rest is left: its first `skip` lanes were visited already (or, in a row shorter
// than a vector, lie before the row).
template <typename Visit, typename Last>
UASPARSE_INLINE void for_each_vector(Rows rows, Visit visit, Last last) {
  for (int64_t i = 0; i < rows.count; ++i) {
    const int64_t begin = i * rows.stride, end = begin + rows.length;
    int64_t at = begin;
    for (; at + kUnroll * kVector <= end; at += kUnroll * kVector) {
#pragma GCC unroll 4
      for (int u = 0; u < kUnroll; ++u) visit(u, at + u * kVector);
    }
    for (; at + kVector <= end; at += kVector) visit(0, at);
    if (at < end) last(end - kVector, static_cast<int32_t>(at - (end - kVector)));
  }
}

UASPARSE_INLINE Vec<float> without_first(Vec<float> v, int32_t skip) {
  Vec<int32_t> lane;
  for (int i = 0; i < kVector; ++i) lane[i] = i;
  return lane < skip ? broadcast(0.0f) : v;
}

UASPARSE_INLINE float sum_of(const Vec<float> (&v)[kUnroll]) {
  return sum_of_lanes<float>((v[0] + v[1]) + (v[2] + v[3]));
}

// Running moments: the sum, and the sum of squared differences from the mean.
struct Moments {
  double count = 0, sum = 0, squares = 0;

  void merge(double n, double other_sum, double other_squares) {
    const double delta = count > 0 ? other_sum / n - sum / count : 0;
    squares += other_squares + delta * delta * (count * n / (count + n));
    sum += other_sum;
    count += n;
  }
};

// Adds rows to the moments.
UASPARSE_INLINE void add_rows(const float* x, Rows rows, Moments* moments) {
  const double n = static_cast<double>(rows.count * rows.length);
  Vec<float> total[kUnroll] = {}, first[kUnroll] = {}, second[kUnroll] = {};
  for_each_vector(
      rows,
      [&](int u, int64_t at) UASPARSE_LAMBDA { total[u] += load(x + at); },
      [&](int64_t at, int32_t skip) UASPARSE_LAMBDA { total[0] += without_first(load(x + at), skip); });
  const float center = sum_of(total) / static_cast<float>(n);
  for_each_vector(
      rows,
      [&](int u, int64_t at) UASPARSE_LAMBDA {
        const Vec<float> d = load(x + at) - center;
        first[u] += d;
        second[u] += d * d;
      },
      [&](int64_t at, int32_t skip) UASPARSE_LAMBDA {
        const Vec<float> d = without_first(load(x + at) - center, skip);
        first[0] += d;
        second[0] += d * d;
      });
  const double rest = sum_of(first), squares = sum_of(second);
  if (squares < __builtin_inf()) {
    moments->merge(n, n * center + rest, squares - rest * rest / n);
    return;
  }
  // Infinities, NaN, and numbers whose squares are beyond float.
  double sum = 0, exact = 0;
  for (int64_t i = 0; i < rows.count; ++i)
    for (int64_t j = 0; j < rows.length; ++j) sum += x[i * rows.stride + j];
  for (int64_t i = 0; i < rows.count; ++i) {
    for (int64_t j = 0; j < rows.length; ++j) {
      const double d = x[i * rows.stride + j] - sum / n;
      exact += d * d;
    }
  }
  moments->merge(n, sum, exact);
}

// A channel's output or gradient of the input: y = scale * (x - center) + shift, dx = of_dy * dy + scale * (x - center) +
// shift. `center` is the mean rounded; what the rounding left is in `shift`.
struct Affine {
  float center, scale, shift, of_dy;
};

UASPARSE_INLINE Vec<float> apply(Affine a, Vec<float> x) { return (x - a.center) * a.scale + a.shift; }

// What a ReLU lets pass of dy: all (none), that where y is neither <= 0 nor > most (by_y), or where what `forward` makes of x
// is not <= 0 (by_x).
enum class Gate { none, by_y, by_x };

template <Gate gate>
UASPARSE_INLINE Vec<float> gradient(const float* dy, const float* y, Vec<float> x, Affine forward, float most, int64_t at) {
  const Vec<float> g = load(dy + at), zero = {};
  if constexpr (gate == Gate::by_y) {
    const Vec<float> v = load(y + at);
    return (v <= zero) | (v > zero + most) ? zero : g;
  }
  if constexpr (gate == Gate::by_x) return apply(forward, x) <= zero ? zero : g;
  return g;
}

// sum += dz, product += dz * (x - center) over rows, dz being what the gate lets pass of dy; kept where `dz` is given, which
// may be dy.
template <Gate gate>
UASPARSE_INLINE void add_products(const float* x, const float* dy, const float* y, Affine forward, float most, Rows rows,
                                  float center, float* dz, double* sum, double* product) {
  Vec<float> plain[kUnroll] = {}, mixed[kUnroll] = {};
  const auto add = [&](int u, Vec<float> g, Vec<float> g_times_x) UASPARSE_LAMBDA {
    plain[u] += g;
    mixed[u] += g_times_x;
  };
  const int32_t rest = static_cast<int32_t>(rows.length % kVector);
  for (int64_t i = 0; i < rows.count; ++i) {
    const int64_t begin = i * rows.stride, end = begin + rows.length, last = end - kVector;
    Vec<float> last_g = {};
    if (rest != 0) {  // first, for it overlaps what is written before
      last_g = gradient<gate>(dy, y, load(x + last), forward, most, last);
      add(0, without_first(last_g, kVector - rest),
          without_first(last_g * (load(x + last) - center), kVector - rest));
    }
    const auto visit = [&](int u, int64_t at) UASPARSE_LAMBDA {
      const Vec<float> v = load(x + at), g = gradient<gate>(dy, y, v, forward, most, at);
      if (gate != Gate::none && dz != nullptr) store(dz + at, g);
      add(u, g, g * (v - center));
    };
    int64_t at = begin;
    for (; at + kUnroll * kVector <= end; at += kUnroll * kVector) {
#pragma GCC unroll 4
      for (int u = 0; u < kUnroll; ++u) visit(u, at + u * kVector);
    }
    for (; at + kVector <= end; at += kVector) visit(0, at);
    if (rest != 0 && gate != Gate::none && dz != nullptr) store(dz + last, last_g);
  }
  *sum += sum_of(plain);
  *product += sum_of(mixed);
}

// Past the caches, where `to` is the beginning of a vector in memory; fence() before another thread may read it.
UASPARSE_INLINE void stream(float* to, Vec<float> v) {
#if defined(__clang__)
  __builtin_nontemporal_store(v, reinterpret_cast<Vec<float>*>(to));
#elif UASPARSE_VECTOR_BYTES == 64
  __builtin_ia32_movntps512(to, v);
#elif UASPARSE_VECTOR_BYTES == 32
  __builtin_ia32_movntps256(to, v);
#else
  store(to, v);
#endif
}

UASPARSE_INLINE void fence() {
#if defined(__x86_64__)
  __builtin_ia32_sfence();
#endif
}

// to[at] = make(at) for every vector of a row. What `make` reads at `at` may be what is written: the vector that ends with
// a row and overlaps the one before it is made first.
template <bool streams, typename Make>
UASPARSE_INLINE void write_row(int64_t length, float* to, Make make) {
  const bool has_rest = length % kVector != 0;
  const Vec<float> rest = has_rest ? make(length - kVector) : Vec<float>{};
  const auto write = [&](int64_t at) UASPARSE_LAMBDA {
    if constexpr (streams) stream(to + at, make(at));
    else store(to + at, make(at));
  };
  int64_t at = 0;
  for (; at + kUnroll * kVector <= length; at += kUnroll * kVector) {
#pragma GCC unroll 4
    for (int u = 0; u < kUnroll; ++u) write(at + u * kVector);
  }
  for (; at + kVector <= length; at += kVector) write(at);
  if (has_rest) store(to + length - kVector, rest);
}

// Asks for what lies `ahead` of the vector, if there is any. Not an error beyond the end of memory.
UASPARSE_INLINE void ask(const float* from, int64_t ahead) {
  if (ahead != 0) __builtin_prefetch(from + ahead, 0, 2);
}

template <bool relu, bool residual, bool streams>
UASPARSE_INLINE void write_output(const float* x, const float* added, int64_t length, Affine a, float* y, int64_t ahead) {
  write_row<streams>(length, y, [&](int64_t at) UASPARSE_LAMBDA {
    ask(x + at, ahead);
    Vec<float> v = apply(a, load(x + at));
    const Vec<float> zero = {};
    if constexpr (residual) {
      ask(added + at, ahead);
      v += load(added + at);
    }
    if constexpr (relu) v = v < zero ? zero : v;  // NaN stays
    return v;
  });
}

// next: where the gradient that comes next is read first.
template <Gate gate, bool streams>
UASPARSE_INLINE void write_gradient(const float* x, const float* dy, const float* y, const float* next, Affine forward,
                                    float most, int64_t length, Affine a, float* dx, int64_t ahead) {
  write_row<streams>(length, dx, [&](int64_t at) UASPARSE_LAMBDA {
    ask(x + at, ahead);
    ask(next + at, ahead);
    if (y != nullptr) ask(y + at, ahead);
    const Vec<float> v = load(x + at);
    return gradient<gate>(dy, y, v, forward, most, at) * a.of_dy + apply(a, v);
  });
}

// How far ahead of a vector of these channels, of which `maps` are read, lies that of the next ones: 0 where the caches
// would not keep it.
UASPARSE_INLINE int64_t ahead_of(const BatchNormProblem& p, int64_t channels, int64_t maps) {
  constexpr int64_t kL2 = 200 << 10;  // floats
  const int64_t size = channels * p.batch * p.pixels;
  return (2 * maps + 1) * size <= kL2 ? channels * p.pixels : 0;
}

// Calls visit(channel from first, offset, rows) for the chunks of channels [first, last); every channel's come in
// order.
template <typename Visit>
UASPARSE_INLINE void for_each_chunk(const BatchNormProblem& p, int64_t first, int64_t last, Visit visit) {
  const int64_t image = p.channels * p.pixels, wide = (last - first) * p.pixels;
  const int64_t images = wide < kChunk ? kChunk / wide : 1;
  for (int64_t n = 0; n < p.batch; n += images) {
    const int64_t count = n + images < p.batch ? images : p.batch - n;
    for (int64_t c = first; c < last; ++c) {
      for (int64_t at = 0; at < p.pixels; at += kChunk) {
        const int64_t length = at + kChunk < p.pixels ? kChunk : p.pixels - at;
        visit(c - first, n * image + c * p.pixels + at, Rows{count, image, length});
      }
    }
  }
}

// Row `place` of the scratch.
UASPARSE_INLINE float* scratch_row(const BatchNormProblem& p, float* scratch, int place) {
  return scratch + place * (kSlack + p.batch * p.pixels) + kSlack;
}

// The pixels of channel c side by side.
UASPARSE_INLINE void gather(const BatchNormProblem& p, const float* x, int64_t c, float* row) {
  for (int64_t n = 0; n < p.batch; ++n)
    for (int64_t i = 0; i < p.pixels; ++i) row[n * p.pixels + i] = x[(n * p.channels + c) * p.pixels + i];
}

UASPARSE_INLINE void scatter(const BatchNormProblem& p, const float* row, int64_t c, float* y) {
  for (int64_t n = 0; n < p.batch; ++n)
    for (int64_t i = 0; i < p.pixels; ++i) y[(n * p.channels + c) * p.pixels + i] = row[n * p.pixels + i];
}

// What turns a channel's x into y.
UASPARSE_INLINE Affine forward_affine(const BatchNormProblem& p, int64_t c, const double* saved) {
  const double mean = saved[c], scale = saved[p.channels + c], bias = saved[2 * p.channels + c];
  const double weight = p.weight != nullptr ? p.weight[c] : 1;
  const float center = static_cast<float>(mean);
  return {center, static_cast<float>(weight * scale), static_cast<float>(bias - (mean - center) * weight * scale), 0};
}

// Keeps a channel's statistics; gives what turns its x into y.
UASPARSE_INLINE Affine finish(const BatchNormForward& p, int64_t c, const Moments& m) {
  const double mean = m.sum / m.count, scale = 1 / __builtin_sqrt(m.squares / m.count + p.eps);
  p.stats[c] = static_cast<float>(mean);
  p.stats[p.channels + c] = static_cast<float>(m.squares / (m.count - 1));
  p.saved[c] = mean;
  p.saved[p.channels + c] = scale;
  p.saved[2 * p.channels + c] = p.bias != nullptr ? p.bias[c] : 0;
  return forward_affine(p, c, p.saved);
}

// Keeps a channel's gradients of weight and bias; gives what turns its dy and x into dx. product: of dy and x - center.
UASPARSE_INLINE Affine finish(const BatchNormBackward& p, int64_t c, double sum, double product) {
  const double mean = p.saved[c], scale = p.saved[p.channels + c], count = static_cast<double>(p.batch * p.pixels);
  const float center = static_cast<float>(mean);
  const double dweight = (product - (mean - center) * sum) * scale;  // sum of dy * (x - mean) * scale
  if (p.dweight != nullptr) p.dweight[c] = static_cast<float>(dweight);
  if (p.dbias != nullptr) p.dbias[c] = static_cast<float>(sum);
  // dx = weight * scale * (dy - sum / count - (x - mean) * scale * dweight / count)
  const double of_dy = (p.weight != nullptr ? p.weight[c] : 1) * scale, of_x = -of_dy * scale * dweight / count;
  return {center, static_cast<float>(of_x), static_cast<float>(-of_dy * sum / count - (mean - center) * of_x),
          static_cast<float>(of_dy)};
}

// What is to be done with a row is chosen outside of the loop: rows are a few vectors.
template <bool relu, bool residual, bool streams>
UASPARSE_INLINE void write_outputs(const BatchNormForward& p, int64_t first, int64_t last, const Affine* affine) {
  const int64_t ahead = ahead_of(p, last - first, residual ? 2 : 1);
  for (int64_t n = 0; n < p.batch; ++n) {
    for (int64_t c = first; c < last; ++c) {
      const int64_t at = (n * p.channels + c) * p.pixels;
      write_output<relu, residual, streams>(p.x + at, residual ? p.residual + at : nullptr, p.pixels, affine[c - first],
                                            p.y + at, ahead);
    }
  }
}

template <bool streams>
UASPARSE_INLINE void write_outputs(const BatchNormForward& p, int64_t first, int64_t last, const Affine* affine) {
  if (!p.relu)
    write_outputs<false, false, streams>(p, first, last, affine);
  else
    p.residual != nullptr ? write_outputs<true, true, streams>(p, first, last, affine)
                          : write_outputs<true, false, streams>(p, first, last, affine);
}

void batch_norm_forward(const BatchNormForward& p, int64_t first, int64_t last, float* scratch) {
  if (p.pixels < kVector) {
    const BatchNormProblem gathered{1, 1, p.batch * p.pixels, nullptr, nullptr, false};
    float *x = scratch_row(p, scratch, 0), *y = scratch_row(p, scratch, 1);
    float* const added = p.residual != nullptr ? scratch_row(p, scratch, 2) : nullptr;
    for (int64_t c = first; c < last; ++c) {
      gather(p, p.x, c, x);
      if (added != nullptr) gather(p, p.residual, c, added);
      Moments moments;
      for_each_chunk(gathered, 0, 1, [&](int64_t, int64_t at, Rows rows) UASPARSE_LAMBDA {
        add_rows(x + at, rows, &moments);
      });
      const Affine affine = finish(p, c, moments);
      if (!p.relu)
        write_output<false, false, false>(x, nullptr, gathered.pixels, affine, y, 0);
      else
        added != nullptr ? write_output<true, true, false>(x, added, gathered.pixels, affine, y, 0)
                         : write_output<true, false, false>(x, nullptr, gathered.pixels, affine, y, 0);
      scatter(p, y, c, p.y);
    }
    return;
  }
  Moments moments[kMaxChannels];
  for_each_chunk(p, first, last, [&](int64_t c, int64_t at, Rows rows) UASPARSE_LAMBDA {
    add_rows(p.x + at, rows, &moments[c]);
  });
  Affine affine[kMaxChannels];
  for (int64_t c = first; c < last; ++c) affine[c - first] = finish(p, c, moments[c - first]);
  if (!p.streams) return write_outputs<false>(p, first, last, affine);
  write_outputs<true>(p, first, last, affine);
  fence();
}

// What the gate lets pass of a gathered row dy, in place.
UASPARSE_INLINE void gate_row(const BatchNormBackward& p, int64_t c, const float* x, float* y, float* dy) {
  const Affine forward = forward_affine(p, c, p.saved);
  const int64_t count = p.batch * p.pixels;
  if (p.y != nullptr)
    gather(p, p.y, c, y);
  else
    write_output<false, false, false>(x, nullptr, count, forward, y, 0);
  for (int64_t i = 0; i < count; ++i) dy[i] = y[i] <= 0 || y[i] > p.most ? 0 : dy[i];
}

template <Gate gate, bool streams>
UASPARSE_INLINE void write_gradients(const BatchNormBackward& p, int64_t first, int64_t last, const Affine* forward,
                                     const Affine* affine) {
  const int64_t ahead = ahead_of(p, last - first, gate == Gate::by_y ? 3 : 2);
  for (int64_t n = 0; n < p.batch; ++n) {
    for (int64_t c = first; c < last; ++c) {
      const int64_t at = (n * p.channels + c) * p.pixels;
      const float* const y = p.y != nullptr ? p.y + at : nullptr;
      if (gate != Gate::none && p.dresidual != nullptr)
        write_gradient<Gate::none, streams>(p.x + at, p.dresidual + at, y, p.dy + at, Affine{}, p.most, p.pixels,
                                            affine[c - first], p.dx + at, ahead);
      else
        write_gradient<gate, streams>(p.x + at, p.dy + at, y, p.dy + at, forward[c - first], p.most, p.pixels,
                                      affine[c - first], p.dx + at, ahead);
    }
  }
}

template <Gate gate>
UASPARSE_INLINE void backward_rows(const BatchNormBackward& p, int64_t first, int64_t last) {
  double sum[kMaxChannels] = {}, product[kMaxChannels] = {};
  Affine forward[kMaxChannels] = {}, affine[kMaxChannels];
  if (gate == Gate::by_x)
    for (int64_t c = first; c < last; ++c) forward[c - first] = forward_affine(p, c, p.saved);
  const auto from = [](auto* t, int64_t at) UASPARSE_LAMBDA { return t != nullptr ? t + at : t; };
  for_each_chunk(p, first, last, [&](int64_t c, int64_t at, Rows rows) UASPARSE_LAMBDA {
    add_products<gate>(p.x + at, p.dy + at, from(p.y, at), forward[c], p.most, rows,
                       static_cast<float>(p.saved[first + c]), from(p.dresidual, at), &sum[c], &product[c]);
  });
  for (int64_t c = first; c < last; ++c) affine[c - first] = finish(p, c, sum[c - first], product[c - first]);
  if (p.dx == nullptr) return;
  if (!p.streams) return write_gradients<gate, false>(p, first, last, forward, affine);
  write_gradients<gate, true>(p, first, last, forward, affine);
  fence();
}

void batch_norm_backward(const BatchNormBackward& p, int64_t first, int64_t last, float* scratch) {
  if (p.pixels < kVector) {
    const BatchNormProblem gathered{1, 1, p.batch * p.pixels, nullptr, nullptr, false};
    float *x = scratch_row(p, scratch, 0), *dy = scratch_row(p, scratch, 1), *dx = scratch_row(p, scratch, 2);
    for (int64_t c = first; c < last; ++c) {
      gather(p, p.x, c, x);
      gather(p, p.dy, c, dy);
      if (p.relu) gate_row(p, c, x, scratch_row(p, scratch, 3), dy);
      if (p.dresidual != nullptr) scatter(p, dy, c, p.dresidual);
      double sum = 0, product = 0;
      for_each_chunk(gathered, 0, 1, [&](int64_t, int64_t at, Rows rows) UASPARSE_LAMBDA {
        add_products<Gate::none>(x + at, dy + at, nullptr, Affine{}, p.most, rows, static_cast<float>(p.saved[c]), nullptr, &sum,
                                 &product);
      });
      const Affine affine = finish(p, c, sum, product);
      if (p.dx == nullptr) continue;
      write_gradient<Gate::none, false>(x, dy, nullptr, dy, Affine{}, p.most, gathered.pixels, affine, dx, 0);
      scatter(p, dx, c, p.dx);
    }
    return;
  }
  if (!p.relu) return backward_rows<Gate::none>(p, first, last);
  p.y != nullptr ? backward_rows<Gate::by_y>(p, first, last) : backward_rows<Gate::by_x>(p, first, last);
}

}  // namespace uasparse::UASPARSE_ISA
