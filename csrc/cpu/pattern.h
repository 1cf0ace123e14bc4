// pack and unpack of pattern.cpp, for the ops of the CPU.
#pragma once

#include <ATen/core/Tensor.h>

namespace uasparse {

at::Tensor pack(const at::Tensor& dense, const at::Tensor& crow, const at::Tensor& col, at::IntArrayRef block);
at::Tensor unpack(const at::Tensor& values, const at::Tensor& crow, const at::Tensor& col, at::IntArrayRef shape,
                  at::IntArrayRef block);

}  // namespace uasparse
