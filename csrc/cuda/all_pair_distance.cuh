// all_pair_distance and its gradient, by tiles.
#pragma once

#include "pair_tiles_backward.cuh"

namespace cwbr::cuda {

// Writes the distances of a tile, and of its mirror image below the diagonal.
template <class A>
struct WriteDistances {
  static constexpr bool kStop = false;
  A* distance;
  int64_t rows;

  __device__ A limit() const { return A{0}; }
  __device__ void operator()(const TilePlace<A>& place, const A (&sum)[kMicro<A>][kMicro<A>],
                             TileShared<A>&) const {
#pragma unroll
    for (int a = 0; a < kMicro<A>; ++a) {
#pragma unroll
      for (int b = 0; b < kMicro<A>; ++b) {
        const int64_t i = place.row(a), j = place.column(b);
        if (i >= rows || j >= rows) continue;  // mask: rows are padded
        const A value = i == j ? A{0} : distance_from(sum[a][b]);
        distance[i * rows + j] = value;
        if (place.first[0] != place.first[1]) distance[j * rows + i] = value;
      }
    }
  }
};

// dL/dD_ij + dL/dD_ji of a gradient that need not be symmetric.
template <class A>
struct BothSides {
  const A* grad;
  int64_t rows;
  __device__ A operator()(int64_t, int64_t i, int64_t j) const {
    return grad[i * rows + j] + grad[j * rows + i];
  }
};

// mean, var (K, D) -> distance (K, K), symmetric with a zero diagonal.
template <class A, class Launcher>
void all_pair_distance(Launcher& launch, Moments<A> of, double eps, A* distance) {
  if (of.rows == 0) return;
  const TileJob<A> job = pack_tiles(launch, of, eps);
  launch_tiles(launch, job, WriteDistances<A>{distance, of.rows});
}

// grad (K, K) -> grad_mean, grad_var (K, D).
template <class A, class Launcher>
void all_pair_distance_backward(Launcher& launch, const A* grad, Moments<A> of, double eps,
                                A* grad_mean, A* grad_var) {
  if (of.rows == 0) return;
  const TileJob<A> job = pack_tiles(launch, of, eps);
  tiles_backward(launch, job, BothSides<A>{grad, of.rows}, grad_mean, grad_var);
}

}  // namespace cwbr::cuda
