#include <vector>

#include "cpu/batch_kernels.h"
#include "cpu/batch_loops.h"
#include "cpu/parallel.h"

namespace cwbr {
namespace {

constexpr int64_t kGrain = 1 << 15;  // elements of gathered means per thread

}  // namespace

template <class In, class T>
void class_attraction(Matrix<const In> z, const T* mean, const T* var, const int64_t* index,
                      const T* coefficient, int64_t count, T* energy, T* gradient) {
  const auto& loops = batch_loops<In>();
  std::vector<T> inverse_var(z.cols);
  for (int64_t d = 0; d < z.cols; ++d) inverse_var[d] = 1 / var[d];
  parallel_for(0, z.rows, grain_of(kGrain, z.cols * (count + 1)), [&](int64_t first, int64_t last) {
    for (int64_t b = first; b < last; ++b) {
      energy[b] = loops.class_attraction(z.data + b * z.stride, mean, inverse_var.data(), z.cols,
                                         index + b * count, coefficient + b * count, count,
                                         gradient + b * z.cols);
    }
  });
}

#define CWBR_INSTANTIATE(In, T)                                                                  \
  template void class_attraction(Matrix<const In>, const T*, const T*, const int64_t*, const T*, \
                                 int64_t, T*, T*);
CWBR_FOR_EACH_INPUT(CWBR_INSTANTIATE)

}  // namespace cwbr
