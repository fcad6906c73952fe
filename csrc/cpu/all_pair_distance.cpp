#include <vector>

#include "cpu/kernels.h"
#include "cpu/pair_blocks.h"
#include "cpu/parallel.h"

namespace cwbr {

template <class T>
void all_pair_distance(Cpu, Moments<T> of, double eps, T* distance) {
  PairBlocks<T> blocks(of, eps);
  const int64_t k = of.rows;
  for (int64_t i = 0; i < k; ++i) distance[i * k + i] = 0;
  for_blocks(blocks.count(), [&](int64_t a, int64_t b) {
    blocks.distances(a, b, T(-1), [&](const Tile<T>& tile) {
      const auto& [i, j, count_i, count_j] = tile.rows;
      for (int64_t r = 0; r < count_i; ++r)
        for (int64_t c = i == j ? r + 1 : 0; c < count_j; ++c) {
          const T value = tile.distance[r * kTile + c];
          distance[(i + r) * k + j + c] = distance[(j + c) * k + i + r] = value;
        }
    });
  });
}

template <class T>
void all_pair_distance_backward(Cpu, const T* grad, Moments<T> of, double eps, T* grad_mean,
                                T* grad_var) {
  const PairBlocks<T> blocks(of, eps);
  BlockGradient<T> gradient(blocks.max_rows());
  const auto both = [&](int64_t i, int64_t j) {
    return grad[i * of.rows + j] + grad[j * of.rows + i];
  };
  for_blocks(blocks.count(), [&](int64_t a, int64_t b) {
    gradient.reset(blocks.block(a, b), T(1));
    const std::vector<TileRows> tiles = blocks.tiles(a, b);
    for_each(tiles.size(), 256, [&](int64_t t) { gradient.write_tile(tiles[t], both); });
    blocks.gradients(gradient, grad_mean, grad_var);
  });
}

#define CWBR_INSTANTIATE(T)                                     \
  template void all_pair_distance(Cpu, Moments<T>, double, T*); \
  template void all_pair_distance_backward(Cpu, const T*, Moments<T>, double, T*, T*);
CWBR_INSTANTIATE(float)
CWBR_INSTANTIATE(double)

}  // namespace cwbr
