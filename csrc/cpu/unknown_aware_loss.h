// What the rows of the loss (unknown_aware_loss_impl.h) take and give, and where they are for each instruction set.
#pragma once

#include <cstdint>

namespace uasparse {

template <typename T>
struct LossProblem {
  const T* logits;
  const T* logits_end;  // what lies before it may be read, past a row's end too
  const int64_t* target;
  int64_t classes;  // K + 1
  T alpha, unknown_weight;
};

struct LossSums {
  double loss = 0, threshold = 0;
  int64_t known = 0;
};

#define UASPARSE_LOSS_ROWS(isa)                                                                                      \
  namespace isa {                                                                                                    \
  template <typename T>                                                                                              \
  void loss_forward(const LossProblem<T>& problem, int64_t begin, int64_t end, T* losses, T* saved, LossSums* sums); \
  template <typename T>                                                                                              \
  void loss_backward(const LossProblem<T>& problem, int64_t begin, int64_t end, const T* saved, const T* grad_loss,  \
                     int64_t grad_stride, T scale, T* grad);                                                         \
  }
UASPARSE_LOSS_ROWS(portable)
UASPARSE_LOSS_ROWS(avx2)
UASPARSE_LOSS_ROWS(avx512)
#undef UASPARSE_LOSS_ROWS

}  // namespace uasparse
