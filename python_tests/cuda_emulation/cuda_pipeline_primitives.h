// Asynchronous copies for the host emulation: they happen as late as the thread allows, so that a missing wait shows.
#pragma once

#include "cuda_runtime.h"

inline void __pipeline_memcpy_async(void* to, const void* from, size_t bytes, size_t zeros = 0) {
  emulation::current->copies.push_back({to, from, bytes, zeros});
}
inline void __pipeline_commit() { emulation::current->commits.push_back(emulation::current->copies.size()); }

// All but the last `prior` commits are done.
inline void __pipeline_wait_prior(size_t prior) {
  std::vector<emulation::Copy>& copies = emulation::current->copies;
  std::vector<size_t>& commits = emulation::current->commits;
  if (commits.size() <= prior) return;
  const size_t done = commits[commits.size() - 1 - prior];
  for (size_t i = 0; i < done; ++i) {
    const emulation::Copy& copy = copies[i];
    std::memset(copy.to, 0, copy.bytes);
    std::memcpy(copy.to, copy.from, copy.bytes - copy.zeros);
  }
  copies.erase(copies.begin(), copies.begin() + static_cast<std::ptrdiff_t>(done));
  commits.erase(commits.begin(), commits.end() - static_cast<std::ptrdiff_t>(prior));
  for (size_t& commit : commits) commit -= done;
}
