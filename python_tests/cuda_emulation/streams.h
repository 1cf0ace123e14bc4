// Cases come in on stdin and results leave on stdout, as raw numbers; arrays lie in exact allocations, so that
// AddressSanitizer sees one step too far.
#pragma once

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <vector>

inline bool more_cases() {
  const int c = std::getchar();
  if (c == EOF) return false;
  std::ungetc(c, stdin);
  return true;
}

template <typename T>
T read_one() {
  T value;
  if (std::fread(&value, sizeof value, 1, stdin) != 1) std::abort();
  return value;
}

// An array of `bytes`, filled with 0xa5 where it is not read: results must not depend on what was there.
struct Array {
  explicit Array(size_t bytes) : bytes(bytes), data(static_cast<unsigned char*>(std::malloc(bytes ? bytes : 1)), std::free) {
    for (size_t i = 0; i < bytes; ++i) data.get()[i] = 0xa5;
  }
  static Array read(size_t bytes) {
    Array array(bytes);
    if (std::fread(array.data.get(), 1, bytes, stdin) != bytes) std::abort();
    return array;
  }
  void write() const { std::fwrite(data.get(), 1, bytes, stdout); }
  template <typename T>
  T* as() const {
    return reinterpret_cast<T*>(data.get());
  }
  size_t bytes;
  std::unique_ptr<unsigned char, void (*)(void*)> data;
};

inline void must(bool ok) {
  if (!ok) {
    std::fprintf(stderr, "a launcher failed\n");
    std::abort();
  }
}
