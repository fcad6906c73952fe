// observe_classes: the variances of a bank follow the scatter of a batch's classes about its means.
//
// Three launches: the weight of every class; the scatter of a few classes per block; the sum over
// these parts, after which the last block to finish forms the metric.
#pragma once

#include "common.cuh"

namespace cwbr::cuda {

constexpr int kPartClasses = 16;  // a block reads them one after the other, a later one their sums
constexpr int kVariancesThreads = 256;

// The sum of var + mean^2 over the columns of this thread, WIDTH at a time.
template <int WIDTH, class A>
__device__ A second_moments(const A* mean, const A* var, int64_t dims) {
  A sum = 0;
  for (int64_t column = threadIdx.x * WIDTH; column < dims; column += blockDim.x * WIDTH) {
    A m[WIDTH], v[WIDTH];
    load_many(mean + column, m);
    load_many(var + column, v);
#pragma unroll
    for (int w = 0; w < WIDTH; ++w) sum += fused_multiply_add(m[w], m[w], v[w]);
  }
  return sum;
}

// Block k: the weight of class k, and in `known` the same if the bank has a mean of it.
template <class A>
__global__ void __launch_bounds__(kColumnThreads)
    class_weights_kernel(Bank<const A> bank, BatchClasses<A> batch, A* weight, A* known,
                         int* ticket) {
  SumShared<A>& shared = shared_memory<SumShared<A>>();
  if (blockIdx.x == 0 && threadIdx.x == 0) *ticket = 0;
  if (batch.count == 0) return;
  const int64_t k = blockIdx.x, row = batch.classes[k], first = k * bank.dims;
  const A size = batch.weight[k];
  A usable = 0;
  if (row >= 0 && size > 0) {  // mask: left out
    device_check(row < bank.classes);
    const bool vectors = vectors_fit(batch.mean, bank.dims) && vectors_fit(batch.var, bank.dims);
    const A mine =
        vectors ? second_moments<kVectorWidth<A>>(batch.mean + first, batch.var + first, bank.dims)
                : second_moments<1>(batch.mean + first, batch.var + first, bank.dims);
    // Nor may a later difference to this mean, whose square is at most 4 of these, overflow.
    if (4 * block_sum(mine, shared.scratch) < kInfinity<A>) usable = size;  // mask: too large
  }
  if (threadIdx.x == 0) {
    weight[k] = usable;
    known[k] = usable > 0 && bank.count[row] > 0 ? usable : A(0);
  }
}

// What the classes of a part add to the weighted mean scatter in the columns from `column` on.
template <class A, int WIDTH>
__device__ void scatter_of_columns(const Bank<const A>& bank, const BatchClasses<A>& batch,
                                   const A* known, A total, int64_t part, int64_t column,
                                   A* partial) {
  const int64_t first = part * kPartClasses, left = batch.count - first;
  const int64_t last = first + (left < kPartClasses ? left : kPartClasses);
  A sum[WIDTH] = {};
#pragma unroll 4
  for (int64_t k = first; k < last; ++k) {
    // Instead of rows that are left out the first ones are read, so that no load waits for a
    // branch; what is read then is not used: 0 times what is not finite is not 0.
    const bool used = known[k] > 0;
    const int64_t at = used ? k : 0, row = used ? batch.classes[k] : 0;
    const A share = known[k] / total;
    A mean[WIDTH], var[WIDTH], center[WIDTH];
    load_many(batch.mean + at * bank.dims + column, mean);
    load_many(batch.var + at * bank.dims + column, var);
    load_many(bank.mean + row * bank.dims + column, center);
#pragma unroll
    for (int w = 0; w < WIDTH; ++w) {
      const A difference = mean[w] - center[w];
      const A scatter = fused_multiply_add(difference, difference, var[w]);
      sum[w] = fused_multiply_add(share, used ? scatter : A(0), sum[w]);
    }
  }
  store_many(partial + part * bank.dims + column, sum);
}

// One block for each slice of columns and part of the classes.
template <class A>
__global__ void __launch_bounds__(kColumnThreads)
    scatter_kernel(Bank<const A> bank, BatchClasses<A> batch, const A* known, int64_t parts,
                   A* partial) {
  SumShared<A>& shared = shared_memory<SumShared<A>>();
  const A total = sum_of(known, batch.count, shared.scratch);
  if (!(total > 0)) return;  // as a bank without classes has no rows
  const bool vectors = vectors_fit(batch.mean, bank.dims) && vectors_fit(batch.var, bank.dims) &&
                       vectors_fit(bank.mean, bank.dims) && vectors_fit(partial, bank.dims);
  const int64_t part = blockIdx.x % parts, slice = blockIdx.x / parts;
  for_columns<A>(slice, bank.dims, vectors, [&](auto width, int64_t column) {
    scatter_of_columns<A, width.value>(bank, batch, known, total, part, column, partial);
  });
}

// x moved towards y by a share of the way, exactly y at the end of it.
template <class A>
__device__ A interpolate(A x, A y, A share) {
  return share < A(0.5) ? x + share * (y - x) : y - (y - x) * (1 - share);
}

template <class A>
struct VariancesShared {
  A sums[kVariancesThreads / kWarp][kWarp];
  A scratch[kMaxWarps];
  int last;
};

// The sum of all parts in the column of this thread's lane, in the threads of the first warp.
template <class A>
__device__ A sum_of_parts(const A* partial, int64_t parts, int64_t column, int64_t dims,
                          VariancesShared<A>& shared) {
  const unsigned lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  A sum = 0;
  if (column < dims) {  // mask: the last block is ragged
#pragma unroll 4
    for (int64_t part = warp; part < parts; part += kVariancesThreads / kWarp)
      sum += partial[part * dims + column];
  }
  shared.sums[warp][lane] = sum;
  __syncthreads();
  A total = 0;
  for (unsigned other = 0; other < kVariancesThreads / kWarp; ++other)
    total += shared.sums[other][lane];
  return total;
}

// Block b: the variances of its warp's width of columns; the warps share the parts. The last block
// raises `updates`, which all have read by then.
template <class A>
__global__ void __launch_bounds__(kVariancesThreads)
    variances_kernel(const A* partial, int64_t parts, const A* known, int64_t count, int64_t dims,
                     Variances<A> variances, A least_pace, A floor, int* ticket) {
  VariancesShared<A>& shared = shared_memory<VariancesShared<A>>();
  const int64_t column = int64_t(blockIdx.x) * kWarp + threadIdx.x % kWarp;
  const bool any_known = sum_of(known, count, shared.scratch) > 0;
  const A updates = *variances.updates + (any_known ? A(1) : A(0));
  if (any_known) {  // mask: nothing to learn from
    const A now = sum_of_parts(partial, parts, column, dims, shared);
    const A pace = larger(1 / larger(updates, A(1)), least_pace);
    if (threadIdx.x < kWarp && column < dims)  // mask: one warp, the last block is ragged
      variances.var[column] = interpolate(variances.var[column], now, pace);
  }
  if (!arrives_last(ticket, gridDim.x, shared.last)) return;
  const A level = sum_of(variances.var, dims, shared.scratch) / dims;
  const A least = floor * level + kSmallestNormal<A>;
  for (int64_t d = threadIdx.x; d < dims; d += blockDim.x)
    variances.metric[d] = level > 0 ? variances.var[d] + least : A(1);
  if (threadIdx.x == 0) *variances.updates = updates;
}

// Writes weight (K,), metric (D,), and var (D,) and updates in place.
template <class A, class Launcher>
void observe_classes(Launcher& launch, Bank<const A> bank, BatchClasses<A> batch,
                     Variances<A> variances, double momentum, double floor, A* weight) {
  const int64_t parts = ceil_div<int64_t>(batch.count, kPartClasses);
  const int64_t slices = ceil_div<int64_t>(bank.dims, kSliceColumns<A>);
  const int64_t blocks = ceil_div<int64_t>(bank.dims, kWarp);
  A* known = launch.template scratch<A>(batch.count);
  A* partial = launch.template scratch<A>(parts * bank.dims);
  int* ticket = launch.template scratch<int>(1);
  launch(class_weights_kernel<A>, batch.count > 0 ? batch.count : 1, kColumnThreads,
         sizeof(SumShared<A>), bank, batch, weight, known, ticket);
  launch(scatter_kernel<A>, parts * slices, kColumnThreads, sizeof(SumShared<A>), bank, batch,
         known, parts, partial);
  launch(variances_kernel<A>, blocks > 0 ? blocks : 1, kVariancesThreads,
         sizeof(VariancesShared<A>), partial, parts, known, batch.count, bank.dims, variances,
         A(1 - momentum), A(floor), ticket);
}

}  // namespace cwbr::cuda
