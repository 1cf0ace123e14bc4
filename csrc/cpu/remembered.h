// What a pass over tensors found out, kept for as long as they stay as they were: the memory behind verified.h.
//
// That a tensor was looked at is remembered by the tensor itself (held weakly, so that another one at a reused address is
// never taken for it), its version, storage, address and size, and a few of its entries. Inference tensors have no version:
// nothing is remembered of them. Safe to call from any thread.
#pragma once

#include <ATen/core/Tensor.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <mutex>
#include <optional>
#include <unordered_map>
#include <utility>

namespace uasparse {

// A tensor as it was when it was looked at.
class Seen {
 public:
  explicit Seen(const at::Tensor& tensor)
      : impl_(tensor.getIntrusivePtr()), storage_(tensor.storage().getWeakStorageImpl()), data_(tensor.const_data_ptr()),
        size_(tensor.numel()), version_(tensor.unsafeGetTensorImpl()->version_counter().current_version()),
        entries_(sample(tensor)) {}

  bool is(const at::Tensor& tensor) const {
    const c10::TensorImpl* now = tensor.unsafeGetTensorImpl();
    return impl_._unsafe_get_target() == now && now->version_counter().current_version() == version_ &&
           storage_._unsafe_get_target() == tensor.storage().unsafeGetStorageImpl() &&
           tensor.const_data_ptr() == data_ && tensor.numel() == size_ && sample(tensor) == entries_;
  }

  bool gone() const { return impl_.expired(); }

 private:
  static constexpr int64_t kSamples = 4;

  // A mix of a few entries.
  static uint64_t sample(const at::Tensor& tensor) {
    const int64_t n = tensor.numel();
    const auto mix = [n](const auto* data) {
      uint64_t sum = 0;
      if (n > 0)
        for (int64_t i = 0; i < kSamples; ++i)
          sum = (sum ^ static_cast<uint64_t>(data[(n - 1) * (2 * i + 1) / (2 * kSamples)])) * 0x9e3779b97f4a7c15u;
      return sum;
    };
    switch (tensor.element_size()) {
      case 2: return mix(static_cast<const uint16_t*>(tensor.const_data_ptr()));
      case 4: return mix(static_cast<const uint32_t*>(tensor.const_data_ptr()));
      default: return mix(static_cast<const uint64_t*>(tensor.const_data_ptr()));
    }
  }

  c10::weak_intrusive_ptr<c10::TensorImpl> impl_;
  c10::weak_intrusive_ptr<c10::StorageImpl> storage_;
  const void* data_;
  int64_t size_;
  uint32_t version_;
  uint64_t entries_;
};

template <size_t N>
using Tensors = std::array<const at::Tensor*, N>;

// What was found of N tensors and a number, by the first of them.
template <size_t N, typename Found>
class Remembered {
 public:
  // What find() says of them, or said before. What find() throws is not remembered.
  template <typename Find>
  Found get(const Tensors<N>& tensors, int64_t number, Find find) {
    const bool versioned = std::none_of(tensors.begin(), tensors.end(), [](const auto* t) { return t->is_inference(); });
    if (!versioned) return find();
    if (std::optional<Found> known = recall(tensors, number)) return *std::move(known);
    // Looked at before: what another thread writes meanwhile must not pass for what was found.
    auto seen = look(tensors, std::make_index_sequence<N>());
    Found found = find();
    keep(tensors, Entry{std::move(seen), number, found});
    return found;
  }

 private:
  struct Entry {
    std::array<Seen, N> seen;
    int64_t number;
    Found found;
  };

  std::optional<Found> recall(const Tensors<N>& tensors, int64_t number) {
    const std::lock_guard<std::mutex> lock(mutex_);
    const auto place = entries_.find(tensors[0]->unsafeGetTensorImpl());
    if (place == entries_.end() || place->second.number != number) return std::nullopt;
    for (size_t i = 0; i < N; ++i)
      if (!place->second.seen[i].is(*tensors[i])) return std::nullopt;
    return place->second.found;
  }

  void keep(const Tensors<N>& tensors, Entry entry) {
    const std::lock_guard<std::mutex> lock(mutex_);
    // Those whose tensor is gone leave at once: what was found of them may be as large as the tensor.
    std::erase_if(entries_, [](const auto& entry) { return entry.second.seen[0].gone(); });
    entries_.insert_or_assign(tensors[0]->unsafeGetTensorImpl(), std::move(entry));
  }

  template <size_t... I>
  static std::array<Seen, N> look(const Tensors<N>& tensors, std::index_sequence<I...>) {
    return {Seen(*tensors[I])...};
  }

  std::mutex mutex_;
  std::unordered_map<const c10::TensorImpl*, Entry> entries_;
};

}  // namespace uasparse
