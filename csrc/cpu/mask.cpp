// mask_ on the CPU: inactive entries of a dense tensor become zero.
//
// A layer calls it before every forward pass with a dense-stored weight. Nearly always all of them are zero already, so
// the tensor is read, a chunk at a time, and written only where one is not: a pass that dirties no line.

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <torch/library.h>

#include <algorithm>
#include <cstdint>

namespace uasparse {
namespace {

constexpr int64_t kChunk = 2048;

template <typename Word>
bool is_clean(const Word* __restrict words, const uint8_t* __restrict active, int64_t count) {
  Word outside = 0;
  for (int64_t i = 0; i < count; ++i) outside |= words[i] & (Word(active[i] & 1) - Word(1));
  return outside == 0;
}

template <typename Word>
void clear(Word* __restrict words, const uint8_t* __restrict active, int64_t count) {
  for (int64_t i = 0; i < count; ++i) words[i] &= Word(0) - Word(active[i] & 1);
}

template <typename Word>
void mask(Word* words, const uint8_t* active, int64_t size, bool sampled) {
  if (sampled) {
    constexpr int64_t runs = 8, length = 64;
    bool clean = true;
    for (int64_t i = 0; i < runs; ++i) {
      const int64_t start = size * i / runs;
      clean = clean && is_clean(words + start, active + start, std::min(length, size - start));
    }
    if (clean) return;
  }
  at::parallel_for(0, (size + kChunk - 1) / kChunk, 16, [&](int64_t begin, int64_t end) {
    for (int64_t start = begin * kChunk; start < std::min(size, end * kChunk); start += kChunk) {
      const int64_t count = std::min(kChunk, size - start);
      if (!is_clean(words + start, active + start, count)) clear(words + start, active + start, count);
    }
  });
}

void mask_(at::Tensor dense, const at::Tensor& active, bool sampled) {
  TORCH_CHECK_TYPE(active.scalar_type() == at::kBool, "mask_: expected a bool mask, got ", active.scalar_type(), ".");
  TORCH_CHECK_VALUE(dense.sizes() == active.sizes() && dense.is_contiguous() && active.is_contiguous() &&
                        dense.device() == active.device(),
                    "mask_: expected a contiguous tensor and mask of one shape on one device, got ", dense.sizes(), " and ",
                    active.sizes(), ".");
  void* data = dense.mutable_data_ptr();
  const auto* bytes = static_cast<const uint8_t*>(active.const_data_ptr());
  switch (dense.element_size()) {
    case 1: return mask(static_cast<uint8_t*>(data), bytes, dense.numel(), sampled);
    case 2: return mask(static_cast<uint16_t*>(data), bytes, dense.numel(), sampled);
    case 4: return mask(static_cast<uint32_t*>(data), bytes, dense.numel(), sampled);
    case 8: return mask(static_cast<uint64_t*>(data), bytes, dense.numel(), sampled);
    default: TORCH_CHECK_TYPE(false, "mask_: expected elements of 1, 2, 4 or 8 bytes, got ", dense.element_size(), ".");
  }
}

}  // namespace

TORCH_LIBRARY_IMPL(uasparse, CPU, m) { m.impl("mask_", &mask_); }

}  // namespace uasparse
