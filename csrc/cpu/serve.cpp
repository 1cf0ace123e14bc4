// Inference on the CPU: runs a plan, a flat list of steps over an arena of feature maps (serve.h), made by
// uasparse_kernels/inference. A step is its code and its fields, all int64, in the order that the readers below take
// them in. Positions are in numbers: in the arena, in `values` (weights, biases), in `ints` (offsets, masks), or in one of
// the tensors. A plan is checked before it runs (serve_checks.cpp), once.
//
// Every number is computed by one task in a fixed order: results do not depend on the number of threads. From the first
// step on that is worth several, the threads run the plan together (team.h).

#include "cpu/serve.h"

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <torch/library.h>

#include <algorithm>

#include "cpu/isa.h"
#include "cpu/serve_checks.h"
#include "cpu/team.h"
#include "cpu/workspace.h"

namespace uasparse {
namespace {

template <typename T>
const ServeKernels<T>& serve_kernels();

template <>
const ServeKernels<float>& serve_kernels<float>() {
#if defined(__x86_64__)
  if (cpu_isa() == Isa::avx512) return avx512::serve_float;
  if (cpu_isa() == Isa::avx2) return avx2::serve_float;
#endif
  return portable::serve_float;
}

template <>
const ServeKernels<double>& serve_kernels<double>() {
#if defined(__x86_64__)
  if (cpu_isa() == Isa::avx512) return avx512::serve_double;
  if (cpu_isa() == Isa::avx2) return avx2::serve_double;
#endif
  return portable::serve_double;
}

enum Step : int64_t { kLoad, kConv, kRows, kPool, kAffine, kStore, kNorm, kAttention, kLookup, kMadeFor };

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Work that is worth a thread: numbers that are moved, and multiply-adds.
constexpr int64_t kMoved = 16384, kMultiplied = 65536;
// Bytes of a plane that threads do not share among them, but take whole: what one of them writes, the other would fetch
// with its own part.
constexpr int64_t kShort = 1024;

template <typename T>
class Plan {
 public:
  Plan(const at::Tensor& arena, const at::Tensor& program, const at::Tensor& ints, const at::Tensor& values,
       at::TensorList inputs, at::TensorList outputs)
      : arena_(arena.mutable_data_ptr<T>()),
        numel_(arena.numel()),
        next_(program.const_data_ptr<int64_t>()),
        stop_(next_ + program.numel()),
        ints_(ints.const_data_ptr<int32_t>()),
        values_(values.const_data_ptr<T>()),
        inputs_(inputs),
        outputs_(outputs),
        threads_(at::in_parallel_region() ? 1 : at::get_num_threads()) {}

  void run() {
    while (next_ < stop_) {
      const int64_t* const step = next_;
      run_step();
      if (wants_team_) {
        next_ = step;
        return run_together();
      }
    }
  }

 private:
  void run_together() {
    Team team(threads_);
    at::parallel_for(0, threads_, 1, [&](int64_t number, int64_t) {
      Plan mine = *this;
      Team::Member member(team, number);
      mine.member_ = &member;
      while (mine.next_ < mine.stop_ && !team.failed()) mine.run_step();
    });
  }

  // Steps read their fields, then hand what they do to spread(): outside of it they write nothing.
  void run_step() {
    switch (take()) {
      case kLoad: return load();
      case kConv: return conv();
      case kRows: return rows();
      case kPool: return pool();
      case kAffine: return affine();
      case kStore: return store();
      case kNorm: return norm();
      case kAttention: return attention();
      case kLookup: return lookup();
      case kMadeFor: take(), take(); return;  // for the checks
      default: TORCH_CHECK(false, "serve_run: the plan has an unknown step.");
    }
  }

  // Runs tasks [0, tasks): run(begin, end) for each thread that `work`, in units that are worth one, is enough for.
  template <typename Run>
  void spread(int64_t tasks, int64_t work, const Run& run) {
    const int64_t parts = std::max<int64_t>(1, std::min({tasks, work, threads_}));
    if (member_ != nullptr) {
      member_->step(parts, [&](int64_t i) { run(tasks * i / parts, tasks * (i + 1) / parts); });
    } else if (parts == 1) {
      run(0, tasks);
    } else {
      wants_team_ = true;
    }
  }

  // Clears the gap before a map's first plane: its first task does.
  static void clear_before(T* y, int64_t gap, int64_t begin) {
    if (begin == 0) std::fill(y - gap, y, T{});
  }

  int64_t take() {
    TORCH_CHECK(next_ < stop_, "serve_run: the plan ends within a step.");
    return *next_++;
  }

  // `count` numbers of the arena, `planes` times `plane` apart.
  T* at(int64_t position, int64_t planes, int64_t plane, int64_t count) const {
    TORCH_CHECK(position >= 0 && position + (planes - 1) * plane + count <= numel_, "serve_run: the plan needs ",
                position + (planes - 1) * plane + count, " numbers, the arena has ", numel_, ".");
    return arena_ + position;
  }

  ServeActivation<T> activation(int64_t kind, int64_t parameters) const {
    return {static_cast<Activation>(kind), parameters < 0 ? T{} : values_[parameters],
            parameters < 0 ? T{} : values_[parameters + 1]};
  }

  const T* mask(int64_t position) const { return reinterpret_cast<const T*>(ints_ + position); }

  void load() {
    const int64_t input = take(), position = take();
    ServeLoad<T> p{};
    p.stride_n = take(), p.stride_c = take(), p.stride_h = take(), p.stride_w = take();
    p.images = take();
    const int64_t channels = take();
    p.height = take(), p.width = take();
    const int64_t y = take();
    p.plane = take(), p.pitch = take(), p.rows = take(), p.gap = take(), p.body = take();
    p.phases = take(), p.phase_h = take(), p.phase_w = take();
    p.phase = ints_ + take();
    const int64_t reach = (p.images - 1) * p.stride_n + (channels - 1) * p.stride_c + (p.height - 1) * p.stride_h +
                          (p.width - 1) * p.stride_w + 1;
    p.x = input < 0 ? at(position, 1, 0, reach) : source(input, position + reach) + position;
    p.y = at(y, channels * p.phases, p.plane, p.body + p.gap);
    TORCH_CHECK(y >= p.gap, "serve_run: a map has no room before it.");
    // Channels by 16 for the transposing load.
    spread(ceil_div(channels, 16), channels * p.phases * p.plane / kMoved, [&](int64_t begin, int64_t end) {
      clear_before(p.y, p.gap, begin);
      kernels_.load(p, begin * 16, std::min(channels, end * 16));
    });
  }

  void conv() {
    ServeConv<T> p{};
    const int64_t x = take(), y = take(), residual = take();
    p.y_plane = take(), p.residual_plane = take();
    p.body = take(), p.gap = take(), p.tile = take(), p.group = take();
    p.rows = take(), p.blocks = take(), p.chunk = take();
    p.order = ints_ + take();
    p.ptr = ints_ + take();
    p.off = ints_ + take();
    p.val = values_ + take();
    p.bias = values_ + take();
    p.mask = mask(take());
    const int64_t kind = take();
    p.act = activation(kind, take());
    p.x = at(x, 1, 0, 0);
    p.y = at(y, p.rows, p.y_plane, p.body + p.gap);
    p.residual = residual < 0 ? nullptr : at(residual, p.rows, p.residual_plane, p.body);
    TORCH_CHECK(y >= p.gap && p.tile > 0 && p.chunk > 0, "serve_run: a convolution's plan is damaged.");
    const int64_t tiles = kernels_.tiles(p);
    const int64_t work = int64_t{p.ptr[p.blocks * (p.rows / p.group + 1) - 1]} * p.body * p.group;
    spread(threads_, work / kMultiplied, [&](int64_t begin, int64_t end) {
      clear_before(p.y, p.gap, begin);
      if (begin == 0 && end == threads_) return kernels_.conv(p, 0, tiles, 0, p.rows);
      const int64_t units = ceil_div(p.rows, row_step(p));
      if (p.body * static_cast<int64_t>(sizeof(T)) <= kShort && (units % threads_ == 0 || units >= 4 * threads_))
        return kernels_.conv(p, 0, tiles, share(p, 1, begin, threads_), share(p, 1, end, threads_));
      int64_t at = share(p, tiles, begin, threads_);
      const int64_t stop = share(p, tiles, end, threads_);
      while (at < stop) {
        const int64_t tile = at / p.rows, row = at % p.rows, whole = row == 0 ? stop / p.rows : tile;
        if (whole > tile) {
          kernels_.conv(p, tile, whole, 0, p.rows);
          at = whole * p.rows;
        } else {
          const int64_t last = std::min(stop, (tile + 1) * p.rows);
          kernels_.conv(p, tile, tile + 1, row, last - tile * p.rows);
          at = last;
        }
      }
    });
  }

  // Rows that stay together: blocks have an order of their own.
  static int64_t row_step(const ServeConv<T>& p) { return p.group > 1 ? p.group : p.blocks > 1 ? kRowWindow : 1; }

  // Where the i-th of so many shares begins, as tile * rows + row. Shares have equally many nonzeros, and are whole tiles but
  // for their ends: so a thread's positions are the same from layer to layer and lie in its cache, and the part of a block of
  // input channels that L1 holds serves many rows.
  static int64_t share(const ServeConv<T>& p, int64_t tiles, int64_t i, int64_t shares) {
    const int64_t step = row_step(p);
    const auto before = [&](int64_t steps) {  // nonzeros in the rows of so many steps
      const int64_t row = std::min(p.rows, steps * step) / p.group, lists = p.rows / p.group + 1;
      int64_t count = 0;
      for (int64_t b = 0; b < p.blocks; ++b) count += p.ptr[b * lists + row] - p.ptr[b * lists];
      return count;
    };
    const int64_t total = before(ceil_div(p.rows, step)), wanted = tiles * total * i / shares;
    const int64_t tile = wanted / total, rest = wanted % total;
    int64_t low = 0, high = ceil_div(p.rows, step);
    while (low < high) {
      const int64_t middle = (low + high) / 2;
      if (before(middle) < rest) low = middle + 1;
      else high = middle;
    }
    if (low > 0 && rest - before(low - 1) < before(low) - rest) --low;
    return tile * p.rows + std::min(p.rows, low * step);
  }

  void rows() {
    const int64_t input = take(), position = take(), stride_m = take(), stride_k = take();
    ServeRows<T> p{};
    p.batch = take();
    const int64_t columns = take(), rows = take();
    const int64_t output = take(), y = take();
    p.y_stride = take();
    const int64_t residual = take();
    p.ptr = ints_ + take();
    p.idx = reinterpret_cast<const uint16_t*>(ints_ + take());
    p.val = values_ + take();
    p.bias = values_ + take();
    const int64_t kind = take();
    p.act = activation(kind, take());
    const int64_t reach = (p.batch - 1) * stride_m + (columns - 1) * stride_k + 1;
    const T* x = input < 0 ? at(position, 1, 0, reach) : source(input, position + reach) + position;
    p.y = output < 0 ? at(y, p.batch, p.y_stride, rows) : target(output, y + (p.batch - 1) * p.y_stride + rows) + y;
    p.residual = residual < 0 ? nullptr : at(residual, p.batch, p.y_stride, rows);
    p.width = p.batch == 1 ? 1 : p.batch <= 4 ? 4 : 8;
    TORCH_CHECK(p.batch <= 8, "serve_run: expected at most 8 rows.");
    spread(rows, int64_t{p.ptr[rows]} * p.batch / kMoved, [&](int64_t begin, int64_t end) {
      // Each thread makes its own copy: it reads it often, and the other's lines lie far.
      ServeRows<T> mine = p;
      const bool direct = p.batch == 1 && stride_k == 1;
      const Workspace packed(direct ? 0 : columns * p.width * sizeof(T));
      T* const to = packed.template as<T>();
      mine.x = direct ? x : to;
      for (int64_t k = 0; k < (direct ? 0 : columns); ++k)
        for (int64_t m = 0; m < p.width; ++m) to[k * p.width + m] = m < p.batch ? x[m * stride_m + k * stride_k] : T{};
      kernels_.rows(mine, begin, end);
    });
  }

  void pool() {
    ServePool<T> p{};
    const int64_t x = take(), y = take(), channels = take();
    p.x_plane = take(), p.y_plane = take();
    p.images = take(), p.height = take(), p.width = take(), p.pitch = take(), p.rows = take();
    p.out_height = take(), p.out_width = take(), p.out_pitch = take(), p.out_rows = take(), p.out_body = take();
    p.gap = take();
    p.kernel_h = take(), p.kernel_w = take(), p.stride_h = take(), p.stride_w = take();
    p.pad_h = take(), p.pad_w = take();
    p.average = take() != 0;
    p.count_padding = take() != 0;
    p.x = at(x, channels, p.x_plane, p.images * p.rows * p.pitch - p.pitch + p.width);
    p.y = at(y, channels, p.y_plane, p.out_body + p.gap);
    TORCH_CHECK(y >= p.gap, "serve_run: a map has no room before it.");
    spread(channels, channels * p.x_plane / kMoved, [&](int64_t begin, int64_t end) {
      clear_before(p.y, p.gap, begin);
      kernels_.pool(p, begin, end);
    });
  }

  void affine() {
    ServeAffine<T> p{};
    const int64_t x = take(), y = take(), residual = take(), channels = take();
    p.x_plane = take(), p.y_plane = take(), p.residual_plane = take();
    p.body = take(), p.gap = take();
    const int64_t scale = take(), shift = take();
    p.mask = mask(take());
    const int64_t kind = take();
    p.act = activation(kind, take());
    p.scale = scale < 0 ? nullptr : values_ + scale;
    p.shift = shift < 0 ? nullptr : values_ + shift;
    p.x = at(x, channels, p.x_plane, p.body);
    p.y = at(y, channels, p.y_plane, p.body + p.gap);
    p.residual = residual < 0 ? nullptr : at(residual, channels, p.residual_plane, p.body);
    TORCH_CHECK(y >= p.gap, "serve_run: a map has no room before it.");
    spread(channels, channels * p.body / kMoved, [&](int64_t begin, int64_t end) {
      clear_before(p.y, p.gap, begin);
      kernels_.affine(p, begin, end);
    });
  }

  void store() {
    const int64_t position = take(), plane = take(), pitch = take(), rows = take();
    const int64_t images = take(), channels = take(), height = take(), width = take();
    const int64_t output = take(), y = take();
    const int64_t stride_n = take(), stride_c = take(), stride_h = take(), stride_w = take();
    const T* x = at(position, channels, plane, ((images - 1) * rows + height - 1) * pitch + width);
    T* to = target(output, y + (images - 1) * stride_n + (channels - 1) * stride_c + (height - 1) * stride_h +
                               (width - 1) * stride_w + 1) + y;
    if (stride_c == 1 && images == 1 && height == 1) {
      return spread(ceil_div(channels, 16), channels * width / kMoved, [&](int64_t begin, int64_t end) {
        kernels_.store_rows(x, plane, to, stride_w, width, begin * 16, std::min(channels, end * 16));
      });
    }
    spread(channels, channels * plane / kMoved, [&](int64_t begin, int64_t end) {
      for (int64_t c = begin; c < end; ++c)
        for (int64_t n = 0; n < images; ++n)
          for (int64_t h = 0; h < height; ++h) {
            const T* from = x + c * plane + (n * rows + h) * pitch;
            T* row = to + n * stride_n + c * stride_c + h * stride_h;
            if (stride_w == 1) std::copy(from, from + width, row);
            else
              for (int64_t w = 0; w < width; ++w) row[w * stride_w] = from[w];
          }
    });
  }

  void norm() {
    ServeNorm<T> p{};
    const int64_t x = take(), y = take();
    p.channels = take();
    p.x_plane = take(), p.y_plane = take(), p.body = take();
    const int64_t gap = take(), weight = take(), bias = take(), epsilon = take();
    p.mask = mask(take());
    p.weight = weight < 0 ? nullptr : values_ + weight;
    p.bias = bias < 0 ? nullptr : values_ + bias;
    p.epsilon = values_[epsilon];
    p.x = at(x, p.channels, p.x_plane, p.body);
    p.y = at(y, p.channels, p.y_plane, p.body + gap);
    TORCH_CHECK(y >= gap, "serve_run: a map has no room before it.");
    // Four vectors a task: a task's lines are read whole.
    const int64_t vectors = p.body / kernels_.lanes, tasks = ceil_div(vectors, 4);
    spread(tasks, p.body * p.channels / kMoved, [&](int64_t begin, int64_t end) {
      clear_before(p.y, gap, begin);
      kernels_.norm(p, begin * 4, std::min(vectors, end * 4));
      clear(p.y, p.channels * begin / tasks, p.channels * end / tasks, p.y_plane, p.body, p.body + gap);
    });
  }

  void attention() {
    ServeAttention<T> p{};
    const int64_t q = take(), k = take(), v = take(), y = take();
    p.q_plane = take(), p.k_plane = take(), p.v_plane = take(), p.y_plane = take();
    p.q_image = take(), p.k_image = take(), p.v_image = take();
    p.q_head = take(), p.k_head = take(), p.v_head = take();
    p.images = take(), p.heads = take(), p.queries = take(), p.keys = take(), p.dim = take(), p.value_dim = take();
    const int64_t body = take(), gap = take();
    p.scale = values_[take()];
    p.q = at(q, (p.heads - 1) * p.q_head + p.dim, p.q_plane, (p.images - 1) * p.q_image + p.queries);
    p.k = at(k, (p.heads - 1) * p.k_head + p.dim, p.k_plane, (p.images - 1) * p.k_image + p.keys);
    p.v = at(v, (p.heads - 1) * p.v_head + p.value_dim, p.v_plane, (p.images - 1) * p.v_image + p.keys);
    p.y = at(y, p.heads * p.value_dim, p.y_plane, body + gap);
    TORCH_CHECK(y >= gap && p.images * p.queries <= body, "serve_run: an attention's plan is damaged.");
    const int64_t tiles = kernels_.attention_tiles(p), tasks = p.images * p.heads * tiles;
    const int64_t planes = p.heads * p.value_dim;
    const int64_t work = tasks / tiles * p.queries * p.keys * (p.dim + p.value_dim);
    spread(tasks, work / kMultiplied, [&](int64_t begin, int64_t end) {
      clear_before(p.y, gap, begin);
      const Workspace room(kernels_.attention_room(p) * sizeof(T));
      for (int64_t task = begin; task < end; ++task)
        kernels_.attention(p, task / tiles / p.heads, task / tiles % p.heads, task % tiles, room.template as<T>());
      clear(p.y, planes * begin / tasks, planes * end / tasks, p.y_plane, p.images * p.queries, body + gap);
    });
  }

  void lookup() {
    const int64_t input = take(), position = take(), stride_m = take(), stride_k = take();
    ServeLookup<T> p{};
    p.batch = take();
    const int64_t columns = take();
    p.rows = take();
    const int64_t y = take();
    p.y_stride = take();
    const int64_t residual = take();
    p.ptr = ints_ + take();
    p.index = reinterpret_cast<const uint8_t*>(ints_ + take());
    p.place = reinterpret_cast<const uint8_t*>(ints_ + take());
    p.val = values_ + take();
    p.bias = values_ + take();
    const int64_t kind = take();
    p.act = activation(kind, take());
    const int64_t reach = (p.batch - 1) * stride_m + (columns - 1) * stride_k + 1;
    const T* x = input < 0 ? at(position, 1, 0, reach) : source(input, position + reach) + position;
    p.y = at(y, p.batch, p.y_stride, p.rows);
    p.residual = residual < 0 ? nullptr : at(residual, p.batch, p.y_stride, p.rows);
    TORCH_CHECK(kernels_.lookup != nullptr && p.batch <= kLookupBatch,
                "serve_run: a step is made for another instruction set, or for fewer rows.");
    p.blocks = ceil_div(columns, kLookupRows);
    const int64_t wide = p.blocks * kLookupRows, windows = ceil_div(p.rows, kLookupRows);
    const int64_t slots = p.ptr[windows * p.blocks * (kLookupRows / 16)] * p.batch;
    spread(windows, slots * 16 / kMoved, [&](int64_t begin, int64_t end) {
      ServeLookup<T> mine = p;
      const Workspace packed(p.batch * wide * sizeof(T));
      mine.x = packed.template as<T>();
      for (int64_t m = 0; m < p.batch; ++m) {
        T* const to = packed.template as<T>() + m * wide;
        for (int64_t k = 0; k < columns; ++k) to[k] = x[m * stride_m + k * stride_k];
        std::fill(to + columns, to + wide, T{});
      }
      kernels_.lookup(mine, begin, end);
    });
  }

  // Zeros at [used, end) of the planes [first, last).
  static void clear(T* y, int64_t first, int64_t last, int64_t plane, int64_t used, int64_t end) {
    for (int64_t c = first; c < last; ++c) std::fill(y + c * plane + used, y + c * plane + end, T{});
  }

  const T* source(int64_t index, int64_t count) const {
    TORCH_CHECK(index < static_cast<int64_t>(inputs_.size()) && inputs_[index].is_contiguous() &&
                    inputs_[index].numel() >= count,
                "serve_run: input ", index, " is not what the plan was made for.");
    return inputs_[index].template const_data_ptr<T>();
  }

  T* target(int64_t index, int64_t count) const {
    TORCH_CHECK(index < static_cast<int64_t>(outputs_.size()) && outputs_[index].is_contiguous() &&
                    outputs_[index].numel() >= count,
                "serve_run: output ", index, " is not what the plan was made for.");
    return outputs_[index].template mutable_data_ptr<T>();
  }

  const ServeKernels<T>& kernels_ = serve_kernels<T>();
  T* arena_;
  int64_t numel_;
  const int64_t *next_, *stop_;
  const int32_t* ints_;
  const T* values_;
  at::TensorList inputs_, outputs_;
  int64_t threads_;
  Team::Member* member_ = nullptr;  // within a team
  bool wants_team_ = false;
};

// Runs the steps of `program`.
void serve_run(const at::Tensor& arena, const at::Tensor& program, const at::Tensor& ints, const at::Tensor& values,
               at::TensorList inputs, at::TensorList outputs) {
  check_serve(arena, program, ints, values, inputs, outputs);
  if (arena.scalar_type() == at::kDouble) return Plan<double>(arena, program, ints, values, inputs, outputs).run();
  Plan<float>(arena, program, ints, values, inputs, outputs).run();
}

}  // namespace

TORCH_LIBRARY_IMPL(uasparse, CPU, m) { m.impl("serve_run", serve_run); }

}  // namespace uasparse
