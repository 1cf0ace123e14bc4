// Gradient of the weight (SDDMM) for one instruction set. Part of masked_linear_impl.h.
//
// One row of a panel is held in registers while dot products with a list of other rows are taken, a few at a time: a tree
// of shuffles folds their vectors of partial sums into one. As many as there are lanes would take the fewest shuffles
// a dot, but lists are short and the rest of 16 is mostly wasted: AVX-512 takes four (docs/cpu-kernels.md).

namespace uasparse::UASPARSE_ISA {
namespace {

// N dot products y . x[idx[j * S]] over NV vectors, as N groups of L / N partial sums in the order of j: a tree that
// folds two vectors into one on every level. x is `split` vectors of one panel, then the next panel's, `next` apart.
template <typename T, int NV, int N, int S>
struct Dots {
  static UASPARSE_INLINE Vec<T> run(const Vec<T>* y, const T* const* x, int64_t next) {
    if constexpr (N == 1) {
      Vec<T> acc = y[0] * load(x[0]);
#pragma GCC unroll 16
      for (int v = 1; v < NV; ++v)
        acc += y[v] * load(x[0] + (v < kPanelVectors ? 0 : next) + v % kPanelVectors * kLanes<T>);
      return acc;
    } else {
      using Fold = Stage<T, kLanes<T> / N>;
      const Vec<T> a = Dots<T, NV, N / 2, 2 * S>::run(y, x, next);
      const Vec<T> b = Dots<T, NV, N / 2, 2 * S>::run(y, x + S, next);
      return Fold::template shuffle<Fold::outer>(a, b) + Fold::template shuffle<Fold::inner>(a, b);
    }
  }
};

// Every group of 2 * H lanes summed, in all its lanes.
template <typename T, int H>
UASPARSE_INLINE Vec<T> sum_groups(Vec<T> v) {
  if constexpr (H == 0) {
    return v;
  } else {
    using Fold = Stage<T, H>;
    return sum_groups<T, H / 2>(v + Fold::template shuffle<Fold::inner>(v, v));
  }
}

// Lanes 0, G, 2G, ... first.
template <typename T, int G, int... lane>
UASPARSE_INLINE Vec<T> every_of(Vec<T> v, std::integer_sequence<int, lane...>) {
#ifdef __clang__
  return __builtin_shufflevector(v, v, (lane * G % kLanes<T>)...);
#else
  typedef decltype(v < v) Mask;
  return __builtin_shuffle(v, Mask{(lane * G % kLanes<T>)...});
#endif
}
template <typename T, int G>
UASPARSE_INLINE Vec<T> every(Vec<T> v) {
  return every_of<T, G>(v, std::make_integer_sequence<int, kLanes<T>>{});
}

// A row held in registers against a list of others: at(j) is the j-th. Pairs of panels are hold_next and list_next apart.
template <typename T>
struct DotList {
  const T* hold;
  int64_t hold_next, list_next, width;
  T* grad;
  bool accumulate;

  static constexpr int L = kLanes<T>, N = L > 8 ? 4 : L;

  // grad[j] (+)= hold . at(j) for j in [first, first + count), 0 < count <= N.
  template <int NV, int N, typename At>
  UASPARSE_INLINE void few(const Vec<T>* y, At at, int64_t first, int64_t count) const {
    constexpr int G = L / N;
    const T* x[N];
#pragma GCC unroll 16
    for (int j = 0; j < N; ++j) x[j] = at(first + (j < count ? j : count - 1));
    Vec<T> sums = every<T, G>(sum_groups<T, G / 2>(Dots<T, NV, N, 1>::run(y, x, list_next)));
    if (accumulate) sums += load_first<T>(grad + first, count);
    store_first<T>(grad + first, sums, count);
  }

  // All of the list, one strip of NV vectors.
  template <int NV, typename At>
  UASPARSE_INLINE void strip(At at, int64_t count) const {
    Vec<T> y[NV];
#pragma GCC unroll 16
    for (int v = 0; v < NV; ++v) y[v] = load(hold + (v < kPanelVectors ? 0 : hold_next) + v % kPanelVectors * L);
    int64_t i = 0;
    for (; i + N <= count; i += N) few<NV, N>(y, at, i, N);
    const int64_t rest = count - i;
    if (rest > 4) return few<NV, N>(y, at, i, rest);
    if (rest > 0) few<NV, (N > 4 ? 4 : N)>(y, at, i, rest);
  }

  // All of the list over one panel's width, or over two panels' where registers allow.
  template <typename At>
  UASPARSE_INLINE void run(bool pair, At at, int64_t count) {
    if (pair) return strip<(kPanelVectors <= 4 ? 2 * kPanelVectors : 1)>(at, count);
    int64_t lane = 0;
    const auto shifted = [&](int64_t j) UASPARSE_LAMBDA { return at(j) + lane; };
    for (; lane + kStrip * L <= width; lane += kStrip * L, hold += kStrip * L, accumulate = true)
      strip<kStrip>(shifted, count);
    for (; lane + 2 * L <= width; lane += 2 * L, hold += 2 * L, accumulate = true) strip<2>(shifted, count);
    for (; lane < width; lane += L, hold += L, accumulate = true) strip<1>(shifted, count);
  }
};

// The list of a row of grad_output is the inputs of its nonzeros or of a block; in r x 1 blocks an input's list is the
// block's rows of grad_output. Either way the list's results lie side by side in grad.
template <typename T>
void sddmm(const Sddmm<T>& p) {
  // With 32 registers two panels go together: half the trees.
  const bool pairs = kPanelVectors <= 4 && p.width == kPanelVectors * kLanes<T>;
  const int64_t width = p.width;
  for_each_segment(p, pairs ? 2 : 1, [&](int64_t panel, int64_t r, int64_t first, int64_t last, bool) UASPARSE_LAMBDA {
    if (first == last) return;
    const T* dy = p.grad_output + panel * p.grad_panel + (p.begin + r) * p.bh * width;
    const T* in = p.input + panel * p.input_panel;
    const bool accumulate = p.accumulate || panel > 0, pair = pairs && panel + 1 < p.panels;
    if (p.bh == 1) {
      prefetch(dy + width, sizeof(T) * width);
      const int32_t* idx = p.idx + first;
      DotList<T> dots{dy, p.grad_panel, p.input_panel, width, p.grad + first, accumulate};
      dots.run(pair, [=](int64_t j) { return in + static_cast<uint32_t>(idx[j]) * width; }, last - first);
      return;
    }
    for (int64_t i = first; i < last; ++i) {
      const T* x = in + static_cast<uint32_t>(p.idx[i]) * p.bw * width;
      T* grad = p.grad + i * p.bh * p.bw;
      if (p.bw == 1) {
        DotList<T> dots{x, p.input_panel, p.grad_panel, width, grad, accumulate};
        dots.run(pair, [=](int64_t j) { return dy + j * width; }, p.bh);
        continue;
      }
      for (int64_t y = 0; y < p.bh; ++y) {
        DotList<T> dots{dy + y * width, p.grad_panel, p.input_panel, width, grad + y * p.bw, accumulate};
        dots.run(pair, [=](int64_t j) { return x + j * width; }, p.bw);
      }
    }
  });
}

}  // namespace
}  // namespace uasparse::UASPARSE_ISA
