// Batch norm of some neighbouring channels (uasparse_kernels/ops/batch_norm.py has the formulas), for one instruction set
// (isa.h).
//
// A channel is `batch` rows of `pixels` floats, a row for each image. Statistics are taken by chunks of about 4096
// floats, which stay in the L1 cache: a first pass gives a chunk's mean, a second its moments about that mean; chunks are
// merged in double (Chan, Golub, LeVeque), so that a mean far above the deviation costs no digits. Then the channels are
// read once more, from the L2 cache as a rule, and written. Where maps are small, several channels go together, for whole
// pieces of memory. Maps smaller than a vector are first gathered into one row.

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

// What a ReLU lets pass of dy: all (none), that where y (by_y), or what `forward` makes of x (by_x), is not <= 0.
enum class Gate { none, by_y, by_x };

template <Gate gate>
UASPARSE_INLINE Vec<float> gradient(const float* dy, const float* y, Vec<float> x, Affine forward, int64_t at) {
  const Vec<float> g = load(dy + at), zero = {};
  if constexpr (gate == Gate::by_y) return load(y + at) <= zero ? zero : g;
  if constexpr (gate == Gate::by_x) return apply(forward, x) <= zero ? zero : g;
  return g;
}

// sum += dz, product += dz * (x - center) over rows, dz being what the gate lets pass of dy; kept where `dz` is given.
template <Gate gate>
UASPARSE_INLINE void add_products(const float* x, const float* dy, const float* y, Affine forward, Rows rows, float center,
                                  float* dz, double* sum, double* product) {
  Vec<float> plain[kUnroll] = {}, mixed[kUnroll] = {};
  for_each_vector(
      rows,
      [&](int u, int64_t at) UASPARSE_LAMBDA {
        const Vec<float> g = gradient<gate>(dy, y, load(x + at), forward, at);
        if (gate != Gate::none && dz != nullptr) store(dz + at, g);
        plain[u] += g;
        mixed[u] += g * (load(x + at) - center);
      },
      [&](int64_t at, int32_t skip) UASPARSE_LAMBDA {
        const Vec<float> g = gradient<gate>(dy, y, load(x + at), forward, at);
        if (gate != Gate::none && dz != nullptr) store(dz + at, g);
        plain[0] += without_first(g, skip);
        mixed[0] += without_first(g * (load(x + at) - center), skip);
      });
  *sum += sum_of(plain);
  *product += sum_of(mixed);
}

template <bool relu, bool residual>
UASPARSE_INLINE void write_rows(const float* x, const float* added, Rows rows, Affine a, float* y) {
  const auto write = [&](int64_t at) UASPARSE_LAMBDA {
    Vec<float> v = apply(a, load(x + at));
    const Vec<float> zero = {};
    if constexpr (residual) v += load(added + at);
    if constexpr (relu) v = v < zero ? zero : v;  // NaN stays
    store(y + at, v);
  };
  for_each_vector(
      rows, [&](int, int64_t at) UASPARSE_LAMBDA { write(at); },
      [&](int64_t at, int32_t) UASPARSE_LAMBDA { write(at); });
}

UASPARSE_INLINE void write_rows(const BatchNormForward& p, const float* x, const float* added, Rows rows, Affine a,
                                float* y) {
  if (added != nullptr)
    p.relu ? write_rows<true, true>(x, added, rows, a, y) : write_rows<false, true>(x, added, rows, a, y);
  else
    p.relu ? write_rows<true, false>(x, added, rows, a, y) : write_rows<false, false>(x, added, rows, a, y);
}

template <Gate gate>
UASPARSE_INLINE void write_gradient(const float* x, const float* dy, const float* y, Affine forward, Rows rows, Affine a,
                                    float* dx) {
  const auto write = [&](int64_t at) UASPARSE_LAMBDA {
    const Vec<float> v = load(x + at);
    store(dx + at, gradient<gate>(dy, y, v, forward, at) * a.of_dy + apply(a, v));
  };
  for_each_vector(
      rows, [&](int, int64_t at) UASPARSE_LAMBDA { write(at); },
      [&](int64_t at, int32_t) UASPARSE_LAMBDA { write(at); });
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
UASPARSE_INLINE Affine forward_affine(const BatchNormProblem& p, const float* biases, int64_t c, double mean, double scale) {
  const double weight = p.weight != nullptr ? p.weight[c] : 1, bias = biases != nullptr ? biases[c] : 0;
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
  return forward_affine(p, p.bias, c, mean, scale);
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
template <bool relu, bool residual>
UASPARSE_INLINE void write_output(const BatchNormForward& p, int64_t first, int64_t last, const Affine* affine) {
  for (int64_t n = 0; n < p.batch; ++n) {
    for (int64_t c = first; c < last; ++c) {
      const int64_t at = (n * p.channels + c) * p.pixels;
      write_rows<relu, residual>(p.x + at, residual ? p.residual + at : nullptr, Rows{1, 0, p.pixels}, affine[c - first],
                                 p.y + at);
    }
  }
}

void batch_norm_forward(const BatchNormForward& p, int64_t first, int64_t last, float* scratch) {
  if (p.pixels < kVector) {
    const BatchNormProblem gathered{1, 1, p.batch * p.pixels, nullptr, nullptr};
    float *x = scratch_row(p, scratch, 0), *y = scratch_row(p, scratch, 1);
    float* const added = p.residual != nullptr ? scratch_row(p, scratch, 2) : nullptr;
    for (int64_t c = first; c < last; ++c) {
      gather(p, p.x, c, x);
      if (added != nullptr) gather(p, p.residual, c, added);
      Moments moments;
      for_each_chunk(gathered, 0, 1, [&](int64_t, int64_t at, Rows rows) UASPARSE_LAMBDA {
        add_rows(x + at, rows, &moments);
      });
      write_rows(p, x, added, Rows{1, 0, gathered.pixels}, finish(p, c, moments), y);
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
  if (!p.relu)
    write_output<false, false>(p, first, last, affine);
  else
    p.residual != nullptr ? write_output<true, true>(p, first, last, affine)
                          : write_output<true, false>(p, first, last, affine);
}

// What the gate lets pass of a gathered row dy, in place.
UASPARSE_INLINE void gate_row(const BatchNormBackward& p, int64_t c, const float* x, float* y, float* dy) {
  const Affine forward = forward_affine(p, p.bias, c, p.saved[c], p.saved[p.channels + c]);
  const int64_t count = p.batch * p.pixels;
  if (p.y != nullptr)
    gather(p, p.y, c, y);
  else
    write_rows<false, false>(x, nullptr, Rows{1, 0, count}, forward, y);
  for (int64_t i = 0; i < count; ++i) dy[i] = y[i] <= 0 ? 0 : dy[i];
}

template <Gate gate>
UASPARSE_INLINE void backward_rows(const BatchNormBackward& p, int64_t first, int64_t last) {
  double sum[kMaxChannels] = {}, product[kMaxChannels] = {};
  Affine forward[kMaxChannels] = {}, affine[kMaxChannels];
  if (gate == Gate::by_x)
    for (int64_t c = first; c < last; ++c)
      forward[c - first] = forward_affine(p, p.bias, c, p.saved[c], p.saved[p.channels + c]);
  const auto from = [](const auto* t, int64_t at) UASPARSE_LAMBDA { return t != nullptr ? t + at : t; };
  for_each_chunk(p, first, last, [&](int64_t c, int64_t at, Rows rows) UASPARSE_LAMBDA {
    add_products<gate>(p.x + at, p.dy + at, from(p.y, at), forward[c], rows, static_cast<float>(p.saved[first + c]),
                       p.dresidual != nullptr ? p.dresidual + at : nullptr, &sum[c], &product[c]);
  });
  for (int64_t c = first; c < last; ++c) affine[c - first] = finish(p, c, sum[c - first], product[c - first]);
  if (p.dx == nullptr) return;
  for (int64_t n = 0; n < p.batch; ++n) {
    for (int64_t c = first; c < last; ++c) {
      const int64_t at = (n * p.channels + c) * p.pixels;
      const Rows rows{1, 0, p.pixels};
      if (gate != Gate::none && p.dresidual != nullptr)
        write_gradient<Gate::none>(p.x + at, p.dresidual + at, nullptr, Affine{}, rows, affine[c - first], p.dx + at);
      else
        write_gradient<gate>(p.x + at, p.dy + at, from(p.y, at), forward[c - first], rows, affine[c - first], p.dx + at);
    }
  }
}

void batch_norm_backward(const BatchNormBackward& p, int64_t first, int64_t last, float* scratch) {
  if (p.pixels < kVector) {
    const BatchNormProblem gathered{1, 1, p.batch * p.pixels, nullptr, nullptr};
    float *x = scratch_row(p, scratch, 0), *dy = scratch_row(p, scratch, 1), *dx = scratch_row(p, scratch, 2);
    for (int64_t c = first; c < last; ++c) {
      gather(p, p.x, c, x);
      gather(p, p.dy, c, dy);
      if (p.relu) gate_row(p, c, x, scratch_row(p, scratch, 3), dy);
      if (p.dresidual != nullptr) scatter(p, dy, c, p.dresidual);
      double sum = 0, product = 0;
      for_each_chunk(gathered, 0, 1, [&](int64_t, int64_t at, Rows rows) UASPARSE_LAMBDA {
        add_products<Gate::none>(x + at, dy + at, nullptr, Affine{}, rows, static_cast<float>(p.saved[c]), nullptr, &sum,
                                 &product);
      });
      const Affine affine = finish(p, c, sum, product);
      if (p.dx == nullptr) continue;
      write_gradient<Gate::none>(x, dy, nullptr, Affine{}, Rows{1, 0, gathered.pixels}, affine, dx);
      scatter(p, dx, c, p.dx);
    }
    return;
  }
  if (!p.relu) return backward_rows<Gate::none>(p, first, last);
  p.y != nullptr ? backward_rows<Gate::by_y>(p, first, last) : backward_rows<Gate::by_x>(p, first, last);
}

}  // namespace uasparse::UASPARSE_ISA
