// Kernel launches as plain function calls. The <<<...>>> of CUDA C++ would keep a host compiler from reading these files,
// and the tests run them with one (python_tests/cuda_emulation).
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace uasparse {

template <typename... Parameters, typename... Arguments>
cudaError_t launch_shared(void (*kernel)(Parameters...), int64_t blocks, int threads, int shared_bytes,
                          cudaStream_t stream, Arguments... arguments) {
  if (blocks > INT32_MAX) return cudaErrorInvalidValue;
  if (shared_bytes > 40 << 10) {  // with what the kernel has of its own, more than the 48 KB that need no asking
    const cudaError_t error = cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                                                   cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes);
    if (error != cudaSuccess) return error;
  }
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(blocks));
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.dynamicSmemBytes = static_cast<size_t>(shared_bytes);
  config.stream = stream;
  return cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(arguments)...);
}

template <typename... Parameters, typename... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), int64_t blocks, int threads, cudaStream_t stream,
                   Arguments... arguments) {
  return launch_shared(kernel, blocks, threads, 0, stream, arguments...);
}

// Stops a launcher at its first error.
#define UASPARSE_CUDA_TRY(call)                              \
  do {                                                       \
    const cudaError_t uasparse_error = (call);               \
    if (uasparse_error != cudaSuccess) return uasparse_error; \
  } while (0)

}  // namespace uasparse
