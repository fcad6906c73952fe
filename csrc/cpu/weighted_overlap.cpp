#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "kernels.h"

namespace cwbr {

template <class T>
T weighted_overlap(const T* mean, const T* var, const T* alpha, int64_t k, int64_t d, double eps,
                   bool log) {
  std::vector<T> distance(k * k);
  all_pair_distance(mean, var, k, d, eps, distance.data());
  double total = 0, sum = 0, highest = -std::numeric_limits<double>::infinity();
  for (int64_t i = 0; i < k; ++i)
    for (int64_t j = i + 1; j < k; ++j) {
      total += alpha[i * k + j];
      sum += alpha[i * k + j] * std::exp(-distance[i * k + j]);
      if (alpha[i * k + j] > 0) highest = std::max(highest, -double(distance[i * k + j]));
    }
  if (!log) return T(sum / std::max(total, eps));
  if (total == 0) return 0;
  sum = 0;
  for (int64_t i = 0; i < k; ++i)
    for (int64_t j = i + 1; j < k; ++j)
      sum += alpha[i * k + j] * std::exp(-double(distance[i * k + j]) - highest);
  return T(std::log(sum / total) + highest);
}

template <class T>
void weighted_overlap_backward(T grad, T value, const T* mean, const T* var, const T* alpha,
                               int64_t k, int64_t d, double eps, bool log, T* grad_mean,
                               T* grad_var) {
  std::vector<T> distance(k * k);
  all_pair_distance(mean, var, k, d, eps, distance.data());
  double total = 0;
  for (int64_t i = 0; i < k; ++i)
    for (int64_t j = i + 1; j < k; ++j) total += alpha[i * k + j];
  const double shift = log ? double(value) : 0;
  const double scale = !log ? 1 / std::max(total, eps) : total == 0 ? 0 : 1 / total;
  std::vector<T> grad_distance(k * k);
  for (int64_t i = 0; i < k; ++i)
    for (int64_t j = i + 1; j < k; ++j)
      grad_distance[i * k + j] =
          T(-grad * alpha[i * k + j] * scale * std::exp(-double(distance[i * k + j]) - shift));
  all_pair_distance_backward(grad_distance.data(), mean, var, k, d, eps, grad_mean, grad_var);
}

#define CWBR_INSTANTIATE(T)                                                                     \
  template T weighted_overlap(const T*, const T*, const T*, int64_t, int64_t, double, bool);    \
  template void weighted_overlap_backward(T, T, const T*, const T*, const T*, int64_t, int64_t, \
                                          double, bool, T*, T*);
CWBR_INSTANTIATE(float)
CWBR_INSTANTIATE(double)

}  // namespace cwbr
