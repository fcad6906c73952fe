// All layers at once. The work is cut into tasks, each a slice of columns of one layer: moments,
// distances and gradients of a slice need nothing from outside it but the final sum over slices,
// and its temporaries stay in the nearest caches. The slices depend on the shapes alone.
#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "cpu/batch_kernels.h"
#include "cpu/batch_loops.h"
#include "cpu/kernels.h"
#include "cpu/parallel.h"

namespace cwbr {
namespace {

constexpr int64_t kMaxWidth = 512, kMinWidth = 128;  // columns per task
constexpr int64_t kCacheElements = 1 << 16;          // of one temporary (rows, columns)
constexpr int64_t kGrain = 1 << 20;                  // elements touched per thread

// The pairs of nonzero weight, and the groups that occur in them renumbered 0, 1, ...
template <class T>
struct ActivePairs {
  std::vector<int64_t> position;  // in the planned pairs
  std::vector<int64_t> index;     // (count, 2) rows
  std::vector<int64_t> group;     // of each row
  std::vector<bool> is_active;    // of each group

  ActivePairs(Pairs<T> pairs, int64_t groups) : is_active(groups) {
    std::vector<int64_t> row(groups, -1);
    for (int64_t p = 0; p < pairs.count; ++p) {
      if (pairs.weights[p] == 0) continue;
      position.push_back(p);
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
};

struct Slice {
  int64_t layer, begin, width;
};

template <class T>
std::vector<Slice> make_slices(const Layer<T>* layers, int64_t layer_count, int64_t rows) {
  const int64_t target =
      std::clamp(kCacheElements / std::max<int64_t>(1, rows), kMinWidth, kMaxWidth);
  std::vector<Slice> slices;
  for (int64_t l = 0; l < layer_count; ++l) {
    const int64_t dims = layers[l].dims, parts = (dims + target - 1) / target;
    const int64_t width = parts > 0 ? ((dims + parts - 1) / parts + 15) / 16 * 16 : 0;
    for (int64_t begin = 0; begin < dims; begin += width) {
      slices.push_back({l, begin, std::min(width, dims - begin)});
    }
  }
  return slices;
}

template <class F>
void for_each_slice(const std::vector<Slice>& slices, int64_t elements_per_column, const F& body) {
  const int64_t count = slices.size();
  if (count == 0) return;
  const int64_t work = std::max<int64_t>(1, elements_per_column * slices[0].width);
  parallel_for(0, count, std::max<int64_t>(1, kGrain / work), [&](int64_t first, int64_t last) {
    for (int64_t s = first; s < last; ++s) body(s);
  });
}

template <class In, class T>
Matrix<const In> input(const Layer<T>& layer, int64_t batch) {
  return {static_cast<const In*>(layer.z), batch, layer.dims, layer.stride};
}

// Moments of the slice's active groups: to (rows, width), and to the layer's mean and var.
template <class In, class T>
void slice_moments(const Layer<T>& layer, const Slice& slice, int64_t batch, Groups groups,
                   const ActivePairs<T>& active, T eps, T* mean, T* var) {
  const Matrix<const In> z = input<In>(layer, batch);
  for (int64_t k = 0; k < groups.count; ++k) {
    if (active.is_active[k]) continue;
    std::fill_n(layer.mean + k * layer.dims + slice.begin, slice.width, T(0));
    std::fill_n(layer.var + k * layer.dims + slice.begin, slice.width, T(0));
  }
  for (int64_t r = 0; r < active.rows(); ++r, mean += slice.width, var += slice.width) {
    const int64_t k = active.group[r], at = k * layer.dims + slice.begin;
    batch_loops<In>().moments(group_rows(z, groups, k, slice.begin, slice.width), eps, mean, var);
    std::copy_n(mean, slice.width, layer.mean + at);
    std::copy_n(var, slice.width, layer.var + at);
  }
}

// Gradient of the slice's columns of z from those of the moments, all (rows, width).
template <class In, class T>
void slice_gradient(const Layer<T>& layer, const Slice& slice, int64_t batch, Groups groups,
                    const ActivePairs<T>& active, T eps, const T* mean, const T* var,
                    const T* grad_mean, const T* grad_var) {
  const Matrix<const In> z = input<In>(layer, batch);
  In* grad = static_cast<In*>(layer.grad) + slice.begin;
  const auto clear = [&](int64_t sample) {
    std::fill_n(grad + sample * layer.dims, slice.width, In{});
  };
  for (int64_t k = 0; k < groups.count; ++k) {
    if (active.is_active[k]) continue;
    for (int64_t s = 0; s < groups.size(k); ++s) clear(groups.samples(k)[s]);
  }
  for (int64_t s = groups.offsets[groups.count]; s < batch; ++s) clear(groups.order[s]);

  for (int64_t r = 0; r < active.rows(); ++r) {
    const int64_t k = active.group[r], at = r * slice.width;
    batch_loops<In>().moments_gradient(group_rows(z, groups, k, slice.begin, slice.width), eps,
                                       mean + at, var + at, grad_mean + at, grad_var + at, grad,
                                       layer.dims);
  }
}

template <class T>
double total_weight(Pairs<T> pairs) {
  double total = 0;
  for (int64_t p = 0; p < pairs.count; ++p) total += pairs.weights[p];
  return total;
}

// log(w) - D of the active pairs relative to the largest, exponentiated into `share`; returns the
// largest. NaN stays NaN.
template <class T>
double shifted_overlaps(Pairs<T> pairs, const ActivePairs<T>& active, const T* distance, T* share) {
  T largest = -std::numeric_limits<T>::infinity();
  for (int64_t a = 0; a < active.count(); ++a) {
    const int64_t p = active.position[a];
    share[a] = std::log(pairs.weights[p]) - distance[p];
    largest = share[a] > largest ? share[a] : largest;
  }
  if (std::isinf(largest)) largest = 0;
  for (int64_t a = 0; a < active.count(); ++a) share[a] = std::exp(share[a] - largest);
  return largest;
}

template <class T>
double sum(const std::vector<T>& values) {
  double total = 0;
  for (const T value : values) total += value;
  return total;
}

template <class T>
double overlap(Pairs<T> pairs, const ActivePairs<T>& active, double eps, bool log,
               const T* distance) {
  const double total = total_weight(pairs);
  if (!log) {
    double weighted = 0;
    for (const int64_t p : active.position) weighted += pairs.weights[p] * std::exp(-distance[p]);
    return weighted / (total < eps ? eps : total);
  }
  if (total == 0) return 0;
  std::vector<T> share(active.count());
  const double largest = shifted_overlaps(pairs, active, distance, share.data());
  return largest + std::log(sum(share)) - std::log(total);
}

// Gradient of `overlap` with respect to the distances of the active pairs.
template <class T>
std::vector<T> overlap_gradient(double grad, Pairs<T> pairs, const ActivePairs<T>& active,
                                double eps, bool log, const T* distance) {
  const double total = total_weight(pairs);
  std::vector<T> gradient(active.count());
  if (!log) {
    const T scale = -grad / (total < eps ? eps : total);
    for (int64_t a = 0; a < active.count(); ++a) {
      const int64_t p = active.position[a];
      gradient[a] = scale * pairs.weights[p] * std::exp(-distance[p]);
    }
  } else if (total != 0) {
    shifted_overlaps(pairs, active, distance, gradient.data());
    const T scale = -grad / sum(gradient);
    for (T& g : gradient) g *= scale;
  }
  return gradient;
}

}  // namespace

template <class T>
T regularizer(const Layer<T>* layers, int64_t layer_count, int64_t batch, Groups groups,
              Pairs<T> pairs, double eps, bool log, T* distance) {
  const ActivePairs<T> active(pairs, groups.count);
  const int64_t rows = active.rows(), m = active.count();
  const std::vector<Slice> slices = make_slices(layers, layer_count, rows);
  std::vector<T> partial(slices.size() * m);
  for_each_slice(slices, batch + 2 * m, [&](int64_t s) {
    const Slice& slice = slices[s];
    const Layer<T>& layer = layers[slice.layer];
    std::vector<T> moments(2 * rows * slice.width);
    T *mean = moments.data(), *var = mean + rows * slice.width;
    with_input_type_of<T>(layer.type, [&](auto in) {
      slice_moments<decltype(in)>(layer, slice, batch, groups, active, static_cast<T>(eps), mean,
                                  var);
    });
    if (m == 0) return;
    pair_distance(mean, var, active.index.data(), m, rows, slice.width, eps,
                  partial.data() + s * m);
  });

  std::fill_n(distance, layer_count * pairs.count, T(0));
  for (size_t s = 0; s < slices.size(); ++s) {
    T* of_layer = distance + slices[s].layer * pairs.count;
    for (int64_t a = 0; a < m; ++a) of_layer[active.position[a]] += partial[s * m + a];
  }
  double value = 0;
  for (int64_t l = 0; l < layer_count; ++l) {
    value += overlap(pairs, active, eps, log, distance + l * pairs.count);
  }
  return value / layer_count;
}

template <class T>
void regularizer_backward(T grad, const Layer<T>* layers, int64_t layer_count, int64_t batch,
                          Groups groups, Pairs<T> pairs, double eps, bool log, const T* distance) {
  const ActivePairs<T> active(pairs, groups.count);
  const int64_t rows = active.rows(), m = active.count();
  const std::vector<Slice> slices = make_slices(layers, layer_count, rows);
  std::vector<std::vector<T>> grad_distance;
  for (int64_t l = 0; l < layer_count; ++l) {
    grad_distance.push_back(overlap_gradient(static_cast<double>(grad) / layer_count, pairs, active,
                                             eps, log, distance + l * pairs.count));
  }
  for_each_slice(slices, 2 * batch + 4 * m, [&](int64_t s) {
    const Slice& slice = slices[s];
    const Layer<T>& layer = layers[slice.layer];
    const int64_t size = rows * slice.width;
    std::vector<T> temporaries(4 * size);
    T *mean = temporaries.data(), *var = mean + size;
    T *grad_mean = var + size, *grad_var = grad_mean + size;
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t at = active.group[r] * layer.dims + slice.begin;
      std::copy_n(layer.mean + at, slice.width, mean + r * slice.width);
      std::copy_n(layer.var + at, slice.width, var + r * slice.width);
    }
    if (m > 0)
      pair_distance_backward(grad_distance[slice.layer].data(), mean, var, active.index.data(), m,
                             rows, slice.width, eps, grad_mean, grad_var);
    with_input_type_of<T>(layer.type, [&](auto in) {
      slice_gradient<decltype(in)>(layer, slice, batch, groups, active, static_cast<T>(eps), mean,
                                   var, grad_mean, grad_var);
    });
  });
}

#define CWBR_INSTANTIATE(T)                                                                      \
  template T regularizer(const Layer<T>*, int64_t, int64_t, Groups, Pairs<T>, double, bool, T*); \
  template void regularizer_backward(T, const Layer<T>*, int64_t, int64_t, Groups, Pairs<T>,     \
                                     double, bool, const T*);
CWBR_INSTANTIATE(float)
CWBR_INSTANTIATE(double)

}  // namespace cwbr
