// All layers at once. The work is cut into tasks, each a slice of columns of one layer: moments,
// distances and gradients of a slice need nothing from outside it but the final sum over slices,
// and its temporaries stay in the nearest caches. The slices depend on the shapes alone. The
// backward pass computes a slice's moments again, which costs less than keeping them.
#include <algorithm>
#include <numeric>
#include <vector>

#include "cpu/isa_batch_table.h"
#include "cpu/kernels.h"
#include "cpu/overlap.h"
#include "cpu/parallel.h"

namespace cwbr {
namespace {

constexpr int64_t kMinWidth = 128;           // columns of a slice
constexpr int64_t kCacheElements = 1 << 16;  // of a temporary: active rows times columns
constexpr int64_t kTaskElements = 1 << 18;   // rows of z and of pairs times columns: for a thread

// The pairs of nonzero coefficient (weight, or gradient of the distance), and the groups that occur
// in them renumbered 0, 1, ...
template <class T>
struct ActivePairs {
  std::vector<int64_t> position;  // in the planned pairs
  std::vector<T> coefficient;     // of each
  std::vector<int64_t> index;     // (count, 2) rows
  std::vector<int64_t> group;     // of each row
  std::vector<bool> is_active;    // of each group

  ActivePairs(const Pairs& pairs, const T* coefficients, int64_t groups) : is_active(groups) {
    std::vector<int64_t> row(groups, -1);
    for (int64_t p = 0; p < pairs.count; ++p) {
      if (coefficients[p] == 0) continue;
      position.push_back(p);
      coefficient.push_back(coefficients[p]);
      for (const int64_t k : {pairs.index[2 * p], pairs.index[2 * p + 1]}) {
        if (row[k] < 0) {
          row[k] = group.size();
          group.push_back(k);
          is_active[k] = true;
        }
        index.push_back(row[k]);
      }
    }
  }

  int64_t count() const { return position.size(); }
  int64_t rows() const { return group.size(); }
  Pairs pairs() const { return {index.data(), count()}; }
};

struct Slice {
  int64_t layer, begin, width;
};

class Slices {
 public:
  // active_of(l) are the active pairs of layer l.
  template <class T, class ActiveOf>
  Slices(const std::vector<Layer<T>>& layers, int64_t batch, const ActiveOf& active_of) {
    int64_t elements = 0;
    for (int64_t l = 0; l < std::ssize(layers); ++l) {
      const ActivePairs<T>& active = active_of(l);
      const int64_t per_column = batch + 2 * active.count(), dims = layers[l].dims;
      const int64_t widest = std::min(kCacheElements / std::max<int64_t>(1, active.rows()),
                                      kTaskElements / std::max<int64_t>(1, per_column));
      const int64_t parts = std::max<int64_t>(1, dims / std::max(widest, kMinWidth));
      const int64_t width = (dims + parts * 16 - 1) / (parts * 16) * 16;  // whole vectors
      for (int64_t begin = 0; begin < dims; begin += width) {
        slices_.push_back({l, begin, std::min(width, dims - begin)});
      }
      elements += per_column * dims;
    }
    grain_ = grain_of(kTaskElements * size(), elements);
  }

  int64_t size() const { return slices_.size(); }
  const Slice& operator[](int64_t s) const { return slices_[s]; }

  // body(s) for every slice s, in parallel where that pays.
  template <class F>
  void for_each(const F& body) const {
    cwbr::for_each(size(), grain_, body);
  }

 private:
  std::vector<Slice> slices_;
  int64_t grain_;
};

// This thread's memory for one slice at a time, kept: at these sizes the page faults of fresh
// memory would cost more than the arithmetic.
template <class T>
T* scratch(size_t size) {
  thread_local std::vector<T> memory;
  if (memory.size() < size) memory.resize(size);
  return memory.data();
}

template <class In, class T>
Matrix<const In> input(const Layer<T>& layer, int64_t batch) {
  return {static_cast<const In*>(layer.z), batch, layer.dims, layer.stride};
}

// Moments of the slice's active groups, (rows, width).
template <class In, class T>
void slice_moments(const Layer<T>& layer, const Slice& slice, Groups groups,
                   const ActivePairs<T>& active, T eps, T* mean, T* var) {
  const Matrix<const In> z = input<In>(layer, groups.batch);
  for (int64_t r = 0; r < active.rows(); ++r) {
    const int64_t k = active.group[r], at = r * slice.width;
    batch_loops<In>().moments(group_rows(z, groups, k, slice.begin, slice.width), eps, mean + at,
                              var + at);
  }
}

// Gradient of the slice's columns of z from those of the moments, all (rows, width).
template <class In, class T>
void slice_gradient(const Layer<T>& layer, const Slice& slice, Groups groups,
                    const ActivePairs<T>& active, T eps, const T* mean, const T* var,
                    const T* grad_mean, const T* grad_var) {
  const Matrix<const In> z = input<In>(layer, groups.batch);
  In* grad = static_cast<In*>(layer.grad) + slice.begin;
  const auto clear = [&](int64_t sample) {
    std::fill_n(grad + sample * layer.dims, slice.width, In{});
  };
  for (int64_t k = 0; k < groups.count; ++k) {
    if (active.is_active[k]) continue;
    for (int64_t s = 0; s < groups.size(k); ++s) clear(groups.samples(k)[s]);
  }
  for (int64_t s = groups.offsets[groups.count]; s < groups.batch; ++s) clear(groups.order[s]);

  for (int64_t r = 0; r < active.rows(); ++r) {
    const int64_t k = active.group[r], at = r * slice.width;
    batch_loops<In>().moments_gradient(group_rows(z, groups, k, slice.begin, slice.width), eps,
                                       mean + at, var + at, grad_mean + at, grad_var + at, grad,
                                       layer.dims);
  }
}

template <class T>
double total_weight(const WeightedPairs<T>& pairs) {
  return std::accumulate(pairs.weights, pairs.weights + pairs.count, 0.0);
}

// Of one layer, from its distances.
template <class T>
OverlapSum layer_overlap(const WeightedPairs<T>& pairs, bool log, const T* distance) {
  return overlap_sum<T>(log, [&](const auto& use) {
    for (int64_t p = 0; p < pairs.count; ++p) use(pairs.weights[p], distance[p]);
  });
}

// The gradient with respect to the distances of a layer.
template <class T>
std::vector<T> distance_gradients(double grad, const WeightedPairs<T>& pairs, double eps, bool log,
                                  const T* distance) {
  const double total = total_weight(pairs);
  const OverlapSum all = log ? layer_overlap(pairs, log, distance) : OverlapSum();
  std::vector<T> gradient(pairs.count);
  for (int64_t p = 0; p < pairs.count; ++p)
    gradient[p] = T(overlap_gradient(log, grad, pairs.weights[p], distance[p], all, total, eps));
  return gradient;
}

}  // namespace

template <class T>
void regularizer(Cpu cpu, const std::vector<Layer<T>>& layers, Groups groups,
                 WeightedPairs<T> pairs, double eps, bool log, T* distance, T* value) {
  const ActivePairs<T> active(pairs, pairs.weights, groups.count);
  const int64_t rows = active.rows(), m = active.count();
  const auto active_of = [&](int64_t) -> const ActivePairs<T>& { return active; };
  const Slices slices(layers, groups.batch, active_of);
  std::vector<T> partial(slices.size() * m);
  slices.for_each([&](int64_t s) {
    if (m == 0) return;
    const Slice& slice = slices[s];
    const Layer<T>& layer = layers[slice.layer];
    T *mean = scratch<T>(2 * rows * slice.width), *var = mean + rows * slice.width;
    with_element_type_of<T>(layer.type, [&]<class In>(In) {
      slice_moments<In>(layer, slice, groups, active, static_cast<T>(eps), mean, var);
    });
    pair_distance(cpu, {mean, var, rows, slice.width}, active.pairs(), eps, partial.data() + s * m);
  });

  std::fill_n(distance, layers.size() * pairs.count, T(0));
  for (int64_t s = 0; s < slices.size(); ++s) {
    T* of_layer = distance + slices[s].layer * pairs.count;
    for (int64_t a = 0; a < m; ++a) of_layer[active.position[a]] += partial[s * m + a];
  }
  const double total = total_weight(pairs);
  double sum = 0;
  for (size_t l = 0; l < layers.size(); ++l)
    sum += overlap_value(layer_overlap(pairs, log, distance + l * pairs.count), total, eps, log);
  *value = T(sum / layers.size());
}

template <class T>
void regularizer_backward(Cpu cpu, const T* grad, const std::vector<Layer<T>>& layers,
                          Groups groups, WeightedPairs<T> pairs, double eps, bool log,
                          const T* distance) {
  // Where the overlap, hence the gradient, of a pair is 0 there is nothing to compute.
  std::vector<ActivePairs<T>> active_pairs;
  for (size_t l = 0; l < layers.size(); ++l) {
    const std::vector<T> gradient = distance_gradients(double(*grad) / layers.size(), pairs, eps,
                                                       log, distance + l * pairs.count);
    active_pairs.emplace_back(pairs, gradient.data(), groups.count);
  }
  const auto active_of = [&](int64_t l) -> const ActivePairs<T>& { return active_pairs[l]; };
  const Slices slices(layers, groups.batch, active_of);
  slices.for_each([&](int64_t s) {
    const Slice& slice = slices[s];
    const Layer<T>& layer = layers[slice.layer];
    const ActivePairs<T>& active = active_pairs[slice.layer];
    const int64_t rows = active.rows(), size = rows * slice.width;
    T *mean = scratch<T>(4 * size), *var = mean + size;
    T *grad_mean = var + size, *grad_var = grad_mean + size;
    with_element_type_of<T>(layer.type, [&]<class In>(In) {
      const T clamp = static_cast<T>(eps);
      slice_moments<In>(layer, slice, groups, active, clamp, mean, var);
      if (active.count() > 0)
        pair_distance_backward(cpu, active.coefficient.data(), {mean, var, rows, slice.width},
                               active.pairs(), eps, grad_mean, grad_var);
      slice_gradient<In>(layer, slice, groups, active, clamp, mean, var, grad_mean, grad_var);
    });
  });
}

#define CWBR_INSTANTIATE(T)                                                                      \
  template void regularizer(Cpu, const std::vector<Layer<T>>&, Groups, WeightedPairs<T>, double, \
                            bool, T*, T*);                                                       \
  template void regularizer_backward(Cpu, const T*, const std::vector<Layer<T>>&, Groups,        \
                                     WeightedPairs<T>, double, bool, const T*);
CWBR_INSTANTIATE(float)
CWBR_INSTANTIATE(double)

}  // namespace cwbr
