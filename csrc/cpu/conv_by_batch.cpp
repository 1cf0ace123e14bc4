// masked_conv2d with one position of `lanes` images, or of strips of their rows, a vector. bfloat16 is packed as it lies
// where there are kernels for that (AVX512-BF16) and the weight is not in quads, else as float32.
//
// The batch is cut into tiles of as many images as have lanes; a smaller batch is cut into strips (Lanes). A task takes a tile (and a range of its rows or channels where there are
// more threads than tiles), walks down the rows in groups, packs what it meets (conv_window.h), and
//   forward      output rows      = product of the packed input with the weights            -> unpacked to the output
//   grad input   grad_input rows  = product of packed grad_output with the transposed ones  -> unpacked to grad_input
//   grad weight  dot products of the same packed grad_output with the packed input (SDDMM)

#include <limits>
#include <type_traits>
#include <utility>

#include "cpu/conv_pass.h"
#include "cpu/conv_window.h"

namespace uasparse {
namespace {

// Positions that a group of rows has at least, for long dot products. Packed bfloat16 has more where lanes are whole images, as
// long as the sums of all channels stay few: 16 positions of a plane are half a cache line, and planes are pages apart.
template <typename P>
int64_t group_positions(const ConvWeight& w, const Lanes& held) {
  constexpr int64_t kLeast = 16, kMost = 256, kSums = 1 << 15;
  if (!std::is_same_v<P, BFloat16> || held.strips > 1) return kLeast;
  return std::clamp(kSums / std::max(w.in * w.groups, w.out), kLeast, kMost);
}

// Bands of the rows of a tile, whose dot products are summed apart: so that threads need not all pack the whole tile. They
// must not depend on the threads, as other bands make other sums; none where these are many beside what is packed.
int64_t bands_of(const ConvWeight& w, int64_t tiles, int64_t positions, int64_t lanes) {
  constexpr int64_t kBands = 4, kPositions = 28, kPacked = 16;
  const int64_t packed = (w.in * w.groups + w.out) * positions * lanes;
  int64_t bands = 1;
  while (tiles * bands < kBands && positions >= 2 * bands * kPositions && packed >= bands * kPacked * w.nonzeros())
    bands *= 2;
  return bands;
}

// How a product cuts a group of rows into register tiles.
struct Tiling {
  int64_t rows, vectors;  // of a tile
  int64_t group;          // rows of a group

  Tiling(int64_t height, int64_t width, int max_vectors, int max_rows, int64_t positions) {
    const int64_t strips = ceil_div(width, max_vectors);
    vectors = ceil_div(width, strips);
    rows = strips > 1 ? 1 : std::clamp<int64_t>(max_vectors / width, 1, std::min<int64_t>(max_rows, height));
    rows = ceil_div(height, ceil_div(height, rows));  // no small rest
    group = std::min(height, ceil_div(std::max(rows, ceil_div(positions, width)), rows) * rows);
  }
};

template <typename P>
int64_t source_block(const Pass& pass, int64_t rows, int64_t vectors, int64_t lanes, double nonzeros_a_channel,
                     int64_t channels) {
  const int64_t phases = pass.source.channel / pass.source.phase;
  const int64_t bytes = sizeof(P) * lanes * (rows + pass.y.reach) * (vectors + pass.x.reach) * phases;
  return channels_a_block(bytes, nonzeros_a_channel, channels);
}

// destination rows (channels [begin, end) of the lists) from source rows.
template <typename Kernels, typename T, typename P, typename Lists>
void run_product(const Kernels& kernels, const Pass& pass, const Lists& lists, const Tiling& tiling, const P* source,
                 T* destination, int64_t rows, int64_t begin, int64_t end, const T* bias) {
  const int64_t width = pass.x.destination.length;
  for (int64_t r = 0; r < rows; r += tiling.rows)
    for (int64_t x = 0; x < width; x += tiling.vectors)
      for (int64_t b = 0; b < lists.blocks; ++b)
        multiply(kernels,
                 ConvProductOf<T, typename Lists::Entry, P>{
                     lists.entries(), lists.first(b), begin, end, source + r * pass.source.row + x * kernels.lanes,
                     pass.source.row, destination + r * pass.destination.row + x * kernels.lanes, pass.destination.row,
                     pass.destination.phase, b == 0, bias, int(std::min(tiling.rows, rows - r)),
                     int(std::min(tiling.vectors, width - x)), (std::min(tiling.vectors, width - x) - 1) * kernels.lanes,
                     lists.phases});
}

template <typename S>
Images<S> images_of(const at::Tensor& t) {
  // The cast drops const for outputs alone; inputs are taken as Images<const S>.
  return {static_cast<S*>(const_cast<void*>(t.const_data_ptr())), t.size(0),  t.size(1), t.stride(0), t.stride(1),
          t.stride(2),                                            t.stride(3)};
}

void check_offsets(const Pass& pass, int64_t rows) {
  TORCH_CHECK_VALUE(pass.source.row * (rows + pass.y.reach + 1) < std::numeric_limits<int32_t>::max(),
                    "masked_conv2d: an image row of ", pass.x.source.length, " columns and ", pass.source.channels,
                    " channels is too large for the sparse kernel; use the dense path (a dense weight).");
}

// Part `part` of the channels, whole groups of `together`.
std::pair<int64_t, int64_t> share(int64_t channels, int64_t together, int64_t part, int64_t parts) {
  const int64_t groups = channels / together;
  return {groups * part / parts * together, groups * (part + 1) / parts * together};
}

// sums[c] += sum of the packed row's channel c.
template <typename T, typename P>
void add_channel_sums(const P* row, const PackedLayout& layout, int64_t begin, int64_t end, T* sums) {
  for (int64_t c = begin; c < end; ++c) sums[c] += sum_of<T>(row + c * layout.channel, layout.channel);
}

template <typename T, typename S, typename P, typename Lists>
void forward_with(const Geometry& g, const ConvWeight& w, const at::Tensor& input, const at::Tensor& weight,
                  const std::vector<T>& bias, const at::Tensor& output) {
  const auto& kernels = kernels_of<T, P>();
  using Kernels = std::decay_t<decltype(kernels)>;
  const int64_t lanes = kernels.lanes;
  const Pass pass = g.forward(lanes);
  const Lanes held(g.batch, g.out_height, pass.y.reach, lanes);
  Tiling tiling(held.rows, g.out_width, Lists::max_vectors(kernels), kernels.max_rows, group_positions<P>(w, held));
  if (held.tiles(g.batch) * ceil_div(held.rows, tiling.group) < at::get_num_threads()) tiling.group = tiling.rows;
  check_offsets(pass, tiling.group);
  const int64_t block =
      source_block<P>(pass, tiling.rows, tiling.vectors, lanes, w.density() * double(w.taps), w.in);
  const auto lists = Lists::forward(w, pass.conv_taps(lanes), block, static_cast<const S*>(weight.const_data_ptr()));

  const int64_t tiles = held.tiles(g.batch), groups = ceil_div(held.rows, tiling.group);
  const int64_t parts = even_parts(tiles, groups);
  at::parallel_for(0, tiles * parts, 1, [&](int64_t first, int64_t last) {
    Window<Kernels, P, S> window(kernels, pass.y, pass.x, pass.source, held, images_of<const S>(input), tiling.group + pass.y.reach,
                        held.rows + pass.y.reach);
    RowMover<Kernels, T, S> mover(kernels, pass.y.destination, pass.x.destination, pass.destination, held,
                         images_of<S>(output));
    const Workspace rows(sizeof(T) * tiling.group * pass.destination.row);
    for (int64_t task = first; task < last; ++task) {
      const int64_t image = task / parts * held.images, part = task % parts;
      const int64_t begin = groups * part / parts * tiling.group;
      const int64_t end = std::min(held.rows, groups * (part + 1) / parts * tiling.group);
      window.restart(image, begin);
      for (int64_t y = begin; y < end; y += tiling.group) {
        const int64_t stop = std::min(end, y + tiling.group);
        run_product(kernels, pass, lists, tiling, window.rows(y, stop + pass.y.reach), rows.as<T>(), stop - y, 0,
                    lists.channels, bias.empty() ? nullptr : bias.data());
        mover.move(image, y, stop, rows.as<T>(),
                   [](const auto& k, const ConvMove<T>& m, S* const* images) { unpack_rows(k, m, images); });
      }
    }
  });
}

// Lists: of the gradient of the input; Places: of the weight's.
template <typename T, typename S, typename P, typename Lists, typename Places>
void backward_with(const Geometry& g, const ConvWeight& w, const at::Tensor& grad_output, const at::Tensor& input,
                   const at::Tensor& weight, const ConvGradients& gradients) {
  const auto& kernels = kernels_of<T, P>();
  using Kernels = std::decay_t<decltype(kernels)>;
  const int64_t lanes = kernels.lanes;
  const bool wants_input = gradients.input.defined(), wants_weight = gradients.weight.defined(), wants_bias = gradients.bias.defined();
  const Pass pass = g.backward(lanes), forward_pass = g.forward(lanes);
  // Rows of a strip: of grad_input (`rows`) and of grad_output (`out_rows`).
  const Lanes held(g.batch, std::max(pass.y.destination.length, g.out_height), pass.y.reach, lanes);
  const int64_t rows = std::min(held.rows, pass.y.destination.length), width = pass.x.destination.length;
  const int64_t out_rows = std::min(held.rows, g.out_height);
  // Row y of grad_input reads packed rows from y on, row y of grad_output is packed row y + lead.
  const int64_t ahead = std::max(pass.y.reach, pass.y.lead), height = std::max(rows, out_rows);
  const Tiling tiling(rows, width, Lists::max_vectors(kernels), kernels.max_rows, group_positions<P>(w, held));
  check_offsets(pass, tiling.group);
  check_offsets(forward_pass, tiling.group);
  const double density = w.density();

  // Lists for what is asked for; an empty pattern stands in for the rest.
  const NoWeight none(w);
  const ConvWeight& w_input = wants_input ? w : none.weight;
  const ConvWeight& w_weight = wants_weight ? w : none.weight;
  const int64_t out_a_group = w.out / w.groups;
  const int64_t input_block = source_block<P>(pass, tiling.rows, tiling.vectors, lanes,
                                              density * double(w.taps) / double(pass.destination_phases()), out_a_group);
  const auto lists =
      Lists::backward(w_input, pass.conv_taps(lanes), input_block, static_cast<const S*>(weight.const_data_ptr()));
  // Dot products of pieces of rows that registers hold, where these are many. More than two rows need more addresses than
  // there are registers, which pays where strides let the source outgrow L1.
  constexpr bool quads = std::is_same_v<Places, ConvQuadPlaces>, pairs = std::is_same_v<P, BFloat16>;
  const int64_t group_rows = std::min(tiling.group, out_rows);
  const int64_t most = piece_vectors(kernels, w), held_width = ceil_div(g.out_width, ceil_div(g.out_width, most));
  const int64_t held_rows = std::clamp<int64_t>(most / held_width, 1, std::min<int64_t>(kernels.max_rows, group_rows));
  const bool holds = pairs || (!quads && kernels.max_piece >= 16 && held_rows * held_width >= 10 &&
                               (held_rows <= 2 || g.stride[0] * g.stride[1] > 1));
  const int64_t piece = holds ? held_width : g.out_width, piece_rows = holds ? held_rows : group_rows;
  const int64_t weight_block = source_block<P>(forward_pass, piece_rows, piece, lanes, density * double(w.taps), w.in);
  const Places places(w_weight, forward_pass.conv_taps(lanes), weight_block);

  const int64_t tiles = held.tiles(g.batch);
  const int64_t bands = wants_weight || wants_bias ? bands_of(w, tiles, height * width, lanes) : 1, pieces = tiles * bands;
  PartialSums<T> sums(pieces, w_weight.nonzeros(), g.out);
  const int64_t chunks = sums.chunks, parts = sums.parts(g);
  at::parallel_for(0, chunks * parts, 1, [&](int64_t first, int64_t last) {
    Window<Kernels, P, S> grads(kernels, pass.y, pass.x, pass.source, held, images_of<const S>(grad_output),
                                tiling.group + ahead, height + ahead);
    Window<Kernels, P, S> inputs(kernels, forward_pass.y, forward_pass.x, forward_pass.source, held,
                                 images_of<const S>(input), tiling.group + forward_pass.y.reach,
                                 out_rows + forward_pass.y.reach);
    RowMover<Kernels, T, S> mover(kernels, pass.y.destination, pass.x.destination, pass.destination, held,
                         wants_input ? images_of<S>(gradients.input) : Images<S>{});
    const Workspace result(wants_input ? sizeof(T) * tiling.group * pass.destination.row : 0);
    int64_t next = -1;  // the piece below the one before
    for (int64_t task = first; task < last; ++task) {
      const int64_t chunk = task / parts, part = task % parts;
      const int64_t phases = pass.destination_phases();
      const auto [in_begin, in_end] = share(g.in, Lists::kTogether, part, parts);
      const auto [out_begin, out_end] = share(g.out, quads ? 4 : 1, part, parts);
      for (int64_t at = pieces * chunk / chunks; at < pieces * (chunk + 1) / chunks; ++at) {
        const int64_t image = at / bands * held.images, band = at % bands;
        const int64_t top = height * band / bands, bottom = height * (band + 1) / bands;
        // The band below goes on with the rows that are there.
        const bool fresh = band == 0 || at != next;
        next = at + 1;
        if (fresh) grads.restart(image, top);
        if (fresh && wants_weight) inputs.restart(image, top);
        for (int64_t y = top; y < bottom; y += tiling.group) {
          const int64_t stop = std::min(bottom, y + tiling.group);
          const P* packed = grads.rows(y, stop + ahead);
          if (wants_input && y < rows) {
            const int64_t count = std::min(stop, rows) - y;
            run_product(kernels, pass, lists, tiling, packed, result.as<T>(), count, in_begin / Lists::kTogether * phases,
                        in_end / Lists::kTogether * phases, static_cast<const T*>(nullptr));
            mover.move_channels(image, y, y + count, in_begin, in_end, result.as<T>(),
                                [](const auto& k, const ConvMove<T>& m, S* const* i) { unpack_rows(k, m, i); });
          }
          const int64_t begin = y, end = std::min(out_rows, stop);
          if (begin >= end) continue;
          const P* grad_rows = packed + pass.y.lead * pass.source.row;
          if (wants_weight) {
            const P* input_rows = inputs.rows(begin, end + forward_pass.y.reach);
            for (int64_t r = 0; r < end - begin; r += piece_rows)
              for (int64_t x = 0; x < g.out_width; x += piece)
                for (int64_t b = 0; b < places.blocks; ++b) {
                  const P* const source = input_rows + r * forward_pass.source.row + x * lanes;
                  const P* const grad = grad_rows + r * pass.source.row + (pass.x.lead + x) * lanes;
                  const int64_t count = std::min(piece_rows, end - begin - r), vectors = std::min(piece, g.out_width - x);
                  if constexpr (quads)
                    kernels.quad_sddmm({places.offset(), places.first() + b, places.blocks, out_begin / 4, out_end / 4,
                                        source, forward_pass.source.row, grad, pass.source.row, pass.source.channel,
                                        count, vectors, (vectors - 1) * lanes, 0, sums.weight(chunk)});
                  else if (pairs || holds)
                    kernels.piece_sddmm({places.offset(), places.first() + b, places.blocks, out_begin, out_end, source,
                                         forward_pass.source.row, grad, pass.source.row, pass.source.channel, int(count),
                                         int(vectors), (vectors - 1) * lanes, 0, sums.weight(chunk)});
                  else if constexpr (!pairs)
                    kernels.sddmm({places.offset(), places.first() + b, places.blocks, out_begin, out_end, source,
                                   forward_pass.source.row, grad, pass.source.row, pass.source.channel, count, vectors,
                                   sums.weight(chunk)});
                }
          }
          if (wants_bias)
            for (int64_t r = 0; r < end - begin; ++r)
              add_channel_sums(grad_rows + r * pass.source.row, pass.source, out_begin, out_end,
                               sums.bias(chunk));
        }
      }
    }
  });

  sums.template finish<S>(places, gradients);
}

}  // namespace

template <typename T, typename S>
void forward_by_batch(const Geometry& g, const ConvWeight& w, const at::Tensor& input, const at::Tensor& weight,
                      const std::vector<T>& bias, const at::Tensor& output) {
  if (ConvQuads<T>::can_forward(w)) return forward_with<T, S, T, ConvQuads<T>>(g, w, input, weight, bias, output);
  if constexpr (std::is_same_v<S, BFloat16>)
    if (conv_bf16_kernels()) return forward_with<T, S, S, ConvEntries<T>>(g, w, input, weight, bias, output);
  forward_with<T, S, T, ConvEntries<T>>(g, w, input, weight, bias, output);
}

template <typename T, typename S>
void backward_by_batch(const Geometry& g, const ConvWeight& w, const at::Tensor& grad_output, const at::Tensor& input,
                       const at::Tensor& weight, const ConvGradients& gradients) {
  // Blocks b x b are quads both ways, r x 1 in their rows alone.
  if (ConvQuads<T>::can_backward(w))
    return backward_with<T, S, T, ConvQuads<T>, ConvQuadPlaces>(g, w, grad_output, input, weight, gradients);
  if (ConvQuads<T>::can_forward(w))
    return backward_with<T, S, T, ConvEntries<T>, ConvQuadPlaces>(g, w, grad_output, input, weight, gradients);
  if constexpr (std::is_same_v<S, BFloat16>)
    if (conv_bf16_kernels())
      return backward_with<T, S, S, ConvEntries<T>, ConvPlaces>(g, w, grad_output, input, weight, gradients);
  backward_with<T, S, T, ConvEntries<T>, ConvPlaces>(g, w, grad_output, input, weight, gradients);
}

template void forward_by_batch<float, float>(const Geometry&, const ConvWeight&, const at::Tensor&, const at::Tensor&,
                                             const std::vector<float>&, const at::Tensor&);
template void forward_by_batch<float, BFloat16>(const Geometry&, const ConvWeight&, const at::Tensor&,
                                                const at::Tensor&, const std::vector<float>&, const at::Tensor&);
template void forward_by_batch<double, double>(const Geometry&, const ConvWeight&, const at::Tensor&, const at::Tensor&,
                                               const std::vector<double>&, const at::Tensor&);
template void backward_by_batch<float, float>(const Geometry&, const ConvWeight&, const at::Tensor&, const at::Tensor&,
                                              const at::Tensor&, const ConvGradients&);
template void backward_by_batch<float, BFloat16>(const Geometry&, const ConvWeight&, const at::Tensor&,
                                                 const at::Tensor&, const at::Tensor&, const ConvGradients&);
template void backward_by_batch<double, double>(const Geometry&, const ConvWeight&, const at::Tensor&,
                                                const at::Tensor&, const at::Tensor&, const ConvGradients&);

}  // namespace uasparse
