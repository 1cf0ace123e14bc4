// Whether a tensor is what it was: how what was found out about pattern tensors is kept until they change (verified.h says
// what that notices and what it can't).
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>

namespace uasparse {

// A mix of a few entries.
inline uint64_t sample_of(const at::Tensor& tensor) {
  const int64_t n = tensor.numel();
  constexpr int64_t kSamples = 4;
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

// A tensor as it was when it was looked at, held weakly: another one at a reused address is never taken for it.
struct Seen {
  c10::weak_intrusive_ptr<c10::TensorImpl> impl;
  c10::weak_intrusive_ptr<c10::StorageImpl> storage;
  const void* data;
  int64_t size;
  uint32_t version;
  uint64_t entries;

  explicit Seen(const at::Tensor& tensor)
      : impl(tensor.getIntrusivePtr()), storage(tensor.storage().getWeakStorageImpl()), data(tensor.const_data_ptr()),
        size(tensor.numel()), version(tensor.unsafeGetTensorImpl()->version_counter().current_version()),
        entries(sample_of(tensor)) {}

  bool is(const at::Tensor& tensor) const {
    const c10::TensorImpl* now = tensor.unsafeGetTensorImpl();
    return impl._unsafe_get_target() == now && now->version_counter().current_version() == version &&
           storage._unsafe_get_target() == tensor.storage().unsafeGetStorageImpl() &&
           tensor.const_data_ptr() == data && tensor.numel() == size && sample_of(tensor) == entries;
  }
};

}  // namespace uasparse
