// The unknown-aware loss in CUDA (formula: uasparse_kernels/ops/unknown_aware_loss.py): one forward and one backward launch,
// or both in one.
//
// Up to 512 classes a team of 4 to 32 lanes handles a row (as many as a row of so many classes keeps busy). Each lane runs
// an online softmax over its share of the K known classes, and shuffles combine the lanes' states. A row of more classes
// has a block: its threads read chunks of 16 bytes, four under way each, and one warp combines what they found.
//
// A row leaves its maximum and its sum of exponentials, the sum's sign telling a right prediction (negative); a backward
// recomputes the rest. Where a gradient is wanted the forward writes it at once, for the gradient of the loss that the
// last backward came with (1 at first): each thread keeps its chunks in shared memory between the two, as many as fit, so
// that device memory is read once and written once. The backward then looks, on the device, whether that was right, and
// does again what was not, by the same arithmetic: results do not depend on the guess.
//
// Sums over rows are deterministic: every block writes its partial sums, and the block that finishes last adds all of
// them in order.

#undef NDEBUG  // a target out of range stops the kernel, as in torch
#include "cuda/unknown_aware_loss.h"

#include <cassert>

#include "cuda/launch.cuh"
#include "cuda/shared.cuh"
#include "cuda/unknown_aware_loss_row.cuh"

namespace uasparse {
namespace {

constexpr int kThreads = 128;     // of a block of teams
constexpr int kMaxThreads = 1024;  // of a block for one row
constexpr int kMaxTeam = 32;
constexpr int kAtOnce = 4;            // classes that a lane has under way
constexpr int kOwnShared = 6 << 10;   // bytes that the kernels below have for other things than chunks, or less
constexpr int64_t kMaxBlocks = 1024;  // more rows: each team, or block, takes several

template <typename T, typename Acc>
struct Problem {
  const T* logits;
  const int64_t* target;
  const Acc* alpha;
  int64_t rows;
  int classes;
  int reduction;
  Acc unknown_weight;
};

template <typename Acc>
struct Results {
  Acc *loss, *threshold, *saved;
  unsigned* ticket;
  struct Partial* partials;
};

struct Partial {
  double loss, threshold;
  int64_t known;
};

template <typename T, typename Acc>
__device__ Target<Acc> target_of(const Problem<T, Acc>& problem, int64_t row, const T* z) {
  const int64_t target = problem.target[row];
  assert(target >= 0 && target < problem.classes && "unknown_aware_loss: target out of range");
  const int unknown = problem.classes - 1;
  return {static_cast<int>(target), unknown, to_acc(z[target]), to_acc(z[unknown])};
}

// The gradient of a row's loss, of that of the result.
template <typename T, typename Acc>
__device__ Acc share_of(const Problem<T, Acc>& problem, Acc grad_loss) {
  return problem.reduction == 1 ? grad_loss / Acc(problem.rows) : grad_loss;
}

// Of a row, by the one thread that has it: what goes to memory, and to the sums. made_for: the gradient of the loss that
// the row's gradient is made for, where it is made.
template <typename T, typename Acc>
__device__ void keep_row(const Problem<T, Acc>& problem, const Results<Acc>& results, int64_t row, const Row<Acc>& done,
                         bool known, bool at_once, Acc made_for, Partial& partial) {
  const int stride = at_once ? 3 : 2;
  if (problem.reduction == 0) results.loss[row] = done.loss;
  results.saved[stride * row] = done.base;
  results.saved[stride * row + 1] = done.sum;
  if (at_once) results.saved[stride * row + 2] = made_for;
  partial.loss += static_cast<double>(done.loss);
  partial.threshold += static_cast<double>(done.threshold);
  partial.known += known;
}

// The sum over the block's first kThreads threads (those after them have none), in thread 0, in a fixed order.
__device__ inline Partial sum_block(Partial mine) {
  __shared__ Partial sums[kThreads];
  __syncthreads();
  if (threadIdx.x < kThreads) sums[threadIdx.x] = mine;
  __syncthreads();
  for (unsigned step = kThreads / 2; step > 0; step /= 2) {
    if (threadIdx.x < step) {
      sums[threadIdx.x].loss += sums[threadIdx.x + step].loss;
      sums[threadIdx.x].threshold += sums[threadIdx.x + step].threshold;
      sums[threadIdx.x].known += sums[threadIdx.x + step].known;
    }
    __syncthreads();
  }
  return sums[0];
}

// Adds the partial sums of all blocks, in the block that comes last.
template <typename T, typename Acc>
__device__ void finish_sums(const Problem<T, Acc>& problem, const Results<Acc>& results, Partial mine) {
  __shared__ bool is_last;
  mine = sum_block(mine);
  if (threadIdx.x == 0) {
    results.partials[blockIdx.x] = mine;
    __threadfence();
    is_last = atomicAdd(results.ticket, 1u) == gridDim.x - 1;
    __threadfence();
  }
  __syncthreads();
  if (!is_last) return;
  Partial all{0, 0, 0};
  const volatile Partial* written = results.partials;
  if (threadIdx.x < kThreads)
    for (unsigned b = threadIdx.x; b < gridDim.x; b += kThreads) {
      all.loss += written[b].loss;
      all.threshold += written[b].threshold;
      all.known += written[b].known;
    }
  all = sum_block(all);
  if (threadIdx.x != 0) return;
  if (problem.reduction != 0)
    *results.loss = static_cast<Acc>(problem.reduction == 1 ? all.loss / static_cast<double>(problem.rows) : all.loss);
  *results.threshold = static_cast<Acc>(all.known > 0 ? all.threshold / static_cast<double>(all.known) : 0.0);
}

// --- teams of lanes --------------------------------------------------------------------------------------------------

// kAtOnce neighbouring shares of a lane's row, j, j + kTeam and so on, as far as `end`: loads that wait for none of what is
// done with them. Past the end comes minus infinity.
template <int kTeam, typename Acc, typename T>
__device__ inline void load(const T* row, int j, int end, Acc (&z)[kAtOnce]) {
#pragma unroll
  for (int i = 0; i < kAtOnce; ++i) z[i] = j + i * kTeam < end ? to_acc(row[j + i * kTeam]) : minus_infinity<Acc>();
}

template <int kTeam, typename T, typename Acc>
__device__ inline void write_row(const T* z, T* grad, const Target<Acc>& at, const Gradient<Acc>& row, int lane) {
  const int classes = at.unknown + 1;
  for (int j = lane; j < classes; j += kAtOnce * kTeam) {
    Acc some[kAtOnce];
    load<kTeam>(z, j, classes, some);
    to_gradients<T>(some, j, kTeam, row, at.target, at.unknown);
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i)
      if (j + i * kTeam < classes) assign(grad[j + i * kTeam], some[i]);
  }
}

template <typename T, typename Acc, int kTeam>
__global__ void __launch_bounds__(kThreads)
    teams_forward(Problem<T, Acc> problem, Results<Acc> results, const Acc* expected, T* grad) {
  constexpr int kTeams = kThreads / kTeam;
  const int lane = threadIdx.x % kTeam, team = threadIdx.x / kTeam;
  const Acc alpha = *problem.alpha;
  // Read once a warp: a backward on another stream may write to it, and a row is made for what it says it is.
  const Acc made_for = grad == nullptr ? Acc(0) : __shfl_sync(kAll, *expected, 0);
  Partial partial{0, 0, 0};
  // All teams of a block go on together, so that shuffles find every lane.
  for (int64_t first = static_cast<int64_t>(blockIdx.x) * kTeams; first < problem.rows;
       first += static_cast<int64_t>(gridDim.x) * kTeams) {
    const int64_t row = first + team;
    const bool present = row < problem.rows;
    const T* z = problem.logits + (present ? row : 0) * problem.classes;
    State<Acc> state = nothing_seen<Acc>();
    if (present)
      for (int j = lane; j < problem.classes - 1; j += kAtOnce * kTeam) {
        Acc some[kAtOnce];
        load<kTeam>(z, j, problem.classes - 1, some);
        add<T>(state, some, j, kTeam);
      }
    state = combine_lanes<kTeam>(state);
    if (!present || (lane != 0 && grad == nullptr)) continue;
    const Target<Acc> at = target_of(problem, row, z);
    const Row<Acc> done = finish_row(at, state, alpha, problem.unknown_weight);
    if (lane == 0) keep_row(problem, results, row, done, at.target != at.unknown, grad != nullptr, made_for, partial);
    if (grad == nullptr) continue;
    const Acc g = share_of(problem, made_for);
    const Gradient<Acc> slope = gradient_of(at, done.base, done.sum, alpha, problem.unknown_weight, g);
    write_row<kTeam>(z, grad + row * problem.classes, at, slope, lane);
  }
  finish_sums(problem, results, partial);
}

template <typename T, typename Acc, int kTeam>
__global__ void __launch_bounds__(kThreads)
    teams_backward(Problem<T, Acc> problem, const Acc* grad_loss, const Acc* saved, Acc* expected, T* grad) {
  constexpr int kTeams = kThreads / kTeam;
  const int lane = threadIdx.x % kTeam, team = threadIdx.x / kTeam, stride = expected == nullptr ? 2 : 3;
  const Acc alpha = *problem.alpha;
  if (expected != nullptr && blockIdx.x == 0 && threadIdx.x == 0) *expected = *grad_loss;
  for (int64_t row = static_cast<int64_t>(blockIdx.x) * kTeams + team; row < problem.rows;
       row += static_cast<int64_t>(gridDim.x) * kTeams) {
    const Acc given = problem.reduction == 0 ? grad_loss[row] : *grad_loss;
    if (expected != nullptr && saved[stride * row + 2] == given) continue;
    const T* z = problem.logits + row * problem.classes;
    const Target<Acc> at = target_of(problem, row, z);
    const Gradient<Acc> slope = gradient_of(at, saved[stride * row], saved[stride * row + 1], alpha,
                                            problem.unknown_weight, share_of(problem, given));
    write_row<kTeam>(z, grad + row * problem.classes, at, slope, lane);
  }
}

// --- a block for each row --------------------------------------------------------------------------------------------

// Chunks that a thread has under way, the threads of a block at most, and the blocks of a multiprocessor at least: what
// registers allow. Of 32001 classes in 16 bits two rows fit into shared memory, and one is read while the other is written.
template <typename T>
constexpr int kChunksAtOnce = sizeof(T) == 4 ? 4 : 2;
template <typename T>
constexpr int kRowThreads = sizeof(T) == 4 ? kMaxThreads : kMaxThreads / 2;
template <typename T>
constexpr int kRowBlocks = sizeof(T) == 2 ? 2 : 1;

template <typename T, typename Acc>
__device__ inline void unpack(const Chunk<T>& chunk, Acc (&z)[Chunk<T>::kCount]) {
#pragma unroll
  for (int i = 0; i < Chunk<T>::kCount; ++i) z[i] = to_acc(chunk.at[i]);
}

// The state of the classes that this thread has. It keeps its first chunks, up to number `kept` of the row.
template <typename T, typename Acc>
__device__ State<Acc> read_row(const T* z, const Span<T>& span, Chunk<T>* cache, int kept) {
  const int threads = static_cast<int>(blockDim.x), thread = static_cast<int>(threadIdx.x);
  const Chunk<T>* const body = reinterpret_cast<const Chunk<T>*>(z + span.head);
  State<Acc> state = nothing_seen<Acc>(), singles = nothing_seen<Acc>();
  for (int c = thread; c < span.chunks; c += kChunksAtOnce<T> * threads) {
    Chunk<T> some[kChunksAtOnce<T>];
#pragma unroll
    for (int i = 0; i < kChunksAtOnce<T>; ++i)
      if (c + i * threads < span.chunks) some[i] = body[c + i * threads];
#pragma unroll
    for (int i = 0; i < kChunksAtOnce<T>; ++i) {
      const int at = c + i * threads;
      if (at >= span.chunks) break;
      if (at < kept) cache[at] = some[i];
      Acc values[Chunk<T>::kCount];
      unpack(some[i], values);
      add<T>(state, values, span.chunk_begin(at), 1);
    }
  }
  for (int i = thread; i < span.singles() - 1; i += threads) {  // but unknown, the last
    const Acc value[1] = {to_acc(z[span.single(i)])};
    add<T>(singles, value, span.single(i), 1);
  }
  return combine(state, singles);
}

// The gradient of the classes that this thread has, from the chunks that it kept.
template <typename T, typename Acc>
__device__ void write_row(const T* z, T* grad, const Span<T>& span, const Chunk<T>* cache, int kept,
                          const Gradient<Acc>& row, int target) {
  const int threads = static_cast<int>(blockDim.x), thread = static_cast<int>(threadIdx.x), unknown = span.classes - 1;
  const Chunk<T>* const body = reinterpret_cast<const Chunk<T>*>(z + span.head);
  Chunk<T>* const to = reinterpret_cast<Chunk<T>*>(grad + span.head);
#pragma unroll 2
  for (int c = thread; c < span.chunks; c += threads) {
    Chunk<T> chunk = c < kept ? cache[c] : body[c];
    Acc values[Chunk<T>::kCount];
    unpack(chunk, values);
    to_gradients<T>(values, span.chunk_begin(c), 1, row, target, unknown);
#pragma unroll
    for (int i = 0; i < Chunk<T>::kCount; ++i) assign(chunk.at[i], values[i]);
    to[c] = chunk;
  }
  for (int i = thread; i < span.singles(); i += threads) {
    const int j = span.single(i);
    Acc value[1] = {to_acc(z[j])};
    to_gradients<T>(value, j, 1, row, target, unknown);
    assign(grad[j], value[0]);
  }
}

// kept: chunks that the shared memory holds; 0 without a gradient.
template <typename T, typename Acc>
__global__ void __launch_bounds__(kRowThreads<T>, kRowBlocks<T>)
    row_forward(Problem<T, Acc> problem, Results<Acc> results, const Acc* expected, T* grad, int kept) {
  UASPARSE_DYNAMIC_SHARED(Words<4>, shared);
  Chunk<T>* const cache = reinterpret_cast<Chunk<T>*>(shared);
  __shared__ State<Acc> of_warps[kMaxThreads / 32];
  __shared__ Gradient<Acc> slope;
  __shared__ int target;
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
  const Acc alpha = *problem.alpha;
  const Acc made_for = grad == nullptr ? Acc(0) : *expected;  // read once, as in teams_forward; the first thread's counts
  Partial partial{0, 0, 0};
  for (int64_t row = blockIdx.x; row < problem.rows; row += gridDim.x) {
    const T* const z = problem.logits + row * problem.classes;
    T* const grad_row = grad == nullptr ? nullptr : grad + row * problem.classes;
    Target<Acc> at{};
    if (threadIdx.x == 0) at = target_of(problem, row, z);  // early: two loads that wait for each other
    const Span<T> span(z, grad_row, problem.classes);
    State<Acc> state = combine_lanes<32>(read_row<T, Acc>(z, span, cache, kept));
    if (lane == 0) of_warps[warp] = state;
    __syncthreads();  // and the last row's slope has been read
    if (warp == 0) {
      state = combine_lanes<32>(lane < static_cast<int>(blockDim.x) / 32 ? of_warps[lane] : nothing_seen<Acc>());
      if (lane == 0) {
        const Row<Acc> done = finish_row(at, state, alpha, problem.unknown_weight);
        keep_row(problem, results, row, done, at.target != at.unknown, grad != nullptr, made_for, partial);
        if (grad != nullptr) {
          const Acc g = share_of(problem, made_for);
          slope = gradient_of(at, done.base, done.sum, alpha, problem.unknown_weight, g);
          target = at.target;
        }
      }
    }
    __syncthreads();  // of_warps has been read, the slope is there
    if (grad != nullptr) write_row(z, grad_row, span, cache, kept, slope, target);
  }
  finish_sums(problem, results, partial);
}

template <typename T, typename Acc>
__global__ void __launch_bounds__(kRowThreads<T>, kRowBlocks<T>)
    row_backward(Problem<T, Acc> problem, const Acc* grad_loss, const Acc* saved, Acc* expected, T* grad) {
  __shared__ Gradient<Acc> slope;
  __shared__ int target;
  const int stride = expected == nullptr ? 2 : 3;
  const Acc alpha = *problem.alpha;
  if (expected != nullptr && blockIdx.x == 0 && threadIdx.x == 0) *expected = *grad_loss;
  for (int64_t row = blockIdx.x; row < problem.rows; row += gridDim.x) {
    const Acc given = problem.reduction == 0 ? grad_loss[row] : *grad_loss;
    if (expected != nullptr && saved[stride * row + 2] == given) continue;  // for all threads alike
    const T* const z = problem.logits + row * problem.classes;
    T* const grad_row = grad + row * problem.classes;
    __syncthreads();  // the last row's slope has been read
    if (threadIdx.x == 0) {
      const Target<Acc> at = target_of(problem, row, z);
      slope = gradient_of(at, saved[stride * row], saved[stride * row + 1], alpha, problem.unknown_weight,
                          share_of(problem, given));
      target = at.target;
    }
    __syncthreads();
    const Span<T> span(z, grad_row, problem.classes);
    write_row(z, grad_row, span, static_cast<const Chunk<T>*>(nullptr), 0, slope, target);
  }
}

// --- launches --------------------------------------------------------------------------------------------------------

// Lanes for a row: about four classes each, sixteen where a warp serves; 0 where it has a block.
int team_of(int64_t classes) {
  if (classes <= 16) return 4;
  if (classes <= 32) return 8;
  if (classes <= 64) return 16;
  return classes <= 512 ? kMaxTeam : 0;
}

int64_t blocks_of(const LossArguments& a) {
  const int team = team_of(a.classes);
  const int64_t teams = team > 0 ? kThreads / team : 1, blocks = (a.rows + teams - 1) / teams;
  return blocks < kMaxBlocks ? blocks : kMaxBlocks;
}

template <typename T, typename Acc>
Problem<T, Acc> problem_of(const LossArguments& a) {
  return {static_cast<const T*>(a.logits), a.target, static_cast<const Acc*>(a.alpha), a.rows,
          static_cast<int>(a.classes), a.reduction, static_cast<Acc>(a.unknown_weight)};
}

template <typename T, typename Acc>
struct Launch {
  const LossArguments& a;
  cudaStream_t stream;

  cudaError_t forward(void* loss, void* threshold, void* saved, void* workspace, const void* expected_, void* grad_) {
    const Results<Acc> results{static_cast<Acc*>(loss), static_cast<Acc*>(threshold), static_cast<Acc*>(saved),
                               static_cast<unsigned*>(workspace),
                               reinterpret_cast<Partial*>(static_cast<char*>(workspace) + alignof(Partial))};
    const Acc* const expected = static_cast<const Acc*>(expected_);
    T* const grad = static_cast<T*>(grad_);
    switch (team_of(a.classes)) {
      case 4: return teams(teams_forward<T, Acc, 4>, results, expected, grad);
      case 8: return teams(teams_forward<T, Acc, 8>, results, expected, grad);
      case 16: return teams(teams_forward<T, Acc, 16>, results, expected, grad);
      case kMaxTeam: return teams(teams_forward<T, Acc, kMaxTeam>, results, expected, grad);
      default: break;
    }
    const int64_t chunks = (a.classes + Chunk<T>::kCount - 1) / Chunk<T>::kCount;
    const int64_t room = a.shared_bytes > kOwnShared ? (a.shared_bytes - kOwnShared) / 16 : 0;
    const int kept = grad == nullptr ? 0 : static_cast<int>(chunks < room ? chunks : room);
    return launch_shared(row_forward<T, Acc>, blocks_of(a), threads(), 16 * kept, stream, problem_of<T, Acc>(a), results,
                         expected, grad, kept);
  }

  cudaError_t backward(const void* grad_loss_, const void* saved_, void* expected_, void* grad_) {
    const Acc* const grad_loss = static_cast<const Acc*>(grad_loss_);
    const Acc* const saved = static_cast<const Acc*>(saved_);
    Acc* const expected = static_cast<Acc*>(expected_);
    T* const grad = static_cast<T*>(grad_);
    switch (team_of(a.classes)) {
      case 4: return teams(teams_backward<T, Acc, 4>, grad_loss, saved, expected, grad);
      case 8: return teams(teams_backward<T, Acc, 8>, grad_loss, saved, expected, grad);
      case 16: return teams(teams_backward<T, Acc, 16>, grad_loss, saved, expected, grad);
      case kMaxTeam: return teams(teams_backward<T, Acc, kMaxTeam>, grad_loss, saved, expected, grad);
      default: break;
    }
    return launch(row_backward<T, Acc>, blocks_of(a), threads(), stream, problem_of<T, Acc>(a), grad_loss, saved,
                  expected, grad);
  }

 private:
  // Of a block for one row: four chunks for each.
  int threads() const {
    int threads = kThreads;
    while (threads < kRowThreads<T> && threads * 4 * Chunk<T>::kCount < a.classes) threads *= 2;
    return threads;
  }

  template <typename Kernel, typename... Arguments>
  cudaError_t teams(Kernel kernel, Arguments... arguments) {
    return launch(kernel, blocks_of(a), kThreads, stream, problem_of<T, Acc>(a), arguments...);
  }
};

template <typename Call>
cudaError_t with_type(const LossArguments& a, cudaStream_t stream, Call call) {
  switch (a.type) {
    case LogitType::kFloat: return call(Launch<float, float>{a, stream});
    case LogitType::kDouble: return call(Launch<double, double>{a, stream});
    case LogitType::kHalf: return call(Launch<__half, float>{a, stream});
    case LogitType::kBFloat16: return call(Launch<__nv_bfloat16, float>{a, stream});
  }
  return cudaErrorInvalidValue;
}

}  // namespace

size_t loss_workspace_bytes(const LossArguments& arguments) {
  return alignof(Partial) + static_cast<size_t>(blocks_of(arguments)) * sizeof(Partial);
}

cudaError_t launch_loss_forward(const LossArguments& arguments, void* loss, void* threshold, void* saved,
                                void* workspace, const void* expected, void* grad, cudaStream_t stream) {
  return with_type(arguments, stream, [&](auto launch) {
    return launch.forward(loss, threshold, saved, workspace, expected, grad);
  });
}

cudaError_t launch_loss_backward(const LossArguments& arguments, const void* grad_loss, const void* saved,
                                 void* expected, void* grad, cudaStream_t stream) {
  return with_type(arguments, stream, [&](auto launch) { return launch.backward(grad_loss, saved, expected, grad); });
}

}  // namespace uasparse
