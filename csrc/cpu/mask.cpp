// A dense tensor and the mask of its pattern on the CPU: is_masked looks whether inactive entries are zero, mask_ makes them.
//
// A layer asks before every forward pass with a dense-stored weight. Nearly always all of them are zero already, so that
// pass only reads. The gradient's entries nearly never are: it is written at once.

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <torch/library.h>

#include <algorithm>
#include <atomic>
#include <cstdint>

#include "checks.h"

namespace uasparse {
namespace {

constexpr int64_t kChunk = 2048;

template <typename Word>
bool is_clean(const Word* __restrict words, const uint8_t* __restrict active, int64_t count) {
  Word outside = 0;
  for (int64_t i = 0; i < count; ++i) outside |= words[i] & (Word(active[i] & 1) - Word(1));
  return outside == 0;
}

// In bits: -0.0 outside of the pattern counts as written, and NaN as well.
template <typename Word>
bool are_clean(const Word* words, const uint8_t* active, int64_t size, bool sampled) {
  if (sampled) {
    // Other places each time, so that what is left unseen once is seen some time. They are scattered (a step of the
    // golden ratio, mixed): layers that take turns must not each see the same ones again.
    static std::atomic<uint64_t> calls{0};
    constexpr int64_t runs = 8, length = 64;
    uint64_t draw = calls.fetch_add(1, std::memory_order_relaxed) * 0x9E3779B97F4A7C15u;
    draw = (draw ^ (draw >> 32)) * 0xD6E8FEB86659FD93u;
    for (int64_t i = 0; i < runs; ++i) {
      const int64_t first = size * i / runs, places = size * (i + 1) / runs - first;
      const int64_t pieces = (places + length - 1) / length;
      if (pieces == 0) continue;
      const int64_t start = first + length * int64_t((draw >> 32) % uint64_t(pieces));
      if (!is_clean(words + start, active + start, std::min(length, size - start))) return false;
    }
    return true;
  }
  std::atomic<bool> clean{true};
  at::parallel_for(0, (size + kChunk - 1) / kChunk, 16, [&](int64_t begin, int64_t end) {
    for (int64_t start = begin * kChunk; start < std::min(size, end * kChunk) && clean; start += kChunk)
      if (!is_clean(words + start, active + start, std::min(kChunk, size - start))) clean = false;
  });
  return clean;
}

template <typename Word>
void clear(Word* data, const uint8_t* mask, int64_t size) {
  at::parallel_for(0, (size + kChunk - 1) / kChunk, 16, [&](int64_t begin, int64_t end) {
    Word* __restrict words = data;
    const uint8_t* __restrict active = mask;
    for (int64_t i = begin * kChunk; i < std::min(size, end * kChunk); ++i) words[i] &= Word(0) - Word(active[i] & 1);
  });
}

void check(const char* op, const at::Tensor& dense, const at::Tensor& active) {
  TORCH_CHECK_TYPE(active.scalar_type() == at::kBool, op, ": expected a bool mask, got ", active.scalar_type(), ".");
  TORCH_CHECK_VALUE(dense.sizes() == active.sizes() && dense.is_contiguous() && active.is_contiguous() &&
                        dense.device() == active.device(),
                    op, ": expected a contiguous tensor and mask of one shape on one device, got ", dense.sizes(), " and ",
                    active.sizes(), ".");
  check_storage(dense, "tensor");
  check_storage(active, "mask");
}

// Calls run(word), of the unsigned integer that has the size of an element.
template <typename Run>
auto as_words(const char* op, int64_t element_size, Run run) {
  switch (element_size) {
    case 1: return run(uint8_t{});
    case 2: return run(uint16_t{});
    case 4: return run(uint32_t{});
    case 8: return run(uint64_t{});
    default: TORCH_CHECK_TYPE(false, op, ": expected elements of 1, 2, 4 or 8 bytes, got ", element_size, ".");
  }
}

bool is_masked(const at::Tensor& dense, const at::Tensor& active, bool sampled) {
  check("is_masked", dense, active);
  return as_words("is_masked", dense.element_size(), [&]<typename Word>(Word) {
    return are_clean(static_cast<const Word*>(dense.const_data_ptr()),
                     static_cast<const uint8_t*>(active.const_data_ptr()), dense.numel(), sampled);
  });
}

void mask_(at::Tensor dense, const at::Tensor& active) {
  check("mask_", dense, active);
  check_output(dense, "tensor");
  as_words("mask_", dense.element_size(), [&]<typename Word>(Word) {
    clear(static_cast<Word*>(dense.mutable_data_ptr()), static_cast<const uint8_t*>(active.const_data_ptr()),
          dense.numel());
  });
}

}  // namespace

TORCH_LIBRARY_IMPL(uasparse, CPU, m) {
  m.impl("is_masked", &is_masked);
  m.impl("mask_", &mask_);
}

}  // namespace uasparse
