// The gradient of all pair distances from one weight G_ij = dL/dD_ij per pair i < j.
//
// A thread owns one dimension and keeps a few rows of a tile in registers while it walks the
// columns, so no sum crosses threads. With r = 1/S and t = (m_i - m_j) r every pair adds G t to row
// i, -G t to row j, and G (2 r - c - t^2) to both; then dL/dm_i = sum(G t)/2 and, because
// (u_i - u_j)/(S u_i) = 2 r - 1/u_i, dL/du_i = (sum(G (2 r - c - t^2)) + sum(G) (c - 1/u_i))/4.
// c, the dimension's 1/max(u) up to a factor of two, keeps both sums as small as 1/u_i is for any
// row. Each tile writes its part of the sums; a last kernel adds the parts in order.
#pragma once

#include "pair_tiles.cuh"

namespace cwbr::cuda {

constexpr int kBackwardThreads = 64;
constexpr int kRegisterRows = 8;
constexpr int64_t kPartBytes = int64_t{32} << 20;

// The sums of a portion of dimensions and of tiles, kPartBytes of them: of each tile those of its
// rows and of its columns.
template <class A>
struct Parts {
  Moment<A>* sums;  // (tiles of the portion, 2, kTileRows, width)
  A* weights;       // (tiles, 2, kTileRows): sums of G
  int64_t first, width;
  int first_tile, last_tile;

  // Of row 0, side 0 the rows of the tile, side 1 its columns.
  __device__ Moment<A>* of(int tile, int side) const {
    return sums + (int64_t{tile - first_tile} * 2 + side) * kTileRows<A> * width;
  }
};

template <class A>
__device__ A reference_of(const TileInput<A>& in, int64_t dim) {
  return power_of_two<A>(-in.most[dim]);
}

template <class A, int COUNT>
struct alignas(16) Adjacent {
  A item[COUNT];
};

template <class A>
struct BackwardShared {
  alignas(16) A weight[kTileRows<A>][kTileRows<A> + 16 / sizeof(A)];  // G, by column and row
  Moment<A> columns[kTileRows<A>][kBackwardThreads];
};

template <class A>
__device__ void sum_weights(const BackwardShared<A>& shared, const Parts<A>& parts,
                            const TilePlace<A>& place) {
  if (threadIdx.x >= kTileRows<A>) return;  // mask: a tile may have fewer rows than threads
  A by_row = 0, by_column = 0;
  for (int other = 0; other < kTileRows<A>; ++other) {
    by_row += shared.weight[other][threadIdx.x];
    by_column += shared.weight[threadIdx.x][other];
  }
  A* weights = parts.weights + int64_t{place.number} * 2 * kTileRows<A> + threadIdx.x;
  weights[0] = by_row;
  weights[kTileRows<A>] = by_column;
}

// One block per tile and 64 dimensions; `weight(i, j)` is G.
template <class A, class Weight>
__global__ void __launch_bounds__(kBackwardThreads, 1)
    tile_backward_kernel(TileInput<A> in, Weight weight, Parts<A> parts) {
  constexpr int R = kRegisterRows, kRows = kTileRows<A>;
  BackwardShared<A>& shared = shared_memory<BackwardShared<A>>();
  const int64_t slices = ceil_div<int64_t>(parts.width, kBackwardThreads);
  const int64_t slice = blockIdx.x % slices;
  const TilePlace<A> place(parts.first_tile + static_cast<int>(blockIdx.x / slices),
                           in.padded_rows);
  bool any = false;
  for (int t = threadIdx.x; t < kRows * kRows; t += kBackwardThreads) {
    const int64_t i = place.first[0] + t / kRows, j = place.first[1] + t % kRows;
    A g = 0;
    if (i < j && j < in.rows)  // mask: a pair counts once, and padded rows not at all
      g = weight(place.number, i, j);
    shared.weight[t % kRows][t / kRows] = g;
    any = any || g != 0;
  }
  any = __syncthreads_or(any);
  if (slice == 0 && parts.first == 0) sum_weights(shared, parts, place);

  const int64_t at = slice * kBackwardThreads + threadIdx.x, dim = parts.first + at;
  if (at >= parts.width) return;  // mask: the last slice is ragged
  const RowStage<A>* rows = in.packed + dim / kStage * in.padded_rows + place.first[0];
  const RowStage<A>* columns = rows + (place.first[1] - place.first[0]);
  const int d = dim % kStage;
  const A reference = reference_of(in, dim);
  Moment<A>* row_sums = parts.of(place.number, 0) + at;
  Moment<A>* column_sums = parts.of(place.number, 1) + at;

  for (int j = 0; j < kRows; ++j) shared.columns[j][threadIdx.x] = {A{0}, A{0}};
  for (int first = 0; first < kRows; first += R) {
    Moment<A> row[R], row_sum[R];
#pragma unroll
    for (int k = 0; k < R; ++k) {
      row[k] = rows[first + k].moments[d];
      row_sum[k] = {A{0}, A{0}};
    }
#pragma unroll 2
    for (int j = 0; any && j < kRows; ++j) {
      const Moment<A> column = columns[j].moments[d];
      Moment<A> column_sum = shared.columns[j][threadIdx.x];
      const auto& g = reinterpret_cast<const Adjacent<A, R>&>(shared.weight[j][first]).item;
#pragma unroll
      for (int k = 0; k < R; ++k) {
        const A apart = row[k].mean - column.mean, r = reciprocal(row[k].u + column.u);
        const A t = apart * r;
        const A by_u = fused_multiply_add(-t, t, fused_multiply_add(A{2}, r, -reference));
        row_sum[k].mean = fused_multiply_add(g[k], t, row_sum[k].mean);
        row_sum[k].u = fused_multiply_add(g[k], by_u, row_sum[k].u);
        column_sum.mean = fused_multiply_add(-g[k], t, column_sum.mean);
        column_sum.u = fused_multiply_add(g[k], by_u, column_sum.u);
      }
      shared.columns[j][threadIdx.x] = column_sum;
    }
#pragma unroll
    for (int k = 0; k < R; ++k) row_sums[(first + k) * parts.width] = row_sum[k];
  }
  for (int j = 0; j < kRows; ++j) column_sums[j * parts.width] = shared.columns[j][threadIdx.x];
}

// Adds the parts of a row in one dimension to those of the portions before, and after the last one
// undoes the scaling. Tiles are numbered so that any portions add them in the same order.
template <class A>
__global__ void __launch_bounds__(kTileThreads, 1)
    gather_parts_kernel(TileInput<A> in, Parts<A> parts, int tiles, A* grad_mean, A* grad_var) {
  constexpr int kRows = kTileRows<A>;
  const int64_t at = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  const int64_t dim = parts.first + at % parts.width;
  const int row = static_cast<int>(at / parts.width), own = row / kRows;
  if (row >= in.rows || dim >= in.dims) return;  // mask: the last block and dimensions are ragged
  const int64_t element = row * in.dims + dim, part = row % kRows;
  const int across = in.padded_rows / kRows;
  Moment<A> sum = {A{0}, A{0}};
  if (parts.first_tile > 0) sum = {grad_mean[element], grad_var[element]};
  const auto add = [&](int tile, int side) {
    if (tile < parts.first_tile || tile >= parts.last_tile) return;  // of another portion
    const Moment<A> more = parts.of(tile, side)[part * parts.width + at % parts.width];
    sum.mean += more.mean;
    sum.u += more.u;
  };
  for (int partner = 0; partner <= own; ++partner) add(tile_number(partner, own, across), 1);
  for (int partner = own; partner < across; ++partner) add(tile_number(own, partner, across), 0);
  grad_mean[element] = sum.mean;
  grad_var[element] = sum.u;
  if (parts.last_tile < tiles) return;

  A weight = 0;
  const auto add_weight = [&](int tile, int side) {
    weight += parts.weights[(int64_t{tile} * 2 + side) * kRows + part];
  };
  for (int partner = 0; partner <= own; ++partner) add_weight(tile_number(partner, own, across), 1);
  for (int partner = own; partner < across; ++partner)
    add_weight(tile_number(own, partner, across), 0);
  const A u = in.moment(row, dim)->u;
  const int exponent = in.exponent[dim];
  // c - 1/u without rounding before the division
  const A excess = fused_multiply_add(reference_of(in, dim), u, A{-1}) / u;
  grad_mean[element] = sum.mean / 2 * power_of_two<A>(-exponent / 2);
  grad_var[element] = fused_multiply_add(weight, excess, sum.u) / 4 * power_of_two<A>(-exponent);
}

template <class A, class Weight, class Launcher>
void tiles_backward(Launcher& launch, const TileJob<A>& job, Weight weight, A* grad_mean,
                    A* grad_var) {
  const TileInput<A>& in = job.in;
  const int64_t all = int64_t{in.stages} * kStage;
  constexpr int64_t kTileBytes = 2 * kTileRows<A> * sizeof(Moment<A>);  // for each dimension
  int64_t width = kPartBytes / (job.tiles * kTileBytes) / kBackwardThreads * kBackwardThreads;
  if (width < kBackwardThreads) width = kBackwardThreads;
  if (width > all) width = all;
  const int64_t most = kPartBytes / (width * kTileBytes);
  const int portion = static_cast<int>(most < job.tiles ? most : job.tiles);
  Parts<A> parts;
  parts.sums = launch.template scratch<Moment<A>>(portion * 2 * kTileRows<A> * width);
  parts.weights = launch.template scratch<A>(int64_t{job.tiles} * 2 * kTileRows<A>);
  for (parts.first = 0; parts.first < all; parts.first += width) {
    parts.width = all - parts.first < width ? all - parts.first : width;
    const int64_t slices = ceil_div<int64_t>(parts.width, kBackwardThreads);
    for (parts.first_tile = 0; parts.first_tile < job.tiles; parts.first_tile = parts.last_tile) {
      const int left = job.tiles - parts.first_tile, count = left < portion ? left : portion;
      parts.last_tile = parts.first_tile + count;
      launch(tile_backward_kernel<A, Weight>, count * slices, kBackwardThreads,
             sizeof(BackwardShared<A>), in, weight, parts);
      launch(gather_parts_kernel<A>, ceil_div<int64_t>(in.rows * parts.width, kTileThreads),
             kTileThreads, 0, in, parts, job.tiles, grad_mean, grad_var);
    }
  }
}

}  // namespace cwbr::cuda
