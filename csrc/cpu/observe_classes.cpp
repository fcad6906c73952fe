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
void write_metric(const Observed<T>& layer, T floor) {
  const auto& [var, updates, metric, unit] = layer.variances;
  const int64_t dims = layer.bank.dims;
  double sum = 0;
  for (int64_t d = 0; d < dims; ++d) sum += var[d];
  const T level = static_cast<T>(sum / dims);
  const T least = floor * level + std::numeric_limits<T>::min();
  for (int64_t d = 0; d < dims; ++d) metric[d] = level > 0 ? var[d] + least : T(1);
  *unit = level > 0 ? std::sqrt(level) : T(1);
}

// One layer; the columns of `batch` are its own.
template <class T>
void observe_layer(const Observed<T>& layer, BatchClasses<T> batch, double momentum, double floor,
                   T* weight) {
  const auto& loops = batch_loops<T>();
  const Bank<const T>& bank = layer.bank;
  const int64_t dims = bank.dims;
  T* const var = layer.variances.var;
  for_each(batch.count, grain_of(kGrain, dims), [&](int64_t k) {
    const bool used = batch.classes[k] >= 0 && batch.weight[k] > 0;
    const int64_t at = k * batch.width;
    // Nor may a later difference to this mean, whose square is at most 4 of these, overflow.
    const bool finite =
        used && std::isfinite(4 * loops.second_moments(batch.mean + at, batch.var + at, dims));
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
        const int64_t at = k * batch.width + first;
        loops.add_scatter(share[k] / total, bank.mean + batch.classes[k] * dims + first,
                          batch.mean + at, batch.var + at, last - first, scatter.data() + first);
      }
    });
    T& updates = *layer.variances.updates += 1;
    const T pace = std::max(1 / std::max(updates, T(1)), T(1 - momentum));
    for (int64_t d = 0; d < dims; ++d) var[d] = interpolate(var[d], scatter[d], pace);
  }
  write_metric(layer, T(floor));
}

}  // namespace

template <class T>
void observe_classes(Cpu, const std::vector<Observed<T>>& layers, BatchClasses<T> batch,
                     double momentum, double floor, T* weight) {
  for (const Observed<T>& layer : layers) {
    BatchClasses<T> own = batch;
    own.mean += layer.bank.first;
    own.var += layer.bank.first;
    observe_layer(layer, own, momentum, floor, weight);
    weight += batch.count;
  }
}

#define CWBR_INSTANTIATE(T)                                                                    \
  template void observe_classes(Cpu, const std::vector<Observed<T>>&, BatchClasses<T>, double, \
                                double, T*);
CWBR_INSTANTIATE(float)
CWBR_INSTANTIATE(double)

}  // namespace cwbr
