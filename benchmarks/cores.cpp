// How far apart two cores are: prints the nanoseconds that a cache line takes from one to the other, and the GB/s at which
// one reads 256 KiB that the other has just written. Arguments: the numbers of two cores.
#include <sched.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <numeric>
#include <thread>
#include <vector>

namespace {

constexpr int kTurns = 200, kBatches = 100, kReads = 200, kNumbers = 65536;
alignas(64) std::atomic<int> turn{0};
alignas(64) float numbers[kNumbers];

void pin(int core) {
  cpu_set_t set;
  CPU_ZERO(&set);
  CPU_SET(core, &set);
  sched_setaffinity(0, sizeof set, &set);
}

double now() { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); }

void wait_for(int value) {
  while (turn.load(std::memory_order_acquire) != value) {
  }
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 3) return 1;
  const int here = std::atoi(argv[1]), there = std::atoi(argv[2]);
  std::thread other([there] {
    pin(there);
    for (int i = 0; i < kTurns * kBatches + kReads; ++i) {
      wait_for(2 * i + 1);
      if (i >= kTurns * kBatches) std::fill(numbers, numbers + kNumbers, static_cast<float>(i));
      turn.store(2 * i + 2, std::memory_order_release);
    }
  });
  pin(here);
  int i = 0;
  std::vector<double> batches, reads;
  const auto ask = [&] {
    turn.store(2 * i + 1, std::memory_order_release);
    wait_for(2 * ++i);
  };
  for (int b = 0; b < kBatches; ++b) {
    const double start = now();
    for (int t = 0; t < kTurns; ++t) ask();
    batches.push_back((now() - start) / (2 * kTurns));
  }
  volatile float sink = 0;
  for (int r = 0; r < kReads; ++r) {
    ask();
    const double start = now();
    float sums[64] = {};
    for (int n = 0; n < kNumbers; n += 64)
      for (int lane = 0; lane < 64; ++lane) sums[lane] += numbers[n + lane];
    sink = std::accumulate(sums, sums + 64, 0.0f);
    reads.push_back(now() - start);
  }
  other.join();
  if (sink < 0) return 2;  // so that it is computed
  const auto median = [](std::vector<double>& times) {
    std::nth_element(times.begin(), times.begin() + times.size() / 2, times.end());
    return times[times.size() / 2];
  };
  std::printf("%.1f %.1f\n", 1e9 * median(batches), 1e-9 * sizeof numbers / median(reads));
}
