// Checks a plan before serve.cpp runs it. The readers below take a step's fields in the order in which serve.cpp does:
// who changes one changes the other. A step's kernel (serve_impl.h) may trust what is demanded here.

#include "cpu/serve_checks.h"

#include <algorithm>
#include <functional>
#include <memory>
#include <vector>

#include "checks.h"
#include "cpu/isa.h"
#include "cpu/remembered.h"
#include "cpu/serve.h"

namespace uasparse {
namespace {

using Wide = __int128;  // of three fields' product
constexpr int64_t kMostCount = int64_t{1} << 30;  // of sizes and strides: sums of products of two stay in 64 bits
constexpr int64_t kMostPlace = int64_t{1} << 46;  // of positions
constexpr int64_t kMostTensors = 1 << 16;
constexpr int64_t kMostColumns = 1 << 16;  // that 16 bits index
constexpr int64_t kMostRows = 8;

// Numbers that each tensor must have.
struct Needs {
  int64_t arena = 0;
  std::vector<int64_t> inputs, outputs;
};

class Checker {
 public:
  Checker(const at::Tensor& program, const at::Tensor& ints, const at::Tensor& values)
      : next_(program.const_data_ptr<int64_t>()),
        stop_(next_ + program.numel()),
        ints_(ints.const_data_ptr<int32_t>()),
        ints_size_(ints.numel()),
        values_size_(values.numel()),
        words_(values.element_size() / sizeof(int32_t)) {}

  Needs check() {
    for (; next_ < stop_; ++step_) {
      switch (field(0, 9)) {
        case 0: load(); break;
        case 1: conv(); break;
        case 2: rows(); break;
        case 3: pool(); break;
        case 4: affine(); break;
        case 5: store(); break;
        case 6: norm(); break;
        case 7: attention(); break;
        case 8: lookup(); break;
        default: made_for(); break;
      }
    }
    return needs_;
  }

 private:
  // ---- fields ----

  void demand(bool good, const char* what) const {
    TORCH_CHECK_VALUE(good, "serve_run: expected a plan as uasparse_kernels/inference makes them, got one whose step ",
                      step_, " ", what, ": it is damaged.");
  }

  int64_t field(int64_t low, int64_t high) {
    demand(next_ < stop_, "ends too early");
    demand(*next_ >= low && *next_ <= high, "has a field out of range");
    return *next_++;
  }

  int64_t count() { return field(1, kMostCount); }
  int64_t size() { return field(0, kMostCount); }  // gaps, strides, paddings
  int64_t place() { return field(0, kMostPlace); }
  int64_t place_or_none() { return field(-1, kMostPlace); }
  int64_t body() {
    const int64_t body = count();
    demand(body % kPlaneLanes == 0, "has planes that are no whole number of vectors");
    return body;
  }

  // ---- places ----

  void values(int64_t place, int64_t count) const {
    demand(place >= 0 && place + count <= values_size_, "reads beyond the values");
  }

  const int32_t* ints(int64_t place, Wide count) const {
    demand(place + count <= ints_size_, "reads beyond the lists");
    return ints_ + place;
  }

  void mask(int64_t body) {
    const int64_t place = this->place();
    demand(place % words_ == 0, "has a mask that begins within a number");
    ints(place, Wide{body} * words_);
  }

  void activation() {
    field(0, static_cast<int64_t>(Activation::gelu_tanh));
    const int64_t parameters = place_or_none();
    if (parameters >= 0) values(parameters, 2);
  }

  void arena(Wide begin, Wide end) {
    demand(begin >= 0 && end <= kMostPlace, "leaves the arena");
    needs_.arena = std::max(needs_.arena, static_cast<int64_t>(end));
  }

  // `planes` parts of `count` numbers, `plane` apart.
  void arena(int64_t place, Wide planes, int64_t plane, Wide count) { arena(place, place + (planes - 1) * plane + count); }

  // Planes that are written: they are apart, so that a plan is no longer than its arena; a gap before them too.
  void written(int64_t place, Wide planes, int64_t plane, int64_t body, int64_t gap) {
    demand(plane >= body + gap, "writes planes that overlap");
    demand(place >= gap, "writes before the arena");
    arena(place, planes, plane, Wide{body} + gap);
  }

  void tensor(std::vector<int64_t>& needs, int64_t index, Wide end) {
    demand(end <= kMostPlace, "leaves a tensor");
    if (static_cast<int64_t>(needs.size()) <= index) needs.resize(index + 1);
    needs[index] = std::max(needs[index], static_cast<int64_t>(end));
  }

  // ptr [lists][n + 1] rises in each list; the number of nonzeros that it lists.
  int64_t rising(int64_t place, int64_t lists, int64_t n) const {
    const int32_t* ptr = ints(place, Wide{lists} * (n + 1));
    int32_t last = 0;
    for (int64_t i = 0; i < lists; ++i, ptr += n + 1) {
      bool rises = ptr[0] >= 0;
      for (int64_t r = 0; r < n; ++r) rises &= ptr[r] <= ptr[r + 1];
      demand(rises, "has row pointers that do not rise");
      last = std::max(last, ptr[n]);
    }
    return last;
  }

  // Lists [blocks][rows] of the rows, each kRowWindow of them a permutation; a pass over them takes whole windows. Groups
  // of rows do not use it.
  void order(int64_t place, int64_t group, int64_t blocks, int64_t rows, int64_t chunk) const {
    const int32_t* listed = ints(place, Wide{blocks} * (rows / group));
    if (group != 1) return;
    demand(chunk % kRowWindow == 0, "parts windows of rows");
    for (int64_t block = 0; block < blocks; ++block, listed += rows)
      for (int64_t first = 0; first < rows; first += kRowWindow) {
        const int64_t many = std::min<int64_t>(kRowWindow, rows - first);
        uint64_t met = 0;
        for (int64_t i = first; i < first + many; ++i) {
          demand(listed[i] >= first && listed[i] < first + many, "has a row out of its window");
          met |= uint64_t{1} << (listed[i] - first);
        }
        demand(met == (many == 64 ? ~uint64_t{0} : (uint64_t{1} << many) - 1), "names a row twice");
      }
  }

  // ---- steps ----

  void load() {
    const int64_t input = field(-1, kMostTensors), position = place();
    const int64_t stride_n = size(), stride_c = size(), stride_h = size(), stride_w = size();
    const int64_t images = count(), channels = count(), height = count(), width = count();
    const int64_t y = place(), plane = count(), pitch = count(), rows = count(), gap = size(), body = count();
    const int64_t phases = count(), phase_h = count(), phase_w = count(), phase = place();
    const Wide end = position + Wide{images - 1} * stride_n + Wide{channels - 1} * stride_c +
                     Wide{height - 1} * stride_h + Wide{width - 1} * stride_w + 1;
    if (input < 0) arena(position, end);
    else tensor(needs_.inputs, input, end);
    const int32_t* listed = ints(phase, phases);
    demand(std::all_of(listed, listed + phases, [&](int64_t p) { return p >= 0 && p < phase_h * phase_w; }),
           "has a phase out of range");
    demand((width - 1) / phase_w + 1 <= pitch && Wide{images} * rows * pitch <= body + gap,
           "loads more than its planes hold");
    written(y, Wide{channels} * phases, plane, body, gap);
  }

  void conv() {
    const int64_t x = place(), y = place(), residual = place_or_none();
    const int64_t y_plane = count(), residual_plane = size(), body = this->body(), gap = size();
    count();  // vectors of a tile, at most
    const int64_t group = count(), rows = count(), blocks = count(), chunk = count();
    demand((group == 1 || group == kRowGroup) && rows % group == 0 && chunk % group == 0,
           "has channels that its groups do not divide");
    order(place(), group, blocks, rows, chunk);
    const int64_t nonzeros = rising(place(), blocks, rows / group);
    const int32_t* offsets = ints(place(), nonzeros);
    values(place(), nonzeros * group);
    values(place(), rows);
    mask(body);
    activation();
    demand(Wide{nonzeros} * body <= Wide{1} << 60, "has more work than can be counted");
    if (nonzeros > 0) {
      int32_t low = offsets[0], high = offsets[0];
      for (int64_t k = 1; k < nonzeros; ++k) low = std::min(low, offsets[k]), high = std::max(high, offsets[k]);
      arena(Wide{x} + low, Wide{x} + high + body);
    }
    arena(x, x);
    written(y, rows, y_plane, body, gap);
    if (residual >= 0) arena(residual, rows, residual_plane, body);
  }

  void rows() {
    const int64_t input = field(-1, kMostTensors), position = place(), stride_m = size(), stride_k = size();
    const int64_t batch = field(1, kMostRows), columns = field(1, kMostColumns), rows = count();
    const int64_t output = field(-1, kMostTensors), y = place(), y_stride = size(), residual = place_or_none();
    const int64_t nonzeros = rising(place(), 1, rows);
    const auto* index = reinterpret_cast<const uint16_t*>(ints(place(), (nonzeros + 1) / 2));
    values(place(), nonzeros);
    values(place(), rows);
    activation();
    uint16_t most = 0;
    for (int64_t k = 0; k < nonzeros; ++k) most = std::max(most, index[k]);
    demand(most < columns, "has a column out of range");
    const Wide end = position + Wide{batch - 1} * stride_m + Wide{columns - 1} * stride_k + 1;
    if (input < 0) arena(position, end);
    else tensor(needs_.inputs, input, end);
    if (output < 0) arena(y, batch, y_stride, rows);
    else tensor(needs_.outputs, output, y + Wide{batch - 1} * y_stride + rows);
    if (residual >= 0) arena(residual, batch, y_stride, rows);
  }

  void pool() {
    const int64_t x = place(), y = place(), channels = count(), x_plane = count(), y_plane = count();
    const int64_t images = count(), height = count(), width = count(), pitch = count(), rows = count();
    const int64_t out_height = count(), out_width = count(), out_pitch = count(), out_rows = count();
    const int64_t out_body = count(), gap = size();
    const int64_t kernel_h = count(), kernel_w = count(), stride_h = count(), stride_w = count();
    const int64_t pad_h = size(), pad_w = size();
    field(0, 1), field(0, 1);
    // Every window meets a pixel.
    demand(pad_h < kernel_h && pad_w < kernel_w && Wide{out_height - 1} * stride_h - pad_h < height &&
               Wide{out_width - 1} * stride_w - pad_w < width,
           "has windows outside of the picture");
    demand((Wide{images - 1} * out_rows + out_height - 1) * out_pitch + out_width <= out_body,
           "pools more than its planes hold");
    demand(out_width <= out_pitch && out_height <= out_rows, "has rows or pictures that overlap");
    arena(x, channels, x_plane, (Wide{images - 1} * rows + height - 1) * pitch + width);
    written(y, channels, y_plane, out_body, gap);
  }

  void affine() {
    const int64_t x = place(), y = place(), residual = place_or_none(), channels = count();
    const int64_t x_plane = count(), y_plane = count(), residual_plane = size(), body = this->body(), gap = size();
    const int64_t scale = place_or_none(), shift = place_or_none();
    mask(body);
    activation();
    if (scale >= 0) values(scale, channels);
    if (shift >= 0) values(shift, channels);
    arena(x, channels, x_plane, body);
    written(y, channels, y_plane, body, gap);
    if (residual >= 0) arena(residual, channels, residual_plane, body);
  }

  void store() {
    const int64_t position = place(), plane = count(), pitch = count(), rows = count();
    const int64_t images = count(), channels = count(), height = count(), width = count();
    const int64_t output = field(0, kMostTensors), y = place();
    const int64_t stride_n = size(), stride_c = size(), stride_h = size(), stride_w = size();
    arena(position, channels, plane, (Wide{images - 1} * rows + height - 1) * pitch + width);
    const Wide end = y + Wide{images - 1} * stride_n + Wide{channels - 1} * stride_c + Wide{height - 1} * stride_h +
                     Wide{width - 1} * stride_w + 1;
    // Each number of the output is written once at most.
    const Wide stored = std::min(Wide{images} * channels * height, Wide{kMostPlace}) * width;
    tensor(needs_.outputs, output, std::max(end, stored));
  }

  void norm() {
    const int64_t x = place(), y = place(), channels = count();
    const int64_t x_plane = count(), y_plane = count(), body = this->body(), gap = size();
    const int64_t weight = place_or_none(), bias = place_or_none();
    values(place(), 1);
    mask(body);
    if (weight >= 0) values(weight, channels);
    if (bias >= 0) values(bias, channels);
    arena(x, channels, x_plane, body);
    written(y, channels, y_plane, body, gap);
  }

  void attention() {
    const int64_t q = place(), k = place(), v = place(), y = place();
    const int64_t q_plane = count(), k_plane = count(), v_plane = count(), y_plane = count();
    const int64_t q_image = size(), k_image = size(), v_image = size();
    const int64_t q_head = size(), k_head = size(), v_head = size();
    const int64_t images = count(), heads = count(), queries = count(), keys = count(), dim = count();
    const int64_t value_dim = count(), body = this->body(), gap = size();
    values(place(), 1);
    demand(Wide{images} * queries <= body, "attends more than its planes hold");
    arena(q, Wide{heads - 1} * q_head + dim, q_plane, Wide{images - 1} * q_image + queries);
    arena(k, Wide{heads - 1} * k_head + dim, k_plane, Wide{images - 1} * k_image + keys);
    arena(v, Wide{heads - 1} * v_head + value_dim, v_plane, Wide{images - 1} * v_image + keys);
    demand(Wide{dim} + keys <= kMostCount >> 8, "has more keys than can be held");
    written(y, Wide{heads} * value_dim, y_plane, body, gap);
  }

  void lookup() {
    demand(words_ == 1 && cpu_isa() == Isa::avx512, "is made for another instruction set");
    const int64_t input = field(-1, kMostTensors), position = place(), stride_m = size(), stride_k = size();
    const int64_t batch = field(1, kLookupBatch), columns = count(), rows = count();
    const int64_t y = place(), y_stride = size(), residual = place_or_none();
    const int64_t windows = (rows - 1) / kLookupRows + 1, blocks = (columns - 1) / kLookupRows + 1;
    demand(Wide{windows} * blocks < kMostCount, "has more tiles than can be counted");
    const int64_t slots = rising(place(), 1, windows * blocks * (kLookupRows / 16));
    const auto below = [&](const uint8_t* list, int64_t count) {
      return std::all_of(list, list + count, [](uint8_t at) { return at < kLookupRows; });
    };
    demand(below(reinterpret_cast<const uint8_t*>(ints(place(), Wide{slots} * 4)), slots * 16) &&
               below(reinterpret_cast<const uint8_t*>(ints(place(), Wide{windows} * blocks * (kLookupRows / 4))),
                     windows * blocks * kLookupRows),
           "looks up beyond a tile");
    values(place(), slots * 16);
    values(place(), rows);
    activation();
    const Wide end = position + Wide{batch - 1} * stride_m + Wide{columns - 1} * stride_k + 1;
    if (input < 0) arena(position, end);
    else tensor(needs_.inputs, input, end);
    arena(y, batch, y_stride, rows);
    if (residual >= 0) arena(residual, batch, y_stride, rows);
  }

  // Of a plan that was kept in a file (package.py): it knows this version's steps, and kernels of its machine.
  void made_for() {
    const int64_t format = field(0, kMostCount), isa = field(0, static_cast<int64_t>(Isa::avx512));
    TORCH_CHECK_VALUE(format == kServeFormat, "serve_run: expected a package of format ", kServeFormat,
                      ", got one of format ", format,
                      ": another version of uasparse_kernels made it; make it again with this one.");
    TORCH_CHECK_VALUE(isa <= static_cast<int64_t>(cpu_isa()), "serve_run: expected a package for a machine of ",
                      isa_name(cpu_isa()), " instructions, as this one, got one for ", isa_name(static_cast<Isa>(isa)),
                      ": make it on a machine like this, or with UASPARSE_CPU_ISA=", isa_name(cpu_isa()), ".");
  }

  const int64_t *next_, *stop_;
  const int32_t* ints_;
  const int64_t ints_size_, values_size_, words_;
  int64_t step_ = 0;
  Needs needs_;
};

// The two share no memory.
bool are_apart(const at::Tensor& a, const at::Tensor& b) {
  if (a.numel() == 0 || b.numel() == 0) return true;
  const auto *x = static_cast<const char*>(a.const_data_ptr()), *y = static_cast<const char*>(b.const_data_ptr());
  return std::less_equal<>()(x + a.nbytes(), y) || std::less_equal<>()(y + b.nbytes(), x);
}

void check_serve_tensor(const at::Tensor& tensor, const char* name, at::ScalarType dtype) {
  TORCH_CHECK_TYPE(tensor.scalar_type() == dtype, "serve_run: expected ", name, " of dtype ", dtype, ", got ",
                   tensor.scalar_type(), ".");
  TORCH_CHECK_VALUE(tensor.device().is_cpu() && tensor.is_contiguous(), "serve_run: expected ", name,
                    " to be contiguous and on the CPU, got strides ", tensor.strides(), " on ", tensor.device(), ".");
  check_storage(tensor, name);
}

void check_sizes(at::TensorList tensors, const char* name, const std::vector<int64_t>& needs, at::ScalarType dtype) {
  TORCH_CHECK_VALUE(tensors.size() >= needs.size(), "serve_run: expected ", needs.size(), " ", name, "s, got ",
                    tensors.size(), ".");
  for (const at::Tensor& tensor : tensors) check_serve_tensor(tensor, name, dtype);
  for (size_t i = 0; i < needs.size(); ++i)
    TORCH_CHECK_VALUE(tensors[i].numel() >= needs[i], "serve_run: expected ", name, " ", i, " of ", needs[i],
                      " numbers at least, got ", tensors[i].numel(), ".");
}

}  // namespace

void check_serve(const at::Tensor& arena, const at::Tensor& program, const at::Tensor& ints, const at::Tensor& values,
                 at::TensorList inputs, at::TensorList outputs) {
  const at::ScalarType dtype = arena.scalar_type();
  TORCH_CHECK_TYPE(dtype == at::kFloat || dtype == at::kDouble, "serve_run: expected an arena of float32 or float64, got ",
                   dtype, ".");
  check_serve_tensor(arena, "arena", dtype);
  check_serve_tensor(program, "program", at::kLong);
  check_serve_tensor(ints, "ints", at::kInt);
  check_serve_tensor(values, "values", dtype);
  // Never destroyed: a thread may still run an op when the process exits.
  static auto* const plans = new Remembered<3, std::shared_ptr<const Needs>>;
  const auto needs = plans->get({&program, &ints, &values}, 0, [&] {
    return std::make_shared<const Needs>(Checker(program, ints, values).check());
  });
  TORCH_CHECK_VALUE(arena.numel() >= needs->arena, "serve_run: expected an arena of ", needs->arena,
                    " numbers at least, got ", arena.numel(), ".");
  check_sizes(inputs, "input", needs->inputs, dtype);
  check_sizes(outputs, "output", needs->outputs, dtype);
  const auto check_apart_of = [&](const at::Tensor& written) {
    bool apart = are_apart(written, program) && are_apart(written, ints) && are_apart(written, values);
    for (const at::Tensor& input : inputs) apart &= are_apart(written, input);
    TORCH_CHECK_VALUE(apart, "serve_run: expected arena and outputs that share no memory with what is read.");
  };
  check_apart_of(arena);
  for (size_t i = 0; i < outputs.size(); ++i) {
    check_apart_of(outputs[i]);
    bool apart = are_apart(outputs[i], arena);
    for (size_t j = 0; j < i; ++j) apart &= are_apart(outputs[i], outputs[j]);
    TORCH_CHECK_VALUE(apart, "serve_run: expected arena and outputs that share no memory.");
  }
}

}  // namespace uasparse
