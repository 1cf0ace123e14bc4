// The kernels' vectors and the kernels themselves as they are without AVX (128-bit vectors: NEON on aarch64), against
// plain loops in double. No torch: `make neon-check` builds this for aarch64 and runs it under qemu.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <utility>
#include <vector>

#include "cpu/batch_norm.h"
#include "cpu/masked_linear.h"
#include "cpu/max_pool.h"
#include "cpu/unknown_aware_loss.h"

#include "cpu/isa_begin.h"

#include "cpu/vec.h"

#include "cpu/isa_end.h"

namespace {

using namespace uasparse;
using namespace uasparse::portable;

int checks = 0;
std::mt19937 random_bits(0);

void expect(bool right, const char* what, int line) {
  ++checks;
  if (right) return;
  std::printf("line %d: %s\n", line, what);
  std::exit(1);
}
#define EXPECT(condition) expect(condition, #condition, __LINE__)

void expect_close(double got, double expected, double scale, int line, double tolerance = 2e-6) {
  ++checks;
  if (std::abs(got - expected) <= tolerance * scale) return;
  std::printf("line %d: expected %.9g, got %.9g\n", line, expected, got);
  std::exit(1);
}

template <typename T>
std::vector<T> numbers(size_t count) {
  std::normal_distribution<double> normal;
  std::vector<T> result(count);
  for (T& x : result) x = static_cast<T>(normal(random_bits));
  return result;
}

int64_t between(int64_t low, int64_t high) { return std::uniform_int_distribution<int64_t>(low, high)(random_bits); }

// Every stage of a transpose moves the lanes that vec.h says.
template <typename T, int H>
void test_stage() {
  constexpr int L = kLanes<T>;
  Vec<T> a, b;
  for (int i = 0; i < L; ++i) {
    a[i] = T(i);
    b[i] = T(100 + i);
  }
  const Vec<T> low = Stage<T, H>::template shuffle<Stage<T, H>::low>(a, b);
  const Vec<T> high = Stage<T, H>::template shuffle<Stage<T, H>::high>(a, b);
  const Vec<T> outer = Stage<T, H>::template shuffle<Stage<T, H>::outer>(a, b);
  const Vec<T> inner = Stage<T, H>::template shuffle<Stage<T, H>::inner>(a, b);
  for (int i = 0; i < L; ++i) {
    const bool second = i % (2 * H) >= H;
    EXPECT(low[i] == (second ? b[i - H] : a[i]));
    EXPECT(high[i] == (second ? b[i] : a[i + H]));
    EXPECT(outer[i] == (second ? b[i] : a[i]));
    EXPECT(inner[i] == (second ? b[i - H] : a[i + H]));
  }
  if constexpr (H > 1) test_stage<T, H / 2>();
}

template <typename T>
void test_vectors() {
  static_assert(sizeof(Vec<T>) == 16 && kLanes<T> * sizeof(T) == 16);
  std::vector<T> from = numbers<T>(kLanes<T> + 1), to(kLanes<T> + 1);
  const Vec<T> v = load(from.data() + 1);  // at an odd address
  store(to.data() + 1, v);
  double total = 0;
  for (int i = 0; i < kLanes<T>; ++i) {
    EXPECT(to[i + 1] == from[i + 1] && broadcast(T(3))[i] == T(3));
    total += from[i + 1];
  }
  expect_close(sum<T>(v), total, 4, __LINE__);
  expect_close(sum_of_lanes<T>(v), total, 4, __LINE__);
  test_stage<T, kLanes<T> / 2>();
}

void test_max_pool() {
  MaxPool m{};
  m.height = between(3, 20), m.width = between(3, 40);
  m.kernel_h = between(1, 3), m.kernel_w = between(1, 3), m.stride_h = between(1, 3), m.stride_w = between(1, 3);
  m.padding_h = m.kernel_h / 2, m.padding_w = m.kernel_w / 2;
  m.out_height = (m.height + 2 * m.padding_h - m.kernel_h) / m.stride_h + 1;
  m.out_width = (m.width + 2 * m.padding_w - m.kernel_w) / m.stride_w + 1;
  const int64_t planes = 3, outputs = m.out_height * m.out_width;
  std::vector<float> input = numbers<float>(planes * m.height * m.width), output(planes * outputs), scratch(m.scratch());
  for (float& x : input) x = std::round(4 * x);  // some are equal: the first counts
  std::vector<int64_t> indices(planes * outputs);
  m.input = input.data(), m.output = output.data(), m.indices = indices.data();
  max_pool(m, 0, planes, scratch.data());
  for (int64_t o = 0; o < planes * outputs; ++o) {
    const int64_t y = o % outputs / m.out_width, x = o % m.out_width;
    const float* plane = m.input + o / outputs * m.height * m.width;
    float best = -INFINITY;
    int64_t place = -1;
    for (int64_t ky = 0; ky < m.kernel_h; ++ky)
      for (int64_t kx = 0; kx < m.kernel_w; ++kx) {
        const int64_t row = y * m.stride_h - m.padding_h + ky, column = x * m.stride_w - m.padding_w + kx;
        if (row < 0 || row >= m.height || column < 0 || column >= m.width) continue;
        if (plane[row * m.width + column] <= best) continue;
        place = row * m.width + column;
        best = plane[place];
      }
    EXPECT(output[o] == best && indices[o] == place);
  }
}

// pack, product, sddmm, row_sums and unpack of panels, and the narrow product, on one random pattern.
template <typename T>
void test_masked_linear(const LinearKernels<T>& kernels, int64_t block_rows, int64_t block_columns) {
  const int64_t grid_rows = between(1, 9), grid_columns = between(1, 9), batch = between(1, kTileBytes / sizeof(T));
  const int64_t rows = grid_rows * block_rows, columns = grid_columns * block_columns;
  const int64_t size = block_rows * block_columns, lanes = kLaneBytes / sizeof(T);
  const int64_t width = (batch + lanes - 1) / lanes * lanes;
  std::vector<int32_t> ptr{0}, idx;
  for (int64_t r = 0; r < grid_rows; ++r) {
    for (int64_t c = 0; c < grid_columns; ++c)
      if (between(0, 1)) idx.push_back(int32_t(c));
    ptr.push_back(int32_t(idx.size()));
  }
  const int64_t blocks = idx.size();
  // Values may be read ahead, and a batch is filled up to whole vectors.
  std::vector<T> val = numbers<T>(blocks * size + 64), x = numbers<T>(batch * columns), dy = numbers<T>(batch * rows);
  const std::vector<T> bias = numbers<T>(rows);
  std::vector<T> in(columns * width + width), grad_output(rows * width + width), out(rows * width + width);
  std::vector<T> y(batch * rows), grad(blocks * size), sums(rows);
  kernels.pack(x.data(), columns, batch, columns, in.data(), width);
  kernels.pack(dy.data(), rows, batch, rows, grad_output.data(), width);
  for (int64_t c = 0; c < columns; ++c)
    for (int64_t b = 0; b < width; ++b) EXPECT(in[c * width + b] == (b < batch ? x[b * columns + c] : T(0)));

  Product<T> p{};
  p.ptr = p.starts = ptr.data(), p.stride = 1, p.idx = idx.data(), p.begin = 0, p.end = grid_rows, p.column_blocks = 1;
  p.val = val.data(), p.block_out = block_rows, p.block_in = block_columns;
  p.stride_out = block_columns, p.stride_in = 1, p.bias = bias.data();
  p.in = in.data(), p.out = out.data(), p.panels = 1, p.width = width;
  kernels.product(p);
  kernels.unpack(out.data(), width, rows, y.data(), rows, batch);

  Sddmm<T> s{};
  s.ptr = s.starts = ptr.data(), s.stride = 1, s.idx = idx.data(), s.begin = 0, s.end = grid_rows, s.column_blocks = 1;
  s.bh = block_rows, s.bw = block_columns, s.grad_output = grad_output.data(), s.input = in.data();
  s.grad = grad.data(), s.panels = 1, s.width = width;
  kernels.sddmm(s);
  kernels.row_sums(grad_output.data(), width, rows, sums.data(), false);

  std::vector<double> weight(rows * columns);
  for (int64_t r = 0; r < grid_rows; ++r)
    for (int32_t i = ptr[r]; i < ptr[r + 1]; ++i)
      for (int64_t e = 0; e < size; ++e) {
        const int64_t row = r * block_rows + e / block_columns, column = idx[i] * block_columns + e % block_columns;
        weight[row * columns + column] = val[i * size + e];
        double expected = 0;
        for (int64_t b = 0; b < batch; ++b) expected += double(dy[b * rows + row]) * x[b * columns + column];
        expect_close(grad[i * size + e], expected, 30, __LINE__);
      }
  const auto expect_product = [&](const T* got, int64_t of_batch, int64_t of_row, int64_t inputs, int line) {
    for (int64_t b = 0; b < inputs; ++b)
      for (int64_t r = 0; r < rows; ++r) {
        double expected = bias[r];
        for (int64_t c = 0; c < columns; ++c) expected += weight[r * columns + c] * x[b * columns + c];
        expect_close(got[b * of_batch + r * of_row], expected, 20, line);
      }
  };
  expect_product(y.data(), rows, 1, batch, __LINE__);
  for (int64_t r = 0; r < rows; ++r) {
    double expected = 0;
    for (int64_t b = 0; b < batch; ++b) expected += dy[b * rows + r];
    expect_close(sums[r], expected, 30, __LINE__);
  }

  if (size != 1) return;
  const int64_t few = std::min<int64_t>(batch, kNarrow), narrow_width = few == 1 ? 1 : few <= 4 ? 4 : 8;
  std::vector<T> few_in(columns * narrow_width), few_out(few * rows);
  idx.resize(idx.size() + 64);
  if (few > 1) kernels.pack_narrow(x.data(), columns, few, 0, columns, few_in.data(), narrow_width);
  Narrow<T> n{};
  n.ptr = ptr.data(), n.idx = idx.data(), n.val = val.data(), n.begin = 0, n.end = rows, n.batch = few;
  n.width = narrow_width, n.in = few > 1 ? few_in.data() : x.data(), n.bias = bias.data(), n.out = few_out.data(), n.out_stride = rows;
  kernels.narrow(n);
  expect_product(few_out.data(), rows, 1, few, __LINE__);
}

void test_batch_norm() {
  BatchNormForward p{};
  p.batch = between(2, 6), p.channels = between(1, 5), p.pixels = between(1, 70);
  const int64_t count = p.batch * p.channels * p.pixels;
  const std::vector<float> x = numbers<float>(count), weight = numbers<float>(p.channels), bias = numbers<float>(p.channels);
  std::vector<float> y(count), stats(2 * p.channels), scratch(kScratchRows * (p.batch * p.pixels + kSlack) + kSlack);
  std::vector<double> saved(3 * p.channels);
  p.x = x.data(), p.weight = weight.data(), p.bias = bias.data(), p.relu = between(0, 1), p.eps = 1e-5;
  p.y = y.data(), p.stats = stats.data(), p.saved = saved.data();
  batch_norm_forward(p, 0, p.channels, scratch.data());
  for (int64_t c = 0; c < p.channels; ++c) {
    double mean = 0, square = 0;
    const double n = double(p.batch * p.pixels);
    const auto each = [&](auto visit) {
      for (int64_t b = 0; b < p.batch; ++b)
        for (int64_t i = 0; i < p.pixels; ++i) visit((b * p.channels + c) * p.pixels + i);
    };
    each([&](int64_t i) { mean += x[i] / n; });
    each([&](int64_t i) { square += (x[i] - mean) * (x[i] - mean); });
    expect_close(stats[c], mean, 4, __LINE__);
    expect_close(stats[p.channels + c], square / (n - 1), 8, __LINE__);
    each([&](int64_t i) {
      const double value = (x[i] - mean) / std::sqrt(square / n + p.eps) * weight[c] + bias[c];
      expect_close(y[i], p.relu && value < 0 ? 0 : value, 40, __LINE__);
    });
  }
}

// With alpha = 0 the loss is the cross entropy.
void test_loss() {
  const int64_t rows = between(1, 12), classes = between(2, 70);
  const std::vector<float> logits = numbers<float>(rows * classes);
  std::vector<int64_t> target(rows);
  for (int64_t& t : target) t = between(0, classes - 2);
  std::vector<float> losses(rows), saved(2 * rows);
  LossSums sums;
  const LossProblem<float> p{logits.data(), logits.data() + logits.size(), target.data(), classes, 0, 1};
  loss_forward<float>(p, 0, rows, losses.data(), saved.data(), &sums);
  EXPECT(sums.known == rows);
  for (int64_t r = 0; r < rows; ++r) {
    double total = 0;
    for (int64_t k = 0; k < classes; ++k) total += std::exp(double(logits[r * classes + k]));
    expect_close(losses[r], std::log(total) - logits[r * classes + target[r]], 8, __LINE__);
  }
}

}  // namespace

int main() {
  for (int round = 0; round < 20; ++round) {
    test_vectors<float>();
    test_vectors<double>();
    test_max_pool();
    for (const auto& [rows, columns] : {std::pair{1, 1}, {1, 1}, {3, 1}, {4, 4}, {8, 8}}) {
      test_masked_linear(linear_float, rows, columns);
      test_masked_linear(linear_double, rows, columns);
    }
    test_batch_norm();
    test_loss();
  }
  std::printf("%d checks passed\n", checks);
}
