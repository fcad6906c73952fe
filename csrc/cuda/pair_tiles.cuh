// Distances of all pairs of rows, tile by tile, for all_pair_distance and weighted_overlap.
//
// A block holds one stage of dimensions of a tile's rows and columns in shared memory while the
// next one is on its way. Only tiles on or above the diagonal exist.
#pragma once

#include "pack_rows.cuh"

namespace cwbr::cuda {

template <class A>
struct TileShared {
  RowStage<A> stage[2][2][kTileRows<A>];  // by turn, side and row
  A scratch[kMaxWarps];
  int last;
};

// The number of the tile of rows i <= j, counted in tiles; those of one i come one after the other.
__device__ inline int tile_number(int i, int j, int across) {
  return static_cast<int>(first_pair_of_row(i, across + 1)) + j - i;
}

// Which tile a block works on: rows from first[0] and columns from first[1], first[0] <= first[1].
template <class A>
struct TilePlace {
  int number, first[2];
  __device__ TilePlace(int tile, int padded_rows) : number(tile) {
    const Pair pair = pair_of_number(tile, padded_rows / kTileRows<A> + 1);
    first[0] = static_cast<int>(pair.i) * kTileRows<A>;
    first[1] = static_cast<int>(pair.j - 1) * kTileRows<A>;
  }
  // The a-th row or b-th column of this thread.
  __device__ int64_t row(int a) const { return first[0] + threadIdx.x / kTileSide + a * kTileSide; }
  __device__ int64_t column(int b) const {
    return first[1] + threadIdx.x % kTileSide + b * kTileSide;
  }
};

// Both sides of a tile are contiguous, in global as in shared memory.
template <class A>
__device__ void copy_stage(const RowStage<A>* rows, const RowStage<A>* columns,
                           RowStage<A> (&to)[2][kTileRows<A>]) {
  constexpr int kPieces = sizeof(to[0]) / 16;
#pragma unroll
  for (int first = 0; first < kPieces; first += kTileThreads) {
    const int piece = first + threadIdx.x;
    if (piece < kPieces) {  // mask: the last round is short
      copy_async(reinterpret_cast<uint4*>(to[0]) + piece,
                 reinterpret_cast<const uint4*>(rows) + piece);
      copy_async(reinterpret_cast<uint4*>(to[1]) + piece,
                 reinterpret_cast<const uint4*>(columns) + piece);
    }
  }
}

// 4 D of this thread's pairs over the stages [begin, end). With STOP the block gives up once every
// pair of the tile has passed `limit`: no term of D is negative.
template <bool STOP, class A>
__device__ void measure_tile(const TileInput<A>& in, const TilePlace<A>& place, int begin, int end,
                             A limit, TileShared<A>& shared, A (&sum)[kMicro<A>][kMicro<A>]) {
  constexpr int M = kMicro<A>;
  const int row = threadIdx.x / kTileSide, column = threadIdx.x % kTileSide;
  const RowStage<A>* stage_rows = in.packed + int64_t{begin} * in.padded_rows + place.first[0];
  const int64_t to_columns = place.first[1] - place.first[0];
  bool undecided = true;
  if (begin < end) copy_stage(stage_rows, stage_rows + to_columns, shared.stage[begin % 2]);
#pragma unroll 1
  for (int stage = begin; stage < end; ++stage) {
    const RowStage<A>(&now)[2][kTileRows<A>] = shared.stage[stage % 2];
    const bool wide = in.wide[stage];
    copy_async_wait();
    if constexpr (STOP) {
      if (!__syncthreads_or(undecided)) break;
    } else {
      __syncthreads();
    }
    stage_rows += in.padded_rows;
    if (stage + 1 < end)
      copy_stage(stage_rows, stage_rows + to_columns, shared.stage[(stage + 1) % 2]);
    if (wide)
      add_stage<M, true>(now[0] + row, now[1] + column, sum);
    else
      add_stage<M, false>(now[0] + row, now[1] + column, sum);
    undecided = false;
#pragma unroll
    for (int a = 0; a < M; ++a) {
#pragma unroll
      for (int b = 0; b < M; ++b) {
        sum[a][b] -= now[0][row + a * kTileSide].logs + now[1][column + b * kTileSide].logs;
        if constexpr (STOP) undecided = undecided || !(sum[a][b] > limit);
      }
    }
  }
}

// Several blocks share the stages of a tile; the last to arrive adds their sums in a fixed order.
template <class A>
struct Splits {
  int count;
  A* sums;       // (tiles, count, kMicro^2, kTileThreads)
  int* tickets;  // (tiles,), zero
};

template <class A>
__device__ bool gather_splits(const Splits<A>& splits, int tile, int split, int& shared_last,
                              A (&sum)[kMicro<A>][kMicro<A>]) {
  constexpr int M = kMicro<A>;
  A* sums = splits.sums + int64_t{tile} * splits.count * M * M * kTileThreads + threadIdx.x;
#pragma unroll
  for (int k = 0; k < M * M; ++k) sums[(split * M * M + k) * kTileThreads] = sum[k / M][k % M];
  if (!arrives_last(splits.tickets + tile, splits.count, shared_last)) return false;
#pragma unroll
  for (int k = 0; k < M * M; ++k) {
    sum[k / M][k % M] = 0;
    for (int other = 0; other < splits.count; ++other)
      sum[k / M][k % M] += sums[(other * M * M + k) * kTileThreads];
  }
  return true;
}

// Measures a tile and hands its distances to `finish(place, sum, shared)`.
template <class A, class Finish>
__global__ void __launch_bounds__(kTileThreads, 2)
    tile_kernel(TileInput<A> in, Splits<A> splits, Finish finish) {
  TileShared<A>& shared = shared_memory<TileShared<A>>();
  const int tile = blockIdx.x / splits.count, split = blockIdx.x % splits.count;
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
  int tiles;
  int* all_done;  // one more ticket, for what follows the last tile
};

// Packs the rows and cuts the work into blocks: as many per tile as fill the processors once.
template <class A, class Launcher>
TileJob<A> pack_tiles(Launcher& launch, Moments<A> of, double eps, const A* alpha = nullptr,
                      A* row_weight = nullptr) {
  const auto [mean, var, rows, dims] = of;
  TileJob<A> job;
  // One tile of padding where there are no rows, so that there is a block to write the result.
  const int across = rows > 0 ? static_cast<int>(ceil_div<int64_t>(rows, kTileRows<A>)) : 1;
  job.tiles = across * (across + 1) / 2;
  TileInput<A>& in = job.in;
  in.rows = static_cast<int>(rows);
  in.padded_rows = across * kTileRows<A>;
  in.dims = dims;
  in.stages = dims > 0 ? static_cast<int>(ceil_div<int64_t>(dims, kStage)) : 1;
  in.packed = launch.template scratch<RowStage<A>>(int64_t{in.stages} * in.padded_rows);
  in.wide = launch.template scratch<int>(in.stages);
  in.exponent = launch.template scratch<int>(int64_t{in.stages} * kStage);
  in.most = launch.template scratch<int>(int64_t{in.stages} * kStage);

  const int wanted = ceil_div(2 * launch.processors(), job.tiles);
  const int most = in.stages < 4 ? 1 : in.stages / 4;
  Splits<A>& splits = job.splits;
  splits.count = wanted < most ? wanted : most;
  splits.tickets = launch.template scratch<int>(job.tiles + 1);
  const int64_t split_sums = int64_t{job.tiles} * splits.count * kTileRows<A> * kTileRows<A>;
  splits.sums = splits.count == 1 ? nullptr : launch.template scratch<A>(split_sums);
  job.all_done = splits.tickets + job.tiles;
  launch(pack_kernel<A>, in.stages + (alpha ? in.rows : 0), kTileThreads, sizeof(PackShared<A>),
         mean, var, in, static_cast<A>(eps), alpha, row_weight, splits.tickets, job.tiles + 1);
  return job;
}

template <class A, class Finish, class Launcher>
void launch_tiles(Launcher& launch, const TileJob<A>& job, Finish finish) {
  launch(tile_kernel<A, Finish>, int64_t{job.tiles} * job.splits.count, kTileThreads,
         sizeof(TileShared<A>), job.in, job.splits, finish);
}

}  // namespace cwbr::cuda
