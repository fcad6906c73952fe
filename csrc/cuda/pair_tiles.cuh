// Distances of all pairs of rows, tile by tile, for all_pair_distance and weighted_overlap.
//
// A block holds one stage of dimensions of a tile's rows and columns in shared memory while the
// next one is on its way. Only tiles on or above the diagonal exist.
#pragma once

#include "pack_rows.cuh"

namespace cwbr::cuda {

// Shared memory for one stage: rows padded by 16 bytes, so that eight lanes reading eight rows
// touch all 32 banks once.
template <class A>
struct TileStage {
  static constexpr int kPitch = kStage + 16 / sizeof(Moment<A>);
  Moment<A> moments[2][kTileRows<A>][kPitch];
  A logs[2][kTileRows<A>];
};

template <class A>
struct TileShared {
  TileStage<A> stage[2];
  A scratch[kMaxWarps];
  int last;
};

// Which tile a block works on: rows from first[0] and columns from first[1], first[0] <= first[1].
template <class A>
struct TilePlace {
  int64_t number, first[2];
  __device__ TilePlace(int64_t tile, int64_t padded_rows) : number(tile) {
    const Pair pair = pair_of_number(tile, padded_rows / kTileRows<A> + 1);
    first[0] = pair.i * kTileRows<A>;
    first[1] = (pair.j - 1) * kTileRows<A>;
  }
  // The a-th row or b-th column of this thread.
  __device__ int64_t row(int a) const { return first[0] + threadIdx.x / kTileSide + a * kTileSide; }
  __device__ int64_t column(int b) const {
    return first[1] + threadIdx.x % kTileSide + b * kTileSide;
  }
};

template <class A>
__device__ void copy_stage(const TileInput<A>& in, const TilePlace<A>& place, int64_t stage,
                           TileStage<A>& to) {
  constexpr int kPieces = kStage * sizeof(Moment<A>) / 16;
  constexpr int kPerPiece = 16 / sizeof(Moment<A>);
#pragma unroll
  for (int side = 0; side < 2; ++side) {
#pragma unroll
    for (int t = threadIdx.x; t < kTileRows<A> * kPieces; t += kTileThreads) {
      const int row = t / kPieces, piece = t % kPieces * kPerPiece;
      copy_async(&to.moments[side][row][piece],
                 in.moments + ((place.first[side] + row) * in.stages + stage) * kStage + piece);
    }
  }
  constexpr int kLogPieces = kTileRows<A> * sizeof(A) / 16;
  if (threadIdx.x < 2 * kLogPieces) {
    const int side = threadIdx.x / kLogPieces, piece = threadIdx.x % kLogPieces * 16 / sizeof(A);
    copy_async(&to.logs[side][piece], in.logs + stage * in.padded_rows + place.first[side] + piece);
  }
}

// 4 D of this thread's pairs over the stages [begin, end). With STOP the block gives up once every
// pair of the tile has passed `limit`: no term of D is negative.
template <bool STOP, class A>
__device__ void measure_tile(const TileInput<A>& in, const TilePlace<A>& place, int64_t begin,
                             int64_t end, A limit, TileShared<A>& shared,
                             A (&sum)[kMicro<A>][kMicro<A>]) {
  constexpr int M = kMicro<A>, kPitch = TileStage<A>::kPitch;
  const int row = threadIdx.x / kTileSide, column = threadIdx.x % kTileSide;
  bool undecided = true;
  if (begin < end) copy_stage(in, place, begin, shared.stage[0]);
  for (int64_t stage = begin; stage < end; ++stage) {
    const TileStage<A>& now = shared.stage[(stage - begin) % 2];
    const bool wide = in.wide[stage];
    copy_async_wait();
    if constexpr (STOP) {
      if (!__syncthreads_or(undecided)) break;
    } else {
      __syncthreads();
    }
    if (stage + 1 < end) copy_stage(in, place, stage + 1, shared.stage[(stage + 1 - begin) % 2]);
    const Moment<A>*rows = now.moments[0][row], *columns = now.moments[1][column];
    if (wide)
      add_stage<M, true>(rows, columns, kTileSide * kPitch, sum);
    else
      add_stage<M, false>(rows, columns, kTileSide * kPitch, sum);
    undecided = false;
#pragma unroll
    for (int a = 0; a < M; ++a) {
#pragma unroll
      for (int b = 0; b < M; ++b) {
        sum[a][b] -= now.logs[0][row + a * kTileSide] + now.logs[1][column + b * kTileSide];
        if constexpr (STOP) undecided = undecided || !(sum[a][b] > limit);
      }
    }
  }
}

// Several blocks share the stages of a tile; the last to arrive adds their sums in a fixed order.
template <class A>
struct Splits {
  int64_t count;
  A* sums;       // (tiles, count, kMicro^2, kTileThreads)
  int* tickets;  // (tiles,), zero
};

// Whether this block is the last of `expected` to get here; what the others wrote is then visible.
__device__ inline bool arrives_last(int* ticket, int64_t expected, int& shared_last) {
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) shared_last = atomicAdd(ticket, 1) == expected - 1;
  __syncthreads();
  __threadfence();
  return shared_last != 0;
}

template <class A>
__device__ bool gather_splits(const Splits<A>& splits, int64_t tile, int64_t split,
                              int& shared_last, A (&sum)[kMicro<A>][kMicro<A>]) {
  constexpr int M = kMicro<A>;
  A* sums = splits.sums + tile * splits.count * M * M * kTileThreads + threadIdx.x;
  for (int k = 0; k < M * M; ++k) sums[(split * M * M + k) * kTileThreads] = sum[k / M][k % M];
  if (!arrives_last(splits.tickets + tile, splits.count, shared_last)) return false;
  for (int k = 0; k < M * M; ++k) {
    sum[k / M][k % M] = 0;
    for (int64_t other = 0; other < splits.count; ++other)
      sum[k / M][k % M] += sums[(other * M * M + k) * kTileThreads];
  }
  return true;
}

// Measures a tile and hands its distances to `finish(place, sum, shared)`.
template <class A, class Finish>
__global__ void __launch_bounds__(kTileThreads, 2)
    tile_kernel(TileInput<A> in, Splits<A> splits, Finish finish) {
  TileShared<A>& shared = shared_memory<TileShared<A>>();
  const int64_t tile = blockIdx.x / splits.count, split = blockIdx.x % splits.count;
  const TilePlace<A> place(tile, in.padded_rows);
  A sum[kMicro<A>][kMicro<A>] = {};
  measure_tile<Finish::kStop>(in, place, in.stages * split / splits.count,
                              in.stages * (split + 1) / splits.count, finish.limit(), shared, sum);
  if (splits.count > 1 && !gather_splits(splits, tile, split, shared.last, sum)) return;
  finish(place, sum, shared);
}

template <class A>
__device__ A distance_from(A four_times) {
  return four_times < 0 ? A{0} : four_times / 4;  // rounding may leave a little less than nothing
}

template <class A>
struct TileJob {
  TileInput<A> in;
  Splits<A> splits;
  int64_t tiles;
  int* all_done;  // one more ticket, for what follows the last tile
};

// Packs the rows and cuts the work into blocks: as many per tile as fill the processors once.
template <class A, class Launcher>
TileJob<A> pack_tiles(Launcher& launch, const A* mean, const A* var, int64_t rows, int64_t dims,
                      double eps, const A* alpha, A* row_weight) {
  TileJob<A> job;
  const int64_t across = ceil_div<int64_t>(rows, kTileRows<A>);
  job.tiles = across * (across + 1) / 2;
  TileInput<A>& in = job.in;
  in.rows = rows;
  in.padded_rows = across * kTileRows<A>;
  in.dims = dims;
  in.stages = dims > 0 ? ceil_div<int64_t>(dims, kStage) : 1;
  in.moments = launch.template scratch<Moment<A>>(in.padded_rows * in.padded_dims());
  in.logs = launch.template scratch<A>(in.stages * in.padded_rows);
  in.wide = launch.template scratch<int>(in.stages);
  in.exponent = launch.template scratch<int>(in.padded_dims());

  const int64_t wanted = ceil_div<int64_t>(2 * launch.processors(), job.tiles);
  const int64_t most = in.stages < 4 ? 1 : in.stages / 4;
  job.splits.count = wanted < most ? wanted : most;
  job.splits.tickets = launch.template scratch<int>(job.tiles + 1);
  job.splits.sums =
      job.splits.count == 1
          ? nullptr
          : launch.template scratch<A>(job.tiles * job.splits.count * kTileRows<A> * kTileRows<A>);
  job.all_done = job.splits.tickets + job.tiles;
  launch(pack_kernel<A>, in.stages + (alpha ? rows : 0), kTileThreads, sizeof(PackShared<A>), mean,
         var, in, static_cast<A>(eps), alpha, row_weight, job.splits.tickets,
         static_cast<int>(job.tiles + 1));
  return job;
}

template <class A, class Finish, class Launcher>
void launch_tiles(Launcher& launch, const TileJob<A>& job, Finish finish) {
  launch(tile_kernel<A, Finish>, job.tiles * job.splits.count, kTileThreads, sizeof(TileShared<A>),
         job.in, job.splits, finish);
}

}  // namespace cwbr::cuda
