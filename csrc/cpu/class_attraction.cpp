#include <vector>

#include "cpu/isa_batch_table.h"
#include "cpu/kernels.h"
#include "cpu/parallel.h"

namespace cwbr {
namespace {

constexpr int64_t kGrain = 1 << 15;  // elements of gathered means per thread

}  // namespace

template <class In, class T>
void class_attraction(Cpu, Matrix<const In> z, Bank<const T> bank, const T* var, Acting<T> acting,
                      T* energy, T* gradient) {
  const auto& loops = batch_loops<In>();
  const int64_t count = acting.count;
  std::vector<T> inverse_var(z.cols);
  for (int64_t d = 0; d < z.cols; ++d) inverse_var[d] = 1 / var[d];
  for_each(z.rows, grain_of(kGrain, z.cols * (count + 1)), [&](int64_t b) {
    energy[b] = loops.class_attraction(z.data + b * z.stride, bank.mean, inverse_var.data(), z.cols,
                                       acting.index + b * count, acting.coefficient + b * count,
                                       count, gradient + b * z.cols);
  });
}

#define CWBR_INSTANTIATE(In, T) \
  template void class_attraction(Cpu, Matrix<const In>, Bank<const T>, const T*, Acting<T>, T*, T*);
CWBR_FOR_EACH_INPUT(CWBR_INSTANTIATE)

}  // namespace cwbr
