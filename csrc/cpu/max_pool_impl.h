// Max pooling of planes, for one instruction set (isa.h).
//
// The rows under a row of outputs are taken apart by phases of the stride, with -inf for padding, so that what one tap
// takes for neighbouring outputs lies side by side. Then a vector of outputs goes over the taps in their order and keeps
// the largest number and its place, as torch does: the first of equal ones, and the last NaN.

#include "cpu/vec.h"

namespace uasparse::UASPARSE_ISA {
namespace {

// Row y of the plane by phases: to[p * phase + i] is column i * stride + p - padding.
UASPARSE_INLINE void split_row(const MaxPool& m, const float* plane, int64_t y, float* to) {
  const int64_t stride = m.stride_w, phase = m.phase();
  const float none = -__builtin_inff();
  for (int64_t i = 0; i < stride * phase; ++i) to[i] = none;
  if (y < 0 || y >= m.height) return;
  const float* const row = plane + y * m.width;
  for (int64_t p = 0; p < stride; ++p) {
    int64_t i = m.padding_w > p ? (m.padding_w - p + stride - 1) / stride : 0;
    int64_t end = (m.width - 1 + m.padding_w - p) / stride + 1;
    if (m.width - 1 + m.padding_w < p) end = 0;
    if (end > phase - MaxPool::kSlack) end = phase - MaxPool::kSlack;
    const float* const from = row + p - m.padding_w;
    float* const out = to + p * phase;
    if (stride == 2)
      for (; i < end; ++i) out[i] = from[2 * i];
    else
      for (; i < end; ++i) out[i] = from[i * stride];
  }
}

UASPARSE_INLINE void pool_row(const MaxPool& m, const float* rows, int64_t y, float* output, int64_t* indices) {
  typedef decltype(Vec<float>{} < Vec<float>{}) Places;
  constexpr int L = kLanes<float>;
  const int64_t stride = m.stride_w, phase = m.phase(), first_y = y * m.stride_h - m.padding_h;
  Places lane = {};
  for (int l = 0; l < L; ++l) lane[l] = l;
  for (int64_t x = 0; x < m.out_width; x += L) {
    Vec<float> best = broadcast(-__builtin_inff());
    // The first tap inside, where nothing is above -inf.
    const int64_t top = first_y < 0 ? 0 : first_y;
    Places place = (lane + int32_t(x)) * int32_t(stride) - int32_t(m.padding_w);
    place = (place < 0 ? Places{} : place) + int32_t(top * m.width);
    for (int64_t ky = 0; ky < m.kernel_h; ++ky) {
      if (first_y + ky < 0 || first_y + ky >= m.height) continue;
      for (int64_t kx = 0; kx < m.kernel_w; ++kx) {
        const Vec<float> v = load(rows + (ky * stride + kx % stride) * phase + kx / stride + x);
        const Places here = (lane + int32_t(x)) * int32_t(stride) +
                            int32_t((first_y + ky) * m.width + kx - m.padding_w);
        const auto better = (v > best) | (v != v);
        best = better ? v : best;
        place = better ? here : place;
      }
    }
    const int64_t count = m.out_width - x < L ? m.out_width - x : L;
    if (count == L) {
      store(output + x, best);
      for (int l = 0; l < L; ++l) indices[x + l] = place[l];
    } else {
      for (int64_t l = 0; l < count; ++l) {
        output[x + l] = best[l];
        indices[x + l] = place[l];
      }
    }
  }
}

}  // namespace

// Planes [first, last).
void max_pool(const MaxPool& m, int64_t first, int64_t last, float* scratch) {
  const int64_t row = m.stride_w * m.phase();
  for (int64_t i = first; i < last; ++i) {
    const float* const plane = m.input + i * m.height * m.width;
    for (int64_t y = 0; y < m.out_height; ++y) {
      for (int64_t ky = 0; ky < m.kernel_h; ++ky)
        split_row(m, plane, y * m.stride_h - m.padding_h + ky, scratch + ky * row);
      const int64_t to = (i * m.out_height + y) * m.out_width;
      pool_row(m, scratch, y, m.output + to, m.indices + to);
    }
  }
}

}  // namespace uasparse::UASPARSE_ISA
