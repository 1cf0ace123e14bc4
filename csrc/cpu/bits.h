// Rows of bits, 64 to a word: sets of places as they are merged and counted, without branches that depend on the data.
#pragma once

#include <cstdint>

namespace uasparse {

// Sets the bits of n ascending places, less `base`, in words that hold bits of lower places only. The word at hand is
// stored each time and not loaded again: a load would wait for the store before it.
template <typename Place>
inline void set_bits(const Place* places, int64_t n, int64_t base, uint64_t* words) {
  if (n == 0) return;
  int64_t at = (static_cast<int64_t>(places[0]) - base) / 64;
  uint64_t word = words[at];
  for (int64_t i = 0; i < n; ++i) {
    const int64_t place = static_cast<int64_t>(places[i]) - base, next = place / 64;
    word = (word & (uint64_t{0} - static_cast<uint64_t>(next == at))) | uint64_t{1} << (place % 64);
    words[next] = word;
    at = next;
  }
}

// Appends groups of up to 64 bits, one behind the other, to memory with room for a word more than they fill.
class BitWriter {
 public:
  explicit BitWriter(uint64_t* to) : to_(to) { *to_ = 0; }
  void append(uint64_t bits, int count) {
    *to_ |= bits << used_;
    used_ += count;
    if (used_ < 64) return;
    used_ -= 64;
    *++to_ = used_ == 0 ? 0 : bits >> (count - used_);
  }

 private:
  uint64_t* to_;
  int used_ = 0;
};

}  // namespace uasparse
