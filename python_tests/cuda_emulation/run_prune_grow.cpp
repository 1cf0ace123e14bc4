// Runs csrc/cuda/prune_grow.cu. Per case (int64 all): rows, columns, positions, width, blocks, block_rows, block_columns, k,
// bytes, first, n; then crow, col, dropped, grown, packed values, dense values, scores (float, [n]) -> crow, col, ccol, row,
// perm, packed values, dense values (those dropped or grown zeroed, but those that are both), scores.

#include <algorithm>
#include <numeric>
#include <utility>

#include "cuda/prune_grow.h"
#include "streams.h"

int main() {
  using namespace uasparse;
  const auto ok = [](cudaError_t error) { must(error == cudaSuccess); };
  while (more_cases()) {
    Topology topology{};
    topology.rows = read_one<int64_t>();
    topology.columns = read_one<int64_t>();
    const int64_t positions = read_one<int64_t>(), width = read_one<int64_t>();
    topology.blocks = read_one<int64_t>();
    const int64_t block_rows = read_one<int64_t>(), block_columns = read_one<int64_t>(), k = read_one<int64_t>();
    const int64_t bytes = read_one<int64_t>(), first = read_one<int64_t>(), n = read_one<int64_t>();
    const int64_t size = block_rows * block_columns;
    const Array crow = Array::read(4 * (topology.rows + 1)), col = Array::read(4 * topology.blocks),
                dropped = Array::read(8 * k), grown = Array::read(8 * k),
                values = Array::read(bytes * topology.blocks * size),
                dense = Array::read(bytes * topology.rows * topology.columns * size), scores = Array::read(4 * n);
    topology.crow = crow.as<int32_t>();
    topology.col = col.as<int32_t>();
    ok(launch_exclude_kept(scores.as<void>(), false, first, n, topology, dropped.as<int64_t>(), k, nullptr));

    const Array from(8 * k), to(8 * k), source(4 * topology.blocks), new_col(4 * topology.blocks), old(values.bytes);
    ok(launch_change_rows(topology,
                          {dropped.as<int64_t>(), grown.as<int64_t>(), k, from.as<int64_t>(), to.as<int64_t>(),
                           source.as<int32_t>(), new_col.as<int32_t>()},
                          nullptr));
    ok(launch_move_values(values.as<void>(), old.as<void>(), source.as<int32_t>(), topology.blocks, size,
                          static_cast<int>(bytes), nullptr));
    const int64_t channels = topology.columns / positions * block_columns;
    const DenseTensor tensor{dense.as<void>(), static_cast<int>(bytes),
                             {channels * positions, positions, positions > 1 ? width : 0, positions > 1 ? 1 : 0}, width,
                             positions};
    for (const auto& [list, stay] : {std::pair{&dropped, &grown}, std::pair{&grown, &dropped}})
      ok(launch_zero_blocks(tensor, list->as<int64_t>(), stay->as<int64_t>(), k, topology.columns, static_cast<int>(block_rows),
                            static_cast<int>(block_columns), nullptr));

    const Array place(8 * topology.blocks), sorted(4 * topology.blocks);  // torch sorts, on the device
    std::iota(place.as<int64_t>(), place.as<int64_t>() + topology.blocks, int64_t{0});
    std::stable_sort(place.as<int64_t>(), place.as<int64_t>() + topology.blocks,
                     [&](int64_t a, int64_t b) { return topology.col[a] < topology.col[b]; });
    for (int64_t i = 0; i < topology.blocks; ++i) sorted.as<int32_t>()[i] = topology.col[place.as<int64_t>()[i]];
    const Array ccol(4 * (topology.columns + 1)), row(4 * topology.blocks), perm(4 * topology.blocks);
    ok(launch_write_columns(topology, sorted.as<int32_t>(), place.as<int64_t>(), ccol.as<int32_t>(), row.as<int32_t>(),
                            perm.as<int32_t>(), nullptr));
    for (const Array* result : {&crow, &col, &ccol, &row, &perm, &values, &dense, &scores}) result->write();
  }
}
