// Runs csrc/cuda/masked_linear.cu. Per case (int64 all): type, rows, columns, nnz, tokens, stride_x, processors,
// shared_bytes, lane_tokens, panel_units, bias, offset (bytes by which index and values miss 16); then offsets, index,
// values, bias, x [tokens, stride_x], dy [tokens, rows] -> y [tokens, rows], the sampled product [nnz].

#include <cstring>

#include "cuda/masked_linear.h"
#include "streams.h"

namespace {

// Input at a place that misses the alignment of an allocation.
Array read_at(size_t offset, size_t bytes) {
  Array array(offset + bytes);
  const Array read = Array::read(bytes);
  std::memcpy(array.as<char>() + offset, read.as<char>(), bytes);
  return array;
}

}  // namespace

int main() {
  using namespace uasparse;
  while (more_cases()) {
    SparseProblem p{};
    p.type = static_cast<ValueType>(read_one<int64_t>());
    p.rows = read_one<int64_t>();
    p.columns = read_one<int64_t>();
    p.nnz = read_one<int64_t>();
    p.tokens = read_one<int64_t>();
    p.stride_x = read_one<int64_t>();
    p.processors = static_cast<int>(read_one<int64_t>());
    p.shared_bytes = static_cast<int>(read_one<int64_t>());
    p.lane_tokens = static_cast<int>(read_one<int64_t>());
    p.panel_units = static_cast<int>(read_one<int64_t>());
    const bool has_bias = read_one<int64_t>() != 0;
    const auto offset = static_cast<size_t>(read_one<int64_t>());
    const size_t item = p.type == ValueType::kFloat ? 4 : 2, rows = static_cast<size_t>(p.rows);
    const auto nnz = static_cast<size_t>(p.nnz), tokens = static_cast<size_t>(p.tokens);
    const Array offsets = Array::read(4 * (rows + 1)), index = read_at(offset, 4 * nnz),
                values = read_at(offset, item * nnz), bias = Array::read(item * rows),
                x = Array::read(item * tokens * static_cast<size_t>(p.stride_x)), dy = Array::read(item * tokens * rows);
    p.offsets = offsets.as<int32_t>();
    p.index = reinterpret_cast<const int32_t*>(index.as<char>() + offset);
    p.x = x.as<void>();
    const Array y(item * tokens * rows), out(item * nnz), forward(sparse_workspace_bytes(p, false)),
        backward(sparse_workspace_bytes(p, true));
    must(launch_sparse_product(p, values.as<char>() + offset, has_bias ? bias.as<void>() : nullptr, y.as<void>(), p.rows,
                               forward.as<void>(), nullptr) == cudaSuccess);
    if (nnz)
      must(launch_sampled_product(p, dy.as<void>(), p.rows, out.as<void>(), backward.as<void>(), nullptr) == cudaSuccess);
    y.write();
    out.write();
  }
}
