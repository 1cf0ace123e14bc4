// The forward product of up to 8 inputs, unstructured: bound by the stream of values and indices. Part of
// masked_linear_impl.h.
//
// A nonzero's loads (index, value, inputs) are a cycle and a half where the inputs are near; its 8 bytes of float32 (6 with
// indices of 16 bits) take longer from memory. So the inputs lie W side by side, W = 1, 4 or 8, and a row is one segment.

namespace uasparse::UASPARSE_ISA {
namespace {

// A processor's own prefetcher leaves a fifth to a third of the bandwidth (docs/cpu-kernels.md).
template <typename T, typename Index>
UASPARSE_INLINE void prefetch_ahead(const T* val, const Index* idx) {
  constexpr int64_t kAhead = 320;
  __builtin_prefetch(val + kAhead);
  __builtin_prefetch(idx + kAhead);
}

// One input: its numbers are put into vectors one by one (gather instructions are slower than that on many processors).
template <typename T, typename Index>
void narrow_one(const Narrow<T> p, const Index* idx) {
  constexpr int L = 16 / sizeof(T), U = 4;
  typedef T Short __attribute__((vector_size(16)));
  for (int64_t r = p.begin; r < p.end; ++r) {
    Short acc[U] = {};
    int64_t i = p.ptr[r];
    const int64_t last = p.ptr[r + 1];
    const auto add = [&](int u) UASPARSE_LAMBDA {
      Short x, w;
      if constexpr (sizeof(Index) == 2) {
        uint64_t few = 0;  // one load, as loads bound this too
        __builtin_memcpy(&few, idx + i, sizeof(Index) * L);
#pragma GCC unroll 4
        for (int l = 0; l < L; ++l) x[l] = p.in[few >> (16 * l) & 0xffff];
      } else {
#pragma GCC unroll 4
        for (int l = 0; l < L; ++l) x[l] = p.in[static_cast<uint32_t>(idx[i + l])];
      }
      __builtin_memcpy(&w, p.val + i, sizeof w);
      acc[u] += w * x;
      i += L;
    };
    while (i + L * U <= last) {
      prefetch_ahead(p.val + i, idx + i);
#pragma GCC unroll 4
      for (int u = 0; u < U; ++u) add(u);
    }
    while (i + L <= last) add(0);
    const Short four = (acc[0] + acc[1]) + (acc[2] + acc[3]);
    T rest = 0;
    for (; i < last; ++i) rest += p.val[i] * p.in[static_cast<uint32_t>(idx[i])];
    for (int l = 0; l < L; ++l) rest += four[l];
    p.out[r] = (p.bias ? p.bias[r] : 0) + rest;
  }
}

// W inputs side by side, each nonzero times all of them. U chains, for one would wait for its own additions.
template <typename T, int W, typename Index>
void narrow_of(const Narrow<T> p, const Index* idx) {
  constexpr int kRegisters = W * sizeof(T) > UASPARSE_VECTOR_BYTES ? W * sizeof(T) / UASPARSE_VECTOR_BYTES : 1;
  constexpr int U = 8 / kRegisters;
  typedef T Inputs __attribute__((vector_size(W * sizeof(T))));
  for (int64_t r = p.begin; r < p.end; ++r) {
    Inputs acc[U] = {};
    int64_t i = p.ptr[r];
    const int64_t last = p.ptr[r + 1];
    const auto add = [&](int count) UASPARSE_LAMBDA {
#pragma GCC unroll 16
      for (int u = 0; u < count; ++u, ++i) {
        Inputs x;
        __builtin_memcpy(&x, p.in + static_cast<uint64_t>(static_cast<uint32_t>(idx[i])) * W, sizeof x);
        acc[u % U] += p.val[i] * x;
      }
    };
    while (i + 16 <= last) {
      prefetch_ahead(p.val + i, idx + i);
      add(16);
    }
    if (i + 8 <= last) add(8);
    if (i + 4 <= last) add(4);
    while (i < last) add(1);
#pragma GCC unroll 8
    for (int u = 1; u < U; ++u) acc[0] += acc[u];
    T sums[W];
    __builtin_memcpy(sums, &acc[0], sizeof sums);
    const T bias = p.bias ? p.bias[r] : 0;
    for (int64_t b = 0; b < p.batch; ++b) p.out[b * p.out_stride + r] = sums[b] + bias;
  }
}

template <typename T, typename Index>
void narrow_by(const Narrow<T>& p, const Index* idx) {
  switch (p.width) {
    case 1: return narrow_one(p, idx);
    case 4: return narrow_of<T, 4>(p, idx);
    default: return narrow_of<T, 8>(p, idx);
  }
}

template <typename T>
void narrow(const Narrow<T>& p) {
  p.short_idx ? narrow_by(p, p.short_idx) : narrow_by(p, p.idx);
}

// Places beyond the batch repeat its last row; their sums are not stored.
template <typename T, int W>
void pack_narrow_of(const T* from, int64_t stride, int64_t batch, int64_t begin, int64_t end, T* to) {
  const T* rows[W];
  for (int b = 0; b < W; ++b) rows[b] = from + (b < batch ? b : batch - 1) * stride;
  for (int64_t c = begin; c < end; ++c)
    for (int b = 0; b < W; ++b) to[c * W + b] = rows[b][c];
}

template <typename T>
void pack_narrow(const T* from, int64_t stride, int64_t batch, int64_t begin, int64_t end, T* to, int64_t width) {
  if (width == 4) return pack_narrow_of<T, 4>(from, stride, batch, begin, end, to);
  pack_narrow_of<T, 8>(from, stride, batch, begin, end, to);
}

}  // namespace
}  // namespace uasparse::UASPARSE_ISA
