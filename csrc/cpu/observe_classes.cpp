#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "cpu/isa_batch_table.h"
#include "cpu/kernels.h"
#include "cpu/parallel.h"

namespace cwbr {
namespace {

constexpr int64_t kGrain = 1 << 15;  // elements of the batch's moments per thread

// x moved towards y by a share of the way, exactly y at the end of it.
template <class T>
T interpolate(T x, T y, T share) {
  return share < T(0.5) ? x + share * (y - x) : y - (y - x) * (1 - share);
}

template <class T>
void write_metric(const T* var, int64_t dims, T floor, T* metric) {
  double sum = 0;
  for (int64_t d = 0; d < dims; ++d) sum += var[d];
  const T level = static_cast<T>(sum / dims);
  const T least = floor * level + std::numeric_limits<T>::min();
  for (int64_t d = 0; d < dims; ++d) metric[d] = level > 0 ? var[d] + least : T(1);
}

}  // namespace

template <class T>
void observe_classes(Cpu, Bank<const T> bank, BatchClasses<T> batch, Variances<T> variances,
                     double momentum, double floor, T* weight) {
  const auto& loops = batch_loops<T>();
  const int64_t dims = bank.dims;
  T* const var = variances.var;
  for_each(batch.count, grain_of(kGrain, dims), [&](int64_t k) {
    const bool used = batch.classes[k] >= 0 && batch.weight[k] > 0;
    // Nor may a later difference to this mean, whose square is at most 4 of these, overflow.
    const bool finite = used && std::isfinite(4 * loops.second_moments(batch.mean + k * dims,
                                                                       batch.var + k * dims, dims));
    weight[k] = finite ? batch.weight[k] : T(0);
  });

  std::vector<T> share(batch.count, T(0)), scatter(dims, T(0));
  T total = 0;
  for (int64_t k = 0; k < batch.count; ++k) {
    if (weight[k] > 0 && bank.count[batch.classes[k]] > 0) total += share[k] = weight[k];
  }
  if (total > 0) {
    parallel_for(0, dims, grain_of(kGrain, batch.count), [&](int64_t first, int64_t last) {
      for (int64_t k = 0; k < batch.count; ++k) {
        if (share[k] == 0) continue;
        loops.add_scatter(share[k] / total, bank.mean + batch.classes[k] * dims + first,
                          batch.mean + k * dims + first, batch.var + k * dims + first, last - first,
                          scatter.data() + first);
      }
    });
    T& updates = *variances.updates += 1;
    const T pace = std::max(1 / std::max(updates, T(1)), T(1 - momentum));
    for (int64_t d = 0; d < dims; ++d) var[d] = interpolate(var[d], scatter[d], pace);
  }
  write_metric(var, dims, T(floor), variances.metric);
}

#define CWBR_INSTANTIATE(T)                                                                        \
  template void observe_classes(Cpu, Bank<const T>, BatchClasses<T>, Variances<T>, double, double, \
                                T*);
CWBR_INSTANTIATE(float)
CWBR_INSTANTIATE(double)

}  // namespace cwbr
