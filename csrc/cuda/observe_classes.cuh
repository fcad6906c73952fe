// observe_classes: the variances of a bank follow the scatter of a batch's classes about its means.
//
// Three launches for all layers: the weight of every class; the scatter of a few classes per block;
// the sum over these parts, after which the last block of a layer to finish forms its metric.
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

// What a launch knows of a layer: where its blocks of columns begin, and what they share.
template <class A>
struct ObservedLayer : Observed<A> {
  A* weight;  // (count,)
  A* known;   // (count,) the same where the bank has a mean of the class
  int* ticket;
  A* partial;  // (parts, dims)
  int64_t first_slice;
};

// Block (layer, k): the weight of class k there.
template <class A>
__global__ void __launch_bounds__(kColumnThreads)
    class_weights_kernel(const __grid_constant__ Layers<ObservedLayer<A>> layers,
                         BatchClasses<A> batch) {
  SumShared<A>& shared = shared_memory<SumShared<A>>();
  const int64_t blocks = batch.count > 0 ? batch.count : 1;
  const ObservedLayer<A>& layer = layers.layer[blockIdx.x / blocks];
  const int64_t k = blockIdx.x % blocks, dims = layer.bank.dims;
  if (k == 0 && threadIdx.x == 0) *layer.ticket = 0;
  if (batch.count == 0) return;
  const int64_t row = batch.classes[k], at = k * batch.width;
  const A *mean = batch.mean + layer.bank.first, *var = batch.var + layer.bank.first;
  const A size = batch.weight[k];
  A usable = 0;
  if (row >= 0 && size > 0) {  // mask: left out
    device_check(row < layer.bank.classes);
    const bool vectors = dims % kVectorWidth<A> == 0 && vectors_fit(mean, batch.width) &&
                         vectors_fit(var, batch.width);
    const A mine = vectors ? second_moments<kVectorWidth<A>>(mean + at, var + at, dims)
                           : second_moments<1>(mean + at, var + at, dims);
    // Nor may a later difference to this mean, whose square is at most 4 of these, overflow.
    if (4 * block_sum(mine, shared.scratch) < kInfinity<A>) usable = size;  // mask: too large
  }
  if (threadIdx.x == 0) {
    layer.weight[k] = usable;
    layer.known[k] = usable > 0 && layer.bank.count[row] > 0 ? usable : A(0);
  }
}

// What the classes of a part add to the weighted mean scatter in the columns from `column` on.
template <class A, int WIDTH>
__device__ void scatter_of_columns(const ObservedLayer<A>& layer, const BatchClasses<A>& batch,
                                   A total, int64_t part, int64_t column) {
  const Bank<const A>& bank = layer.bank;
  const int64_t first = part * kPartClasses, left = batch.count - first;
  const int64_t last = first + (left < kPartClasses ? left : kPartClasses);
  A sum[WIDTH] = {};
#pragma unroll 4
  for (int64_t k = first; k < last; ++k) {
    // Instead of rows that are left out the first ones are read, so that no load waits for a
    // branch; what is read then is not used: 0 times what is not finite is not 0.
    const bool used = layer.known[k] > 0;
    const int64_t at = (used ? k : 0) * batch.width + bank.first, row = used ? batch.classes[k] : 0;
    const A share = layer.known[k] / total;
    A mean[WIDTH], var[WIDTH], center[WIDTH];
    load_many(batch.mean + at + column, mean);
    load_many(batch.var + at + column, var);
    load_many(bank.mean + row * bank.dims + column, center);
#pragma unroll
    for (int w = 0; w < WIDTH; ++w) {
      const A difference = mean[w] - center[w];
      const A scatter = fused_multiply_add(difference, difference, var[w]);
      sum[w] = fused_multiply_add(share, used ? scatter : A(0), sum[w]);
    }
  }
  store_many(layer.partial + part * bank.dims + column, sum);
}

// One block for each slice of columns of a layer, and part of the classes.
template <class A>
__global__ void __launch_bounds__(kColumnThreads)
    scatter_kernel(const __grid_constant__ Layers<ObservedLayer<A>> layers, BatchClasses<A> batch,
                   int64_t parts) {
  SumShared<A>& shared = shared_memory<SumShared<A>>();
  const int64_t part = blockIdx.x % parts, slice = blockIdx.x / parts;
  const ObservedLayer<A>& layer = layer_of(layers, slice);
  const A total = sum_of(layer.known, batch.count, shared.scratch);
  if (!(total > 0)) return;  // as a bank without classes has no rows
  const int64_t first = layer.bank.first, dims = layer.bank.dims;
  const bool vectors = vectors_fit(batch.mean + first, batch.width) &&
                       vectors_fit(batch.var + first, batch.width) &&
                       vectors_fit(layer.bank.mean, dims) && vectors_fit(layer.partial, dims);
  for_columns<A>(slice - layer.first_slice, dims, vectors, [&](auto width, int64_t column) {
    scatter_of_columns<A, width.value>(layer, batch, total, part, column);
  });
}

// x moved towards y by a share of the way, exactly y at the end of it.
template <class A>
__device__ A interpolate(A x, A y, A share) {
  return share < A(0.5) ? x + share * (y - x) : y - (y - x) * (1 - share);
}

// Of variances_kernel; one at least, which has the layer's other numbers to write.
__host__ __device__ inline int64_t blocks_of(int64_t dims) {
  return dims > 0 ? ceil_div<int64_t>(dims, kWarp) : 1;
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

// Blocks of a layer: the variances of a warp's width of columns each; the warps share the parts.
// The last block of a layer raises `updates`, which all have read by then.
template <class A>
__global__ void __launch_bounds__(kVariancesThreads)
    variances_kernel(const __grid_constant__ Layers<ObservedLayer<A>> layers, int64_t count,
                     int64_t parts, A least_pace, A floor) {
  VariancesShared<A>& shared = shared_memory<VariancesShared<A>>();
  const ObservedLayer<A>& layer = layer_of(layers, blockIdx.x);
  const Variances<A>& variances = layer.variances;
  const int64_t dims = layer.bank.dims, block = blockIdx.x - layer.first_slice;
  const int64_t column = block * kWarp + threadIdx.x % kWarp;
  const bool any_known = sum_of(layer.known, count, shared.scratch) > 0;
  const A updates = *variances.updates + (any_known ? A(1) : A(0));
  if (any_known) {  // mask: nothing to learn from
    const A now = sum_of_parts(layer.partial, parts, column, dims, shared);
    const A pace = larger(1 / larger(updates, A(1)), least_pace);
    if (threadIdx.x < kWarp && column < dims)  // mask: one warp, the last block is ragged
      variances.var[column] = interpolate(variances.var[column], now, pace);
  }
  if (!arrives_last(layer.ticket, blocks_of(dims), shared.last)) return;
  const A level = sum_of(variances.var, dims, shared.scratch) / dims;
  const A least = floor * level + kSmallestNormal<A>;
  for (int64_t d = threadIdx.x; d < dims; d += blockDim.x)
    variances.metric[d] = level > 0 ? variances.var[d] + least : A(1);
  if (threadIdx.x > 0) return;
  *variances.updates = updates;
  *variances.unit = level > 0 ? square_root(level) : A(1);
}

// Writes weight (L, K), the metrics and units, and var and updates in place.
template <class A, class Launcher>
void observe_classes(Launcher& launch, const std::vector<Observed<A>>& layers,
                     BatchClasses<A> batch, double momentum, double floor, A* weight) {
  const int64_t parts = ceil_div<int64_t>(batch.count, kPartClasses);
  const int64_t total = std::ssize(layers);
  A* known = launch.template scratch<A>(total * batch.count);
  A* partial = launch.template scratch<A>(parts * batch.width);
  int* ticket = launch.template scratch<int>(total);
  std::vector<ObservedLayer<A>> all;
  for (const Observed<A>& layer : layers) {
    const int64_t l = std::ssize(all);
    all.push_back({layer, weight + l * batch.count, known + l * batch.count, ticket + l,
                   partial + parts * layer.bank.first, 0});
  }
  for_layers_of_launches(all, [&](Layers<ObservedLayer<A>> some, int) {
    const auto give_blocks = [&](const auto& of_layer) {
      int64_t blocks = 0;
      for (int l = 0; l < some.count; ++l) {
        some.layer[l].first_slice = blocks;
        blocks += of_layer(some.layer[l].bank.dims);
      }
      return blocks;
    };
    launch(class_weights_kernel<A>, some.count * (batch.count > 0 ? batch.count : 1),
           kColumnThreads, sizeof(SumShared<A>), some, batch);
    const int64_t slices =
        give_blocks([](int64_t dims) { return ceil_div<int64_t>(dims, kSliceColumns<A>); });
    launch(scatter_kernel<A>, parts * slices, kColumnThreads, sizeof(SumShared<A>), some, batch,
           parts);
    const int64_t blocks = give_blocks(blocks_of);
    launch(variances_kernel<A>, blocks, kVariancesThreads, sizeof(VariancesShared<A>), some,
           batch.count, parts, A(1 - momentum), A(floor));
  });
}

}  // namespace cwbr::cuda
