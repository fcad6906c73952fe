// weighted_overlap and its gradient: all pairs, none of the distances kept by the forward pass.
#pragma once

#include "overlap.cuh"
#include "pair_tiles_backward.cuh"

namespace cwbr::cuda {

// Beyond this distance exp(-D) is 0 in the number format.
template <class A>
constexpr double kFarthest = std::is_same_v<A, double> ? 746 : 104;

template <class A>
struct OverlapSettings {
  const A* alpha;       // (K, K)
  const A* row_weight;  // (K,): sums of alpha right of the diagonal
  int64_t rows;
  A eps;
};

// Calls run(a, b, weight, i, j) for this thread's pairs above the diagonal.
template <class A, class Run>
__device__ void for_pairs(const OverlapSettings<A>& settings, const TilePlace<A>& place, Run run) {
#pragma unroll
  for (int a = 0; a < kMicro<A>; ++a) {
#pragma unroll
    for (int b = 0; b < kMicro<A>; ++b) {
      const int64_t i = place.row(a), j = place.column(b);
      if (i < j && j < settings.rows)  // mask: a pair counts once, and padded rows not at all
        run(a, b, settings.alpha[i * settings.rows + j], i, j);
    }
  }
}

// Sums a tile's overlaps; the last tile to finish sums the tiles' sums, in order.
template <class A, bool LOG>
struct SumOverlaps {
  // In the log domain no pair is ever too far to matter: what counts is its distance to the
  // nearest.
  static constexpr bool kStop = !LOG;
  OverlapSettings<A> settings;
  OverlapPart<A>* parts;  // (tiles,)
  int* all_done;
  int tiles;
  A* value;

  __device__ A limit() const { return A(4 * kFarthest<A>); }
  __device__ void operator()(const TilePlace<A>& place, const A (&sum)[kMicro<A>][kMicro<A>],
                             TileShared<A>& shared) const {
    const OverlapPart<A> part = overlap_sum<A>(LOG, shared.scratch, [&](auto visit) {
      for_pairs(settings, place, [&](int a, int b, A weight, int64_t, int64_t) {
        visit_pair(LOG, weight, distance_from(sum[a][b]), visit);
      });
    });
    if (threadIdx.x == 0) parts[place.number] = part;
    if (!arrives_last(all_done, tiles, shared.last)) return;
    const OverlapPart<A> all = overlap_sum<A>(LOG, shared.scratch, [&](auto visit) {
      for (int tile = threadIdx.x; tile < tiles; tile += blockDim.x)
        visit(parts[tile].max, parts[tile].sum);
    });
    const A total = sum_of(settings.row_weight, settings.rows, shared.scratch);
    if (threadIdx.x == 0) *value = overlap_value(all, total, settings.eps, LOG);
  }
};

// Writes dL/dD of a tile's pairs.
template <class A, bool LOG>
struct WriteGradients {
  static constexpr bool kStop = !LOG;
  OverlapSettings<A> settings;
  const A* grad;
  const A* value;  // of the logarithm
  A* gradients;    // (tiles, kTileRows, kTileRows)

  __device__ A limit() const { return A(4 * kFarthest<A>); }
  __device__ void operator()(const TilePlace<A>& place, const A (&sum)[kMicro<A>][kMicro<A>],
                             TileShared<A>& shared) const {
    const A total = sum_of(settings.row_weight, settings.rows, shared.scratch);
    A* tile = gradients + int64_t{place.number} * kTileRows<A> * kTileRows<A>;
    for_pairs(settings, place, [&](int a, int b, A weight, int64_t i, int64_t j) {
      tile[(i - place.first[0]) * kTileRows<A> + j - place.first[1]] = overlap_gradient(
          LOG, *grad, weight, distance_from(sum[a][b]), LOG ? *value : A{0}, total, settings.eps);
    });
  }
};

// Both at once, where no pair's gradient waits for the sum.
template <class A>
struct SumAndWrite {
  static constexpr bool kStop = true;
  SumOverlaps<A, false> sum;
  WriteGradients<A, false> write;

  __device__ A limit() const { return sum.limit(); }
  __device__ void operator()(const TilePlace<A>& place, const A (&sums)[kMicro<A>][kMicro<A>],
                             TileShared<A>& shared) const {
    write(place, sums, shared);
    sum(place, sums, shared);
  }
};

template <class A>
struct TileGradients {
  const A* gradients;
  __device__ A operator()(int64_t tile, int64_t i, int64_t j) const {
    constexpr int64_t kRows = kTileRows<A>;
    return gradients[(tile * kRows + i % kRows) * kRows + j % kRows];
  }
};

// The packed rows, and the weights summed by row.
template <class A>
struct OverlapJob {
  TileJob<A> tiles;
  OverlapSettings<A> settings;

  template <class Launcher>
  OverlapJob(Launcher& launch, Moments<A> of, const A* alpha, double eps) {
    A* row_weight = launch.template scratch<A>(of.rows);
    tiles = pack_tiles(launch, of, eps, alpha, row_weight);
    settings = {alpha, row_weight, of.rows, A(eps)};
  }

  template <bool LOG, class Launcher>
  SumOverlaps<A, LOG> sum(Launcher& launch, A* value) const {
    OverlapPart<A>* parts = launch.template scratch<OverlapPart<A>>(tiles.tiles);
    return {settings, parts, tiles.all_done, tiles.tiles, value};
  }
  template <class Launcher>
  A* new_gradients(Launcher& launch) const {
    return launch.template scratch<A>(int64_t{tiles.tiles} * kTileRows<A> * kTileRows<A>);
  }
};

// mean, var (K, D), alpha (K, K) -> value.
template <class A, class Launcher>
void weighted_overlap(Launcher& launch, Moments<A> of, const A* alpha, double eps, bool log,
                      A* value) {
  const OverlapJob<A> job(launch, of, alpha, eps);
  if (log)
    launch_tiles(launch, job.tiles, job.template sum<true>(launch, value));
  else
    launch_tiles(launch, job.tiles, job.template sum<false>(launch, value));
}

// grad and value (scalars) -> grad_mean, grad_var (K, D).
template <class A, class Launcher>
void weighted_overlap_backward(Launcher& launch, const A* grad, const A* value, Moments<A> of,
                               const A* alpha, double eps, bool log, A* grad_mean, A* grad_var) {
  if (of.rows == 0) return;
  const OverlapJob<A> job(launch, of, alpha, eps);
  A* gradients = job.new_gradients(launch);
  if (log)
    launch_tiles(launch, job.tiles, WriteGradients<A, true>{job.settings, grad, value, gradients});
  else
    launch_tiles(launch, job.tiles, WriteGradients<A, false>{job.settings, grad, value, gradients});
  tiles_backward(launch, job.tiles, TileGradients<A>{gradients}, grad_mean, grad_var);
}

// grad (scalar) -> value, grad_mean, grad_var (K, D). The logarithm's gradient needs its value, for
// which the distances are computed twice.
template <class A, class Launcher>
void weighted_overlap_with_gradient(Launcher& launch, const A* grad, Moments<A> of, const A* alpha,
                                    double eps, bool log, A* value, A* grad_mean, A* grad_var) {
  if (log || of.rows == 0) {
    weighted_overlap(launch, of, alpha, eps, log, value);
    weighted_overlap_backward(launch, grad, static_cast<const A*>(value), of, alpha, eps, log,
                              grad_mean, grad_var);
    return;
  }
  const OverlapJob<A> job(launch, of, alpha, eps);
  A* gradients = job.new_gradients(launch);
  launch_tiles(launch, job.tiles,
               SumAndWrite<A>{job.template sum<false>(launch, value),
                              {job.settings, grad, nullptr, gradients}});
  tiles_backward(launch, job.tiles, TileGradients<A>{gradients}, grad_mean, grad_var);
}

}  // namespace cwbr::cuda
