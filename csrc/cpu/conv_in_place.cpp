// masked_conv2d of one tap, stride 1 and no padding: nothing is packed.
//
// Such a kernel meets every position once, and where it is. So a vector holds neighbouring positions of a plane, whatever
// its rows, and a register tile is a piece of a plane, or several small planes. Packing the source, which 3x3 kernels pay
// for by nine taps, would cost as much as the products (docs/cpu-kernels.md, "What was tried"). bfloat16 goes so too where
// there are kernels for it and the weight is not in quads.
//
// T: the type of sums; S: of maps and weights.

#include <cmath>
#include <limits>
#include <numeric>

#include "cpu/conv_pass.h"

namespace uasparse {
namespace {

// Positions that a kernel takes together: `images` whole planes, or a piece of one, in vectors.
struct Tile {
  Tile(int64_t positions, int64_t lanes, int64_t max_vectors, int64_t max_images)
      : positions(positions),
        lanes(lanes),
        plane(ceil_div(positions, lanes)),
        piece(ceil_div(plane, ceil_div(plane, max_vectors))),
        images(std::clamp<int64_t>(max_vectors / plane, 1, max_images)) {}
  int64_t vectors() const { return images * piece; }

  // Of the piece from vector v on: its vectors, where the last of them begins (it ends with the plane), and how many of
  // its numbers are in the vector before too.
  int64_t vectors_at(int64_t v) const { return std::min(piece, plane - v); }
  int64_t last_at(int64_t v) const { return std::min((v + vectors_at(v)) * lanes, positions) - lanes - v * lanes; }
  int64_t known_at(int64_t v) const { return (vectors_at(v) - 1) * lanes - last_at(v); }

  const int64_t positions, lanes;
  int64_t plane, piece, images;
};

// Vectors of a piece at least: with fewer, an entry's own cost weighs more than what L1 gains.
template <typename T>
int64_t least_piece(const ConvKernels<T>& kernels) {
  constexpr int64_t kBytes = 512;
  return std::min<int64_t>(kBytes / (int64_t(sizeof(T)) * kernels.lanes), kernels.max_vectors);
}
int64_t least_piece(const ConvBf16Kernels& kernels) { return kernels.max_vectors; }

// And at most. Registers hold max_vectors, but where weights are few no more leave room in L1 for the channels of 20 nonzeros
// an output. Quads are the other way: where an output has fewer in all of its channels, several tiles of registers a visit.
constexpr double kNonzeros = 20;
template <typename Kernels, typename T>
int64_t max_piece(const Kernels& kernels, double density, int64_t, const ConvEntries<T>*) {
  constexpr double kL1Bytes = 32 << 10;
  const double few = kL1Bytes * density / kNonzeros / double(int64_t(sizeof(T)) * kernels.lanes);
  return std::clamp<int64_t>(int64_t(std::ceil(few)), least_piece(kernels), kernels.max_vectors);
}
template <typename T>
int64_t max_piece(const ConvKernels<T>& kernels, double density, int64_t channels, const ConvQuads<T>*) {
  const int64_t bytes = density * double(channels) >= kNonzeros ? 384 : 1152;
  const int64_t registers = int64_t(sizeof(T)) * kernels.lanes * kernels.max_quad_vectors;
  return std::max<int64_t>(1, bytes / registers) * kernels.max_quad_vectors;
}

// For sources of so many channels.
template <typename Lists, typename Kernels>
Tile product_tile(const Geometry& g, const Kernels& kernels, double density, int64_t channels) {
  return Tile(g.height * g.width, kernels.lanes, max_piece(kernels, density, channels, static_cast<const Lists*>(nullptr)),
              std::min<int64_t>(kernels.max_rows, g.batch));
}

template <typename T, typename S>
bool can(const Geometry& g, const at::Tensor& source, const at::Tensor& other) {
  return has_kernels<S>() && g.batch > 0 && g.is_one_tap() && g.height * g.width >= kernels_of<T, S>().lanes &&
         has_plain_planes(source) && has_plain_planes(other) &&
         source.size(1) * source.stride(1) <= std::numeric_limits<int32_t>::max();
}

// Where planes are so small that even several leave half of the least piece idle, conv_by_space.cpp is quicker; where one
// with a rest leaves a third of it idle, conv_by_batch.cpp. bfloat16 has no other way than that, whose packing is dearer.
template <typename S, typename Lists, typename Kernels>
bool is_filled(const Tile& tile, const Kernels& kernels) {
  if (std::is_same_v<S, BFloat16>) return true;
  const int64_t least = std::min<int64_t>(Lists::max_vectors(kernels), least_piece(kernels));
  if (tile.positions % tile.lanes != 0) return 3 * tile.piece >= 2 * least;
  return 2 * tile.vectors() >= least;
}

// The taps of a source as it is.
ConvTaps taps_of(const at::Tensor& source) { return {source.stride(1), {0}, {0}, 1, {0}}; }

// Source channels a block: a channel takes what a tile reads of it, but no fewer cache lines than lie between the sets of
// L1 at which channels can begin.
template <typename S>
int64_t source_block(const Tile& tile, const at::Tensor& source, double nonzeros, int64_t channels) {
  constexpr int64_t kLine = 64, kSets = 64;
  const int64_t sets = std::gcd(ceil_div(int64_t(sizeof(S)) * source.stride(1), kLine), kSets);
  const int64_t read = int64_t(sizeof(S)) * tile.vectors() * tile.lanes;
  return channels_a_block(std::max(read, sets * kLine), nonzeros, channels);
}
// The same of a product. bfloat16 takes all of them at once, from L2: sums would be float32 between blocks, and are so
// rounded into the map.
template <typename S>
int64_t product_block(const Tile& tile, const at::Tensor& source, double nonzeros, int64_t channels) {
  return std::is_same_v<S, BFloat16> ? channels : source_block<S>(tile, source, nonzeros, channels);
}

// destination = product of the source with the weights of the lists, whose blocks have `block` source channels.
template <typename T, typename S, typename Lists>
void run_products(const Tile& tile, const Lists& lists, int64_t block, const at::Tensor& source,
                  const at::Tensor& destination, const T* bias) {
  const auto& kernels = kernels_of<T, S>();
  const int64_t batch = source.size(0), channels = lists.channels, tiles = ceil_div(batch, tile.images);
  // Of the piece at v of the tile from an image on, the channels of block b (of the first group).
  const auto source_of = [&](int64_t image, int64_t v, int64_t b) {
    const int64_t first = b * block;
    return ConvAhead<S>{numbers_of<S>(source) + image * source.stride(0) + first * source.stride(1) + v * tile.lanes,
                        std::min(tile.images, batch - image), source.stride(0), std::min(block, source.size(1) - first),
                        source.stride(1), tile.last_at(v) + tile.lanes};
  };
  const int64_t parts = even_parts(tiles, channels);
  at::parallel_for(0, tiles * parts, 1, [&](int64_t first, int64_t last) {
    for (int64_t task = first; task < last; ++task) {
      const int64_t image = task / parts * tile.images, part = task % parts;
      const S* const from = numbers_of<S>(source) + image * source.stride(0);
      S* const to = mutable_numbers_of<S>(destination) + image * destination.stride(0);
      for (int64_t v = 0; v < tile.plane; v += tile.piece)
        for (int64_t b = 0; b < lists.blocks; ++b) {
          ConvAhead<S> next{numbers_of<S>(source), 0, 0, 0, 0, 0};  // nothing
          if (b + 1 < lists.blocks)
            next = source_of(image, v, b + 1);
          else if (v + tile.piece < tile.plane)
            next = source_of(image, v + tile.piece, 0);
          else if (task + 1 < last)
            next = source_of((task + 1) / parts * tile.images, 0, 0);
          multiply(kernels, ConvProductOf<T, typename Lists::Entry, S, S>{
                                lists.entries(), lists.first(b), channels * part / parts, channels * (part + 1) / parts,
                                from + v * tile.lanes, source.stride(0), to + v * tile.lanes, destination.stride(0),
                                destination.stride(1), b == 0, bias, int(std::min(tile.images, batch - image)),
                                int(tile.vectors_at(v)), tile.last_at(v), 1, next});
        }
    }
  });
}

template <typename T, typename S, typename Lists>
bool forward_with(const Geometry& g, const ConvWeight& w, const at::Tensor& input, const at::Tensor& weight,
                  const std::vector<T>& bias, const at::Tensor& output) {
  const auto& kernels = kernels_of<T, S>();
  const Tile tile = product_tile<Lists>(g, kernels, w.density(), w.in);
  if (!is_filled<S, Lists>(tile, kernels)) return false;
  const int64_t block = product_block<S>(tile, input, w.density(), w.in);
  const auto lists = Lists::forward(w, taps_of(input), block, numbers_of<S>(weight));
  run_products<T, S>(tile, lists, block, input, output, bias.empty() ? nullptr : bias.data());
  return true;
}

template <typename T, typename S, typename Lists>
bool input_gradient_with(const Geometry& g, const ConvWeight& w, const at::Tensor& grad_output,
                         const at::Tensor& weight, const at::Tensor& grad_input) {
  const auto& kernels = kernels_of<T, S>();
  const Tile tile = product_tile<Lists>(g, kernels, w.density(), w.out / w.groups);
  if (!is_filled<S, Lists>(tile, kernels)) return false;
  const int64_t block = product_block<S>(tile, grad_output, w.density(), w.out / w.groups);
  const auto lists = Lists::backward(w, taps_of(grad_output), block, numbers_of<S>(weight));
  run_products<T, S>(tile, lists, block, grad_output, grad_input, static_cast<const T*>(nullptr));
  return true;
}

// Chunks of images whose dot products are summed apart, so that threads need not all read the whole map. They must not depend
// on the threads, as other chunks make other sums; one where these are not few beside the numbers that are read (with two
// threads, 90 %: 64 to 64 at 56, 0.9 of the time; 512 to 128 at 28, nothing).
int64_t chunks_of(const Geometry& g, const ConvWeight& w, const Tile& tile) {
  constexpr int64_t kChunks = 8, kRead = 1000;
  const int64_t tiles = ceil_div(g.batch, tile.images), read = (g.in + g.out) * tile.positions * g.batch;
  int64_t chunks = 1;
  while (2 * chunks <= std::min(kChunks, tiles) && read >= chunks * kRead * w.nonzeros()) chunks *= 2;
  return chunks;
}

// Calls visit(first image of a tile, its images, chunk, [begin, end) of the channels) for all tiles: each chunk of images and
// part of the channels by one thread, tiles in order.
template <typename Visit>
void for_each_tile(int64_t batch, const Tile& tile, int64_t chunks, int64_t channels, Visit visit) {
  const int64_t tiles = ceil_div(batch, tile.images), parts = even_parts(chunks, channels);
  at::parallel_for(0, chunks * parts, 1, [&](int64_t first, int64_t last) {
    for (int64_t task = first; task < last; ++task) {
      const int64_t chunk = task / parts, part = task % parts;
      for (int64_t t = tiles * chunk / chunks; t < tiles * (chunk + 1) / chunks; ++t)
        visit(t * tile.images, std::min(tile.images, batch - t * tile.images), chunk, channels * part / parts,
              channels * (part + 1) / parts);
    }
  });
}

// Dot products of quads.
template <typename T>
void quad_weight_gradient(const Geometry& g, const ConvWeight& w, const at::Tensor& grad_output, const at::Tensor& input,
                          const at::Tensor& grad_weight) {
  const ConvKernels<T>& kernels = conv_kernels<T>();
  constexpr int64_t kVectors = 32;
  const Tile tile(g.height * g.width, kernels.lanes, kVectors, g.batch);
  const ConvQuadPlaces places(w, taps_of(input), source_block<T>(tile, input, w.density(), w.in));
  PartialSums<T> sums(chunks_of(g, w, tile), w.nonzeros(), 0);
  for_each_tile(g.batch, tile, sums.chunks, g.out / 4,
                [&](int64_t image, int64_t images, int64_t chunk, int64_t first, int64_t last) {
                  for (int64_t v = 0; v < tile.plane; v += tile.piece)
                    for (int64_t b = 0; b < places.blocks; ++b)
                      kernels.quad_sddmm(
                          {places.offset(), places.first() + b, places.blocks, first, last,
                           input.const_data_ptr<T>() + image * input.stride(0) + v * kernels.lanes, input.stride(0),
                           grad_output.const_data_ptr<T>() + image * grad_output.stride(0) + v * kernels.lanes,
                           grad_output.stride(0), grad_output.stride(1), images, tile.vectors_at(v), tile.last_at(v),
                           tile.known_at(v), sums.weight(chunk)});
                });
  sums.template finish<T>(places, {at::Tensor(), grad_weight, at::Tensor()});
}

}  // namespace

template <typename T, typename S>
bool forward_in_place(const Geometry& g, const ConvWeight& w, const at::Tensor& input, const at::Tensor& weight,
                      const std::vector<T>& bias, const at::Tensor& output) {
  if (!can<T, S>(g, input, output)) return false;
  if (!ConvQuads<T>::can_forward(w)) return forward_with<T, S, ConvEntries<T>>(g, w, input, weight, bias, output);
  if constexpr (std::is_same_v<T, S>) return forward_with<T, S, ConvQuads<T>>(g, w, input, weight, bias, output);
  return false;
}

template <typename T, typename S>
bool input_gradient_in_place(const Geometry& g, const ConvWeight& w, const at::Tensor& grad_output,
                             const at::Tensor& weight, const at::Tensor& grad_input) {
  if (!can<T, S>(g, grad_output, grad_input)) return false;
  if (!ConvQuads<T>::can_backward(w))
    return input_gradient_with<T, S, ConvEntries<T>>(g, w, grad_output, weight, grad_input);
  if constexpr (std::is_same_v<T, S>)
    return input_gradient_with<T, S, ConvQuads<T>>(g, w, grad_output, weight, grad_input);
  return false;
}

// With many registers, and where a plane has a rest, pieces of grad_output are held while the nonzeros of their channel
// pass; else eight nonzeros go along 32 vectors together.
template <typename T, typename S>
bool weight_gradient_in_place(const Geometry& g, const ConvWeight& w, const at::Tensor& grad_output,
                              const at::Tensor& input, const at::Tensor& grad_weight) {
  if (!can<T, S>(g, input, grad_output)) return false;
  constexpr bool pairs = std::is_same_v<S, BFloat16>;
  if (ConvQuads<T>::can_forward(w)) {
    if constexpr (!pairs) quad_weight_gradient<T>(g, w, grad_output, input, grad_weight);
    return !pairs;
  }
  const auto& kernels = kernels_of<T, S>();
  constexpr int64_t kL2Bytes = 384 << 10;  // of it grad_output
  const bool holds = kernels.max_piece >= 16 || g.height * g.width % kernels.lanes != 0;
  const Tile tile(g.height * g.width, kernels.lanes, holds ? piece_vectors(kernels, w) : 32,
                  std::min<int64_t>(kernels.max_rows, g.batch));
  const int64_t piece_bytes = int64_t(sizeof(S)) * tile.vectors() * kernels.lanes;
  const ConvPlaces places(w, taps_of(input), holds ? source_block<S>(tile, input, w.density(), w.in) : w.in);
  const int64_t held = holds ? std::max<int64_t>(1, kL2Bytes / piece_bytes) : g.out;  // channels
  // Where there is one chunk, whose sums are in the order and of the type of the gradient, they are taken there.
  const int64_t chunks = chunks_of(g, w, tile);
  const bool direct = !pairs && chunks == 1 && w.unstructured() && w.packed;
  PartialSums<T> sums(direct ? 0 : chunks, w.nonzeros(), 0);
  if (direct) std::fill_n(mutable_numbers_of<T>(grad_weight), w.nonzeros(), T(0));
  for_each_tile(g.batch, tile, chunks, g.out, [&](int64_t image, int64_t images, int64_t chunk, int64_t first, int64_t last) {
    T* const grad = direct ? mutable_numbers_of<T>(grad_weight) : sums.weight(chunk);
    for (int64_t v = 0; v < tile.plane; v += tile.piece)
      for (int64_t o = first; o < last; o += held)
        for (int64_t b = 0; b < places.blocks; ++b) {
          const S* const from = numbers_of<S>(input) + image * input.stride(0) + v * kernels.lanes;
          const S* const to = numbers_of<S>(grad_output) + image * grad_output.stride(0) + v * kernels.lanes;
          const int64_t end = std::min(o + held, last);
          if (pairs || holds)
            kernels.piece_sddmm({places.offset(), places.first() + b, places.blocks, o, end, from, input.stride(0), to,
                                 grad_output.stride(0), grad_output.stride(1), int(images), int(tile.vectors_at(v)),
                                 tile.last_at(v), tile.known_at(v), grad});
          else if constexpr (!pairs)
            kernels.sddmm({places.offset(), places.first() + b, places.blocks, o, end, from, input.stride(0), to,
                           grad_output.stride(0), grad_output.stride(1), images, tile.vectors_at(v), grad});
        }
  });
  if (!direct) sums.template finish<S>(places, {at::Tensor(), grad_weight, at::Tensor()});
  return true;
}

#define INSTANTIATE(T, S)                                                                                              \
  template bool forward_in_place<T, S>(const Geometry&, const ConvWeight&, const at::Tensor&, const at::Tensor&,         \
                                       const std::vector<T>&, const at::Tensor&);                                        \
  template bool input_gradient_in_place<T, S>(const Geometry&, const ConvWeight&, const at::Tensor&, const at::Tensor&,  \
                                              const at::Tensor&);                                                        \
  template bool weight_gradient_in_place<T, S>(const Geometry&, const ConvWeight&, const at::Tensor&, const at::Tensor&, \
                                               const at::Tensor&);
INSTANTIATE(float, float)
INSTANTIATE(double, double)
INSTANTIATE(float, BFloat16)
#undef INSTANTIATE

}  // namespace uasparse
