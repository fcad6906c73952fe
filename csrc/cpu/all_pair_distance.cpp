#include <algorithm>

#include "kernels.h"
#include "pair_blocks.h"
#include "parallel.h"

namespace cwbr {

template <class T>
void all_pair_distance(const T* mean, const T* var, int64_t k, int64_t d, double eps, T* distance) {
  PairBlocks<T> blocks(mean, var, k, d, eps);
  for (int64_t i = 0; i < k; ++i) distance[i * k + i] = 0;
  for (int64_t a = 0; a < blocks.count(); ++a)
    for (int64_t b = a; b < blocks.count(); ++b)
      blocks.distances(a, b, T(-1), [&](const Tile<T>& tile) {
        for (int64_t r = 0; r < tile.rows_i; ++r)
          for (int64_t c = tile.i == tile.j ? r + 1 : 0; c < tile.rows_j; ++c) {
            const T value = tile.distance[r * kTile + c];
            distance[(tile.i + r) * k + tile.j + c] = value;
            distance[(tile.j + c) * k + tile.i + r] = value;
          }
      });
}

template <class T>
void all_pair_distance_backward(const T* grad, const T* mean, const T* var, int64_t k, int64_t d,
                                double eps, T* grad_mean, T* grad_var) {
  std::fill_n(grad_mean, k * d, T(0));
  std::fill_n(grad_var, k * d, T(0));
  const PairBlocks<T> blocks(mean, var, k, d, eps);
  BlockGradient<T> gradient(blocks.max_rows());
  for (int64_t a = 0; a < blocks.count(); ++a)
    for (int64_t b = a; b < blocks.count(); ++b) {
      gradient.reset(blocks.first(a), blocks.rows(a), blocks.first(b), blocks.rows(b));
      blocks.for_tiles(a, b, 256,
                       [&](int64_t, int64_t i, int64_t j, int64_t rows_i, int64_t rows_j) {
                         gradient.write_tile(i, j, rows_i, rows_j, [&](int64_t r, int64_t c) {
                           return grad[r * k + c] + grad[c * k + r];
                         });
                       });
      blocks.add_gradient(gradient, grad_mean, grad_var);
    }
}

#define CWBR_INSTANTIATE(T)                                                                        \
  template void all_pair_distance(const T*, const T*, int64_t, int64_t, double, T*);               \
  template void all_pair_distance_backward(const T*, const T*, const T*, int64_t, int64_t, double, \
                                           T*, T*);
CWBR_INSTANTIATE(float)
CWBR_INSTANTIATE(double)
#undef CWBR_INSTANTIATE

}  // namespace cwbr
