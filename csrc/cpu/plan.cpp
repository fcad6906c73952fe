#include <vector>

#include "check.h"
#include "cpu/batch_kernels.h"

namespace cwbr {

template <class In, class T>
void plan(Matrix<const In> logits, const int64_t* targets, int64_t min_count, int64_t m,
          int64_t* order, int64_t* offsets, int64_t* classes, int64_t* pairs, T* weights) {
  for (int64_t b = 0; b < logits.rows; ++b) {
    check(targets[b] >= 0 && targets[b] < logits.cols, "targets: expected classes from 0 to ",
          logits.cols - 1, " for logits of ", logits.cols, " columns, got ", targets[b]);
  }
  const int64_t groups = logits.rows / min_count;
  const int64_t used = group_by_class(targets, logits.rows, min_count, order, offsets, classes);
  std::vector<T> alpha(used * used);
  confusion_weights(logits, Groups{order, offsets, used}, classes, alpha.data());
  top_pairs(alpha.data(), used, groups, m, pairs, weights);
}

#define CWBR_INSTANTIATE(In, T)                                                              \
  template void plan(Matrix<const In>, const int64_t*, int64_t, int64_t, int64_t*, int64_t*, \
                     int64_t*, int64_t*, T*);
CWBR_FOR_EACH_INPUT(CWBR_INSTANTIATE)

}  // namespace cwbr
