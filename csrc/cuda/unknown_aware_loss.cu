// The unknown-aware loss in CUDA (formula: uasparse_kernels/ops/unknown_aware_loss.py): one forward and one backward launch.
//
// A team of threads handles a row: 4 to 32 lanes of a warp (as many as a row of so many classes keeps busy), or a whole
// block where a row has more than 512 classes. Each lane runs an online softmax over its share of the K known classes, some
// at a time, and the lanes' states are combined by shuffles (and through shared memory in a block). A row leaves its maximum
// and its sum of exponentials, the sum's sign telling a right prediction (negative), and the backward recomputes the rest.
//
// Sums over rows are deterministic: every block writes its partial sums, and the block that finishes last adds all of
// them in order.

#undef NDEBUG  // a target out of range stops the kernel, as in torch
#include "cuda/unknown_aware_loss.h"

#include <cassert>
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "cuda/launch.cuh"

namespace uasparse {
namespace {

constexpr int kThreads = 128;
constexpr int kWarps = kThreads / 32;
constexpr int kAtOnce = 4;  // classes that a lane has under way
constexpr unsigned kAll = 0xffffffffu;
constexpr int64_t kMaxBlocks = 1024;  // more rows: each team takes several
constexpr double kLeastKnown = 1e-7;  // 1 - u is at least this

template <typename T>
struct Problem {
  const T* logits;
  const int64_t* target;
  int64_t rows, classes;
  int reduction;
};

struct Partial {
  double loss, threshold;
  int64_t known;
};

__device__ inline float to_acc(float x) { return x; }
__device__ inline double to_acc(double x) { return x; }
__device__ inline float to_acc(__half x) { return __half2float(x); }
__device__ inline float to_acc(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ inline void assign(float& to, float x) { to = x; }
__device__ inline void assign(double& to, double x) { to = x; }
__device__ inline void assign(__half& to, float x) { to = __float2half(x); }
__device__ inline void assign(__nv_bfloat16& to, float x) { to = __float2bfloat16(x); }
__device__ inline float exp_of(float x) { return expf(x); }
__device__ inline double exp_of(double x) { return exp(x); }
__device__ inline float log_of(float x) { return logf(x); }
__device__ inline double log_of(double x) { return log(x); }

// Online softmax over some known classes: maximum, the first index that has it, and sum of exp(z - maximum).
template <typename Acc>
struct State {
  Acc max, sum;
  int64_t first;
};

template <typename Acc>
__device__ inline Acc minus_infinity() {
  return -static_cast<Acc>(INFINITY);
}

// kAtOnce neighbouring shares of a lane's row, j, j + kTeam and so on, as far as `end`: loads that wait for none of what is
// done with them. Past the end comes minus infinity.
template <int kTeam, typename Acc, typename T>
__device__ inline void load(const T* row, int64_t j, int64_t end, Acc (&z)[kAtOnce]) {
#pragma unroll
  for (int i = 0; i < kAtOnce; ++i) z[i] = j + i * kTeam < end ? to_acc(row[j + i * kTeam]) : minus_infinity<Acc>();
}

template <int kTeam, typename Acc>
__device__ inline void add(State<Acc>& state, const Acc (&z)[kAtOnce], int64_t j) {
  Acc max = state.max;
#pragma unroll
  for (int i = 0; i < kAtOnce; ++i)
    if (z[i] > max) {
      max = z[i];
      state.first = j + i * kTeam;
    }
  if (max > state.max) state.sum *= exp_of(state.max - max);
  state.max = max;
#pragma unroll
  for (int i = 0; i < kAtOnce; ++i)
    if (z[i] != minus_infinity<Acc>()) state.sum += exp_of(z[i] - max);  // NaN comes here and stays
}

template <typename Acc>
__device__ inline State<Acc> combine(State<Acc> a, State<Acc> b) {
  if (b.max > a.max || (b.max == a.max && b.first < a.first)) {
    const State<Acc> swapped = a;
    a = b;
    b = swapped;
  }
  // Where b has seen nothing but -inf its sum is 0 (or NaN), to be added as it is.
  a.sum += b.max == minus_infinity<Acc>() ? b.sum : b.sum * exp_of(b.max - a.max);
  return a;
}

// The state of the whole row, in every thread of its team. All threads of the block call it together.
template <typename Acc, int kTeam>
__device__ State<Acc> combine_team(State<Acc> state) {
  constexpr int kLanes = kTeam < 32 ? kTeam : 32;
  for (int step = kLanes / 2; step > 0; step /= 2) {
    State<Acc> other;
    other.max = __shfl_xor_sync(kAll, state.max, step);
    other.sum = __shfl_xor_sync(kAll, state.sum, step);
    other.first = __shfl_xor_sync(kAll, state.first, step);
    state = combine(state, other);
  }
  if (kTeam > 32) {
    __shared__ State<Acc> warps[kWarps];
    __syncthreads();  // the last row's states have been read
    if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = state;
    __syncthreads();
    state = warps[0];
    for (int w = 1; w < kWarps; ++w) state = combine(state, warps[w]);
  }
  return state;
}

template <typename Acc>
struct Row {
  Acc loss, threshold, base, sum;  // the sum is negative for a right prediction
};

template <typename T, typename Acc>
__device__ Row<Acc> finish_row(const Problem<T>& problem, const T* z, int64_t target, State<Acc> state, Acc alpha,
                               Acc unknown_weight) {
  const int64_t unknown = problem.classes - 1;
  const Acc z_unknown = to_acc(z[unknown]), others_max = state.max;
  const Acc max = z_unknown > others_max ? z_unknown : others_max;
  const Acc base = max == minus_infinity<Acc>() ? Acc(0) : max;
  const Acc others = others_max == minus_infinity<Acc>() ? state.sum : state.sum * exp_of(others_max - base);
  const Acc unknown_share = exp_of(z_unknown - base);
  const Acc sum = others + unknown_share;  // NaN where the maximum is +inf, as in torch
  const Acc h = (base - to_acc(z[target])) + log_of(sum);
  if (target == unknown) return {unknown_weight * h, Acc(0), base, sum};
  const bool correct = state.first == target && !(z_unknown > others_max);
  const Acc share = others / sum, known = share < Acc(kLeastKnown) ? Acc(kLeastKnown) : share;
  // u too without cancellation: a large alpha meets a small u.
  const Acc p = unknown_share / sum, u = p > Acc(1 - kLeastKnown) ? Acc(1 - kLeastKnown) : p;
  const Acc w = correct ? Acc(1) : 1 + alpha / (1 + alpha * u);
  return {w * h, known * h, base, correct ? -sum : sum};
}

// The sum over the block's threads, in thread 0, in a fixed order.
__device__ inline Partial sum_block(Partial mine) {
  __shared__ Partial sums[kThreads];
  __syncthreads();
  sums[threadIdx.x] = mine;
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
template <typename Acc>
__device__ void finish_sums(Partial mine, int64_t rows, int reduction, Acc* loss, Acc* threshold, unsigned* ticket,
                            Partial* partials) {
  __shared__ bool is_last;
  mine = sum_block(mine);
  if (threadIdx.x == 0) {
    partials[blockIdx.x] = mine;
    __threadfence();
    is_last = atomicAdd(ticket, 1u) == gridDim.x - 1;
    __threadfence();
  }
  __syncthreads();
  if (!is_last) return;
  Partial all{0, 0, 0};
  const volatile Partial* written = partials;
  for (unsigned b = threadIdx.x; b < gridDim.x; b += kThreads) {
    all.loss += written[b].loss;
    all.threshold += written[b].threshold;
    all.known += written[b].known;
  }
  all = sum_block(all);
  if (threadIdx.x != 0) return;
  if (reduction != 0) *loss = static_cast<Acc>(reduction == 1 ? all.loss / static_cast<double>(rows) : all.loss);
  *threshold = static_cast<Acc>(all.known > 0 ? all.threshold / static_cast<double>(all.known) : 0.0);
}

template <typename T, typename Acc, int kTeam>
__global__ void __launch_bounds__(kThreads)
    forward_kernel(Problem<T> problem, const Acc* alpha_at, Acc unknown_weight, Acc* loss, Acc* threshold, Acc* saved,
                   unsigned* ticket, Partial* partials) {
  constexpr int kTeams = kThreads / kTeam;
  const int lane = threadIdx.x % kTeam, team = threadIdx.x / kTeam;
  const Acc alpha = *alpha_at;
  Partial partial{0, 0, 0};
  // All teams of a block go on together, so that shuffles and barriers find every thread.
  for (int64_t first = static_cast<int64_t>(blockIdx.x) * kTeams; first < problem.rows;
       first += static_cast<int64_t>(gridDim.x) * kTeams) {
    const int64_t row = first + team;
    const bool present = row < problem.rows;
    const T* z = problem.logits + (present ? row : 0) * problem.classes;
    State<Acc> state{minus_infinity<Acc>(), 0, INT64_MAX};
    if (present)
      for (int64_t j = lane; j < problem.classes - 1; j += kAtOnce * kTeam) {
        Acc some[kAtOnce];
        load<kTeam>(z, j, problem.classes - 1, some);
        add<kTeam>(state, some, j);
      }
    state = combine_team<Acc, kTeam>(state);
    if (!present || lane != 0) continue;
    const int64_t target = problem.target[row];
    assert(target >= 0 && target < problem.classes && "unknown_aware_loss: target out of range");
    const Row<Acc> done = finish_row(problem, z, target, state, alpha, unknown_weight);
    if (problem.reduction == 0) loss[row] = done.loss;
    saved[2 * row] = done.base;
    saved[2 * row + 1] = done.sum;
    partial.loss += static_cast<double>(done.loss);
    partial.threshold += static_cast<double>(done.threshold);
    partial.known += target != problem.classes - 1;
  }
  finish_sums(partial, problem.rows, problem.reduction, loss, threshold, ticket, partials);
}

template <typename T, typename Acc, int kTeam>
__global__ void __launch_bounds__(kThreads)
    backward_kernel(Problem<T> problem, const Acc* alpha_at, Acc unknown_weight, const Acc* grad_loss, const Acc* saved,
                    T* grad) {
  constexpr int kTeams = kThreads / kTeam;
  constexpr Acc largest = Acc(1 - kLeastKnown);
  const int lane = threadIdx.x % kTeam, team = threadIdx.x / kTeam;
  const Acc alpha = *alpha_at;
  const int64_t unknown = problem.classes - 1;
  for (int64_t row = static_cast<int64_t>(blockIdx.x) * kTeams + team; row < problem.rows;
       row += static_cast<int64_t>(gridDim.x) * kTeams) {
    const T* z = problem.logits + row * problem.classes;
    const int64_t target = problem.target[row];
    const Acc base = saved[2 * row], signed_sum = saved[2 * row + 1], sum = signed_sum < 0 ? -signed_sum : signed_sum;
    const Acc g = problem.reduction == 0 ? grad_loss[row]
                                         : (problem.reduction == 1 ? *grad_loss / Acc(problem.rows) : *grad_loss);
    Acc w = unknown_weight, through_u = 0;
    if (target != unknown) {
      w = 1;
      if (!(signed_sum < 0)) {
        const Acc h = (base - to_acc(z[target])) + log_of(sum), p = exp_of(to_acc(z[unknown]) - base) / sum;
        const Acc u = p < largest ? p : largest, slope = alpha / (1 + alpha * u);
        w += slope;
        // At the clamp the gradient stops; where h is infinite, w counts as a constant (the loss says enough).
        if (u < largest && h != static_cast<Acc>(INFINITY)) through_u = -h * slope * slope * u;
      }
    }
    const Acc scale = g * (w - through_u) / sum;
    for (int64_t first = lane; first < problem.classes; first += kAtOnce * kTeam) {
      Acc some[kAtOnce];
      load<kTeam>(z, first, problem.classes, some);
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        const int64_t j = first + i * kTeam;
        if (j >= problem.classes) break;
        Acc value = scale * exp_of(some[i] - base);
        if (j == target) value -= g * w;
        if (j == unknown) value += g * through_u;
        assign(grad[row * problem.classes + j], value);
      }
    }
  }
}

// Threads for a row: about four classes each, sixteen where a warp serves, as many as there are for a block.
int team_of(int64_t classes) {
  if (classes <= 16) return 4;
  if (classes <= 32) return 8;
  if (classes <= 64) return 16;
  return classes <= 512 ? 32 : kThreads;
}

int64_t blocks_of(const LossArguments& arguments) {
  const int64_t teams = kThreads / team_of(arguments.classes), blocks = (arguments.rows + teams - 1) / teams;
  return blocks < kMaxBlocks ? blocks : kMaxBlocks;
}

template <typename T>
Problem<T> problem_of(const LossArguments& a) {
  return {static_cast<const T*>(a.logits), a.target, a.rows, a.classes, a.reduction};
}

template <typename T, typename Acc, int kTeam>
cudaError_t forward(const LossArguments& a, void* loss, void* threshold, void* saved, void* workspace,
                    cudaStream_t stream) {
  return launch(forward_kernel<T, Acc, kTeam>, blocks_of(a), kThreads, stream, problem_of<T>(a),
                static_cast<const Acc*>(a.alpha), static_cast<Acc>(a.unknown_weight), static_cast<Acc*>(loss),
                static_cast<Acc*>(threshold), static_cast<Acc*>(saved), static_cast<unsigned*>(workspace),
                reinterpret_cast<Partial*>(static_cast<char*>(workspace) + alignof(Partial)));
}

template <typename T, typename Acc, int kTeam>
cudaError_t backward(const LossArguments& a, const void* grad_loss, const void* saved, void* grad, cudaStream_t stream) {
  return launch(backward_kernel<T, Acc, kTeam>, blocks_of(a), kThreads, stream, problem_of<T>(a),
                static_cast<const Acc*>(a.alpha), static_cast<Acc>(a.unknown_weight), static_cast<const Acc*>(grad_loss),
                static_cast<const Acc*>(saved), static_cast<T*>(grad));
}

#define UASPARSE_LOSS_TEAMS(call, T, Acc, ...)                    \
  switch (team_of(arguments.classes)) {                           \
    case 4: return call<T, Acc, 4>(arguments, __VA_ARGS__);       \
    case 8: return call<T, Acc, 8>(arguments, __VA_ARGS__);       \
    case 16: return call<T, Acc, 16>(arguments, __VA_ARGS__);     \
    case 32: return call<T, Acc, 32>(arguments, __VA_ARGS__);     \
    default: return call<T, Acc, kThreads>(arguments, __VA_ARGS__); \
  }

#define UASPARSE_LOSS_TYPES(call, ...)                                                       \
  switch (arguments.type) {                                                                  \
    case LogitType::kFloat: UASPARSE_LOSS_TEAMS(call, float, float, __VA_ARGS__)             \
    case LogitType::kDouble: UASPARSE_LOSS_TEAMS(call, double, double, __VA_ARGS__)          \
    case LogitType::kHalf: UASPARSE_LOSS_TEAMS(call, __half, float, __VA_ARGS__)             \
    case LogitType::kBFloat16: UASPARSE_LOSS_TEAMS(call, __nv_bfloat16, float, __VA_ARGS__)  \
  }

}  // namespace

size_t loss_workspace_bytes(const LossArguments& arguments) {
  return alignof(Partial) + static_cast<size_t>(blocks_of(arguments)) * sizeof(Partial);
}

cudaError_t launch_loss_forward(const LossArguments& arguments, void* loss, void* threshold, void* saved,
                                void* workspace, cudaStream_t stream) {
  UASPARSE_LOSS_TYPES(forward, loss, threshold, saved, workspace, stream)
  return cudaErrorInvalidValue;
}

cudaError_t launch_loss_backward(const LossArguments& arguments, const void* grad_loss, const void* saved, void* grad,
                                 cudaStream_t stream) {
  UASPARSE_LOSS_TYPES(backward, grad_loss, saved, grad, stream)
  return cudaErrorInvalidValue;
}

}  // namespace uasparse
