#include <algorithm>

#include "cpu/isa_batch_table.h"
#include "cpu/kernels.h"
#include "cpu/parallel.h"

namespace cwbr {
namespace {

constexpr int64_t kGrain = 1 << 15;  // elements of the batch's means per thread

}  // namespace

template <class T>
void follow_classes(Cpu, Bank<T> bank, BatchClasses<T> batch, double momentum) {
  const auto& loops = batch_loops<T>();
  const int64_t dims = bank.dims;
  for_each(batch.count, grain_of(kGrain, dims), [&](int64_t k) {
    const int64_t row = batch.classes[k];
    const T weight = batch.weight[k];
    if (row < 0 || !(weight > 0)) return;
    bank.count[row] += weight;
    const T rate = std::max(weight / std::max(bank.count[row], T(1)), T(1 - momentum));
    loops.move_towards(rate, batch.mean + k * dims, dims, bank.mean + row * dims);
  });
}

#define CWBR_INSTANTIATE(T) template void follow_classes(Cpu, Bank<T>, BatchClasses<T>, double);
CWBR_INSTANTIATE(float)
CWBR_INSTANTIATE(double)

}  // namespace cwbr
