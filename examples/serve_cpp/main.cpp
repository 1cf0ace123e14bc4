// Runs a network that optimized.package("net.pt2") wrote, without Python (docs/serving.md):
//   serve _C_torch*.abi3.so net.pt2 1 3 224 224 < image.f32 > logits.f32      numbers are float32, as in memory

#include <ATen/ops/empty.h>
#include <dlfcn.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>

#include <cstdlib>
#include <iostream>
#include <string>
#include <vector>

// Whether this machine has the instructions of one of the kernels' sets.
static bool has(const std::string& isa) {
#if defined(__x86_64__)
  if (isa == "avx512") return __builtin_cpu_supports("x86-64-v4");
  if (isa == "avx2") return __builtin_cpu_supports("x86-64-v3");
#endif
  return isa == "portable";
}

int main(int count, char** arguments) try {
  if (count < 4) throw std::runtime_error("usage: serve _C_torch*.abi3.so net.pt2 SIZE... < input > output");
  // The ops of uasparse_kernels register themselves.
  if (dlopen(arguments[1], RTLD_NOW | RTLD_GLOBAL) == nullptr) throw std::runtime_error(dlerror());
  // Without it a package takes inputs of other sizes than its own unseen.
  setenv("AOTI_RUNTIME_CHECK_INPUTS", "1", 1);
  // A package is machine code, which is not to be loaded where it cannot run.
  const auto about = torch::inductor::AOTIModelPackageLoader::load_metadata_from_package(arguments[2], "model");
  const auto isa = about.find("uasparse_isa");
  if (isa == about.end() || !has(isa->second))
    throw std::runtime_error(std::string(arguments[2]) + ": expected a package for this machine, got one for " +
                             (isa == about.end() ? "another program" : isa->second));
  torch::inductor::AOTIModelPackageLoader network(arguments[2]);

  std::vector<int64_t> sizes;
  for (int i = 3; i < count; ++i) sizes.push_back(std::stoll(arguments[i]));
  at::Tensor input = at::empty(sizes, at::kFloat);
  std::cin.read(static_cast<char*>(input.mutable_data_ptr()), static_cast<std::streamsize>(input.nbytes()));
  if (std::cin.gcount() != static_cast<std::streamsize>(input.nbytes())) throw std::runtime_error("input is cut short");

  for (const at::Tensor& output : network.run({input})) {
    const at::Tensor whole = output.contiguous();
    std::cout.write(static_cast<const char*>(whole.const_data_ptr()), static_cast<std::streamsize>(whole.nbytes()));
  }
  return std::cout.flush() ? 0 : 1;
} catch (const std::exception& error) {
  std::cerr << "serve: " << error.what() << '\n';
  return 1;
}
