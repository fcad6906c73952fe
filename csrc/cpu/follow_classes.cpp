#include <algorithm>
#include <iterator>
#include <vector>

#include "cpu/isa_batch_table.h"
#include "cpu/kernels.h"
#include "cpu/parallel.h"

namespace cwbr {
namespace {

constexpr int64_t kGrain = 1 << 15;  // elements of the batch's means per thread

}  // namespace

template <class T>
void follow_classes(Cpu, const std::vector<Bank<T>>& layers, BatchClasses<T> batch,
                    double momentum) {
  const auto& loops = batch_loops<T>();
  const int64_t work = batch.width / std::max<int64_t>(1, std::ssize(layers));
  for_each(std::ssize(layers) * batch.count, grain_of(kGrain, work), [&](int64_t task) {
    const Bank<T>& bank = layers[task / batch.count];
    const int64_t k = task % batch.count, row = batch.classes[k];
    const T weight = batch.weight[task];
    if (row < 0 || !(weight > 0)) return;
    bank.count[row] += weight;
    const T rate = std::max(weight / std::max(bank.count[row], T(1)), T(1 - momentum));
    loops.move_towards(rate, batch.mean + k * batch.width + bank.first, bank.dims,
                       bank.mean + row * bank.dims);
  });
}

#define CWBR_INSTANTIATE(T) \
  template void follow_classes(Cpu, const std::vector<Bank<T>>&, BatchClasses<T>, double);
CWBR_INSTANTIATE(float)
CWBR_INSTANTIATE(double)

}  // namespace cwbr
