// Threads that take a sequence of steps together, within one parallel region: a step is cut into parts, a part a member,
// and all wait for a step's last part before the next. Waiting is spinning: a step of a few microseconds is over before
// a thread could sleep.
//
// Nobody waits for a member that has not come yet, as one that the system has to wake, or that a pool never sends: its
// parts are done by those that are there. It finds them done when it comes. Numbers do not depend on who computes them.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <thread>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace uasparse {

class Team {
 public:
  explicit Team(int64_t size) : size_(size), claims_(new Claim[static_cast<size_t>(size)]) {}

  bool failed() const { return failed_.load(std::memory_order_relaxed); }

  // One thread's way through the steps.
  class Member {
   public:
    // Numbers are 0 to size - 1; whoever opens the team is 0, as single parts are that one's.
    Member(Team& team, int64_t number) : team_(team), number_(number) {
      team_.here_.fetch_add(1, std::memory_order_relaxed);
    }

    // The next step, of `parts` parts, at most one a member: every member calls it with the same ones. Returns when all of
    // them are done, or when one failed, whose exception is thrown where it was.
    template <typename Part>
    void step(int64_t parts, const Part& part) {
      ++step_;
      due_ += parts;
      if (number_ < parts) attempt(number_, part);
      for (int64_t spins = 0; team_.done_.load(std::memory_order_acquire) < due_ && !team_.failed(); ++spins) {
        if (team_.here_.load(std::memory_order_relaxed) < team_.size_) {
          for (int64_t p = 0; p < parts; ++p) attempt(p, part);
        }
        if (spins < kSpins) relax();
        else std::this_thread::yield();  // more threads than cores: whom all wait for may need this one
      }
    }

   private:
    static constexpr int64_t kSpins = 4096;

    template <typename Part>
    void attempt(int64_t p, const Part& part) {
      std::atomic<int64_t>& claimed = team_.claims_[p].step;
      int64_t last = claimed.load(std::memory_order_relaxed);
      if (last >= step_ || !claimed.compare_exchange_strong(last, step_, std::memory_order_relaxed)) return;
      try {
        part(p);
      } catch (...) {
        team_.failed_.store(true, std::memory_order_relaxed);
        throw;
      }
      team_.done_.fetch_add(1, std::memory_order_acq_rel);
    }

    static void relax() {
#if defined(__x86_64__)
      _mm_pause();
#endif
    }

    Team& team_;
    const int64_t number_;
    int64_t step_ = 0, due_ = 0;
  };

 private:
  struct alignas(64) Claim {
    std::atomic<int64_t> step{0};  // the last whose part is taken
  };

  const int64_t size_;
  const std::unique_ptr<Claim[]> claims_;
  alignas(64) std::atomic<int64_t> done_{0};  // parts, of all steps
  alignas(64) std::atomic<int64_t> here_{0};
  std::atomic<bool> failed_{false};
};

}  // namespace uasparse
