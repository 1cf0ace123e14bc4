// What serve_run is given, checked before a step runs (serve_checks.cpp).
#pragma once

#include <ATen/core/Tensor.h>

namespace uasparse {

// Every place that the plan reads or writes lies in its tensors, and nothing that is written is read as a position.
// What the plan says is looked at once (remembered.h); later calls compare sizes and addresses. ValueError, TypeError else.
void check_serve(const at::Tensor& arena, const at::Tensor& program, const at::Tensor& ints, const at::Tensor& values,
                 at::TensorList inputs, at::TensorList outputs);

}  // namespace uasparse
