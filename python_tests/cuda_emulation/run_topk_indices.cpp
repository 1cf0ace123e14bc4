// Runs csrc/cuda/topk_indices.cu: per case segments, is_double, largest, magnitude (int64), then n and k of each segment,
// then the scores of each -> the indices of each.

#include "cuda/topk_indices.h"
#include "streams.h"

int main() {
  using namespace uasparse;
  while (more_cases()) {
    TopkArguments arguments{};
    arguments.segments = static_cast<int>(read_one<int64_t>());
    arguments.is_double = read_one<int64_t>() != 0;
    arguments.largest = read_one<int64_t>() != 0;
    arguments.magnitude = read_one<int64_t>() != 0;
    for (int s = 0; s < arguments.segments; ++s) {
      arguments.segment[s].n = read_one<int64_t>();
      arguments.segment[s].k = read_one<int64_t>();
    }
    std::vector<Array> scores, indices;
    for (int s = 0; s < arguments.segments; ++s) {
      scores.push_back(Array::read(static_cast<size_t>(arguments.segment[s].n) * (arguments.is_double ? 8 : 4)));
      indices.emplace_back(static_cast<size_t>(arguments.segment[s].k) * 8);
      arguments.segment[s].scores = scores[s].as<void>();
      arguments.segment[s].indices = indices[s].as<int64_t>();
    }
    const Array workspace(topk_workspace_bytes(arguments));
    must(launch_topk(arguments, workspace.as<void>(), nullptr) == cudaSuccess);
    for (const Array& one : indices) one.write();
  }
}
