#include <algorithm>
#include <cmath>

#include "kernels.h"

namespace cwbr {

template <class T>
void pair_distance(const T* mean, const T* var, const int64_t* pairs, int64_t m, int64_t, int64_t d,
                   double eps, T* distance) {
  for (int64_t p = 0; p < m; ++p) {
    const int64_t i = pairs[2 * p] * d, j = pairs[2 * p + 1] * d;
    double sum = 0;
    for (int64_t x = 0; x < d; ++x) {
      const double wi = var[i + x] + eps, wj = var[j + x] + eps;
      const double diff = double(mean[i + x]) - mean[j + x];
      sum += diff * diff / (4 * (wi + wj)) + std::log1p((wi - wj) / wi * ((wi - wj) / wj) / 4) / 4;
    }
    distance[p] = T(sum);
  }
}

template <class T>
void pair_distance_backward(const T* grad, const T* mean, const T* var, const int64_t* pairs,
                            int64_t m, int64_t k, int64_t d, double eps, T* grad_mean,
                            T* grad_var) {
  std::fill(grad_mean, grad_mean + k * d, T(0));
  std::fill(grad_var, grad_var + k * d, T(0));
  for (int64_t p = 0; p < m; ++p) {
    const int64_t i = pairs[2 * p] * d, j = pairs[2 * p + 1] * d;
    const double g = grad[p];
    for (int64_t x = 0; x < d; ++x) {
      const double wi = var[i + x] + eps, wj = var[j + x] + eps, s = wi + wj;
      const double t = (double(mean[i + x]) - mean[j + x]) / s;
      grad_mean[i + x] += T(g * t / 2);
      grad_mean[j + x] -= T(g * t / 2);
      grad_var[i + x] += T(g * ((wi - wj) / (s * wi) - t * t) / 4);
      grad_var[j + x] += T(g * ((wj - wi) / (s * wj) - t * t) / 4);
    }
  }
}

#define CWBR_INSTANTIATE(T)                                                                   \
  template void pair_distance(const T*, const T*, const int64_t*, int64_t, int64_t, int64_t,  \
                              double, T*);                                                    \
  template void pair_distance_backward(const T*, const T*, const T*, const int64_t*, int64_t, \
                                       int64_t, int64_t, double, T*, T*);
CWBR_INSTANTIATE(float)
CWBR_INSTANTIATE(double)

}  // namespace cwbr
