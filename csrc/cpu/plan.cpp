#include <vector>

#include "cpu/kernels.h"

namespace cwbr {

template <class In, class T>
void plan(Cpu cpu, Matrix<const In> logits, const int64_t* targets, int64_t min_count, int64_t m,
          int64_t* order, int64_t* offsets, int64_t* classes, int64_t* pairs, T* weights) {
  const int64_t groups = logits.rows / min_count;
  const int64_t used =
      group_by_class(cpu, targets, logits.rows, min_count, order, offsets, classes);
  std::vector<T> alpha(used * used);
  confusion_weights(cpu, logits, Groups{order, offsets, used, logits.rows}, classes, alpha.data());
  top_pairs_of_used(alpha.data(), used, groups, m, pairs, weights);
}

#define CWBR_INSTANTIATE(In, T)                                                                   \
  template void plan(Cpu, Matrix<const In>, const int64_t*, int64_t, int64_t, int64_t*, int64_t*, \
                     int64_t*, int64_t*, T*);
CWBR_FOR_EACH_INPUT(CWBR_INSTANTIATE)

}  // namespace cwbr
