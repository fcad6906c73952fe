#include <algorithm>
#include <vector>

#include "kernels.h"

namespace cwbr {

namespace {
std::vector<int64_t> all_pairs(int64_t k) {
  std::vector<int64_t> pairs;
  for (int64_t i = 0; i < k; ++i)
    for (int64_t j = i + 1; j < k; ++j) pairs.insert(pairs.end(), {i, j});
  return pairs;
}
}  // namespace

template <class T>
void all_pair_distance(const T* mean, const T* var, int64_t k, int64_t d, double eps, T* distance) {
  const auto pairs = all_pairs(k);
  const int64_t m = pairs.size() / 2;
  std::vector<T> listed(m);
  pair_distance(mean, var, pairs.data(), m, k, d, eps, listed.data());
  for (int64_t i = 0; i < k; ++i) distance[i * k + i] = 0;
  for (int64_t p = 0; p < m; ++p) {
    const int64_t i = pairs[2 * p], j = pairs[2 * p + 1];
    distance[i * k + j] = distance[j * k + i] = listed[p];
  }
}

template <class T>
void all_pair_distance_backward(const T* grad, const T* mean, const T* var, int64_t k, int64_t d,
                                double eps, T* grad_mean, T* grad_var) {
  const auto pairs = all_pairs(k);
  const int64_t m = pairs.size() / 2;
  std::vector<T> listed(m);
  for (int64_t p = 0; p < m; ++p) {
    const int64_t i = pairs[2 * p], j = pairs[2 * p + 1];
    listed[p] = grad[i * k + j] + grad[j * k + i];
  }
  pair_distance_backward(listed.data(), mean, var, pairs.data(), m, k, d, eps, grad_mean, grad_var);
}

#define CWBR_INSTANTIATE(T)                                                                        \
  template void all_pair_distance(const T*, const T*, int64_t, int64_t, double, T*);               \
  template void all_pair_distance_backward(const T*, const T*, const T*, int64_t, int64_t, double, \
                                           T*, T*);
CWBR_INSTANTIATE(float)
CWBR_INSTANTIATE(double)

}  // namespace cwbr
