// class_attraction: weighted squared Mahalanobis distances of each sample to some class means, and
// their gradient. One block per sample and layer reads the sample and the means it needs once.
// Variances must be normal numbers, which the floor of a bank's metric sees to.
#pragma once

#include "common.cuh"

namespace cwbr::cuda {

constexpr int kTogether = 8;  // classes whose distances a thread sums at a time

// Features (batch, width), their variances (width,), the units of these layers, and the results,
// whose numbers are of these layers.
template <class T>
struct Attracted {
  const T* z;
  int64_t batch, width;
  const accumulate_t<T>*var, *unit;
  Attraction<accumulate_t<T>> result;
};

// A class that acts on a sample, negative for none.
template <class A>
struct Actor {
  int64_t row;
  A coefficient;
};

template <class A>
__device__ Actor<A> own_actor(const Acting<A>& acting, int64_t classes, int64_t at) {
  const int64_t row = acting.labels[at];
  device_check(row < classes);
  const A share = acting.shares ? acting.shares[at] : A(1);
  return {share > 0 ? row : -1, share};
}

// Whether a sample has a main class, if any, and something is known of all its own classes.
template <class A>
__device__ bool acts(const Acting<A>& acting, int64_t classes, int64_t sample) {
  for (int64_t s = 0; s < acting.own; ++s) {
    const int64_t row = own_actor(acting, classes, sample * acting.own + s).row;
    const bool known = row < 0 ? s > 0 : acting.seen[row];
    if (!known) return false;
  }
  return true;
}

// Class j of a sample, its own ones first; rivals that are also own classes are none.
template <class A>
__device__ Actor<A> actor(const Acting<A>& acting, int64_t classes, int64_t sample, int64_t j) {
  if (j >= acting.own + acting.others) return {-1, 0};  // mask: no such class
  if (j < acting.own) return own_actor(acting, classes, sample * acting.own + j);
  const int64_t at = sample * acting.others + j - acting.own, row = acting.rivals[at];
  device_check(row < classes);
  for (int64_t s = 0; s < acting.own; ++s)
    if (own_actor(acting, classes, sample * acting.own + s).row == row) return {-1, 0};
  return {row, -acting.push * acting.weight[at]};
}

// Whether the main class weighs more than each rival.
template <class A>
__device__ bool is_right(const Acting<A>& acting, int64_t classes, int64_t sample) {
  const A mine = acting.main_weight[sample];
  bool right =
      acting.own > 0 && own_actor(acting, classes, sample * acting.own).row >= 0 && mine > 0;
  for (int64_t r = 0; r < acting.others; ++r)
    if (actor(acting, classes, sample, acting.own + r).row >= 0)
      right = right && mine > acting.weight[sample * acting.others + r];
  return right;
}

// What the threads of a block sum up: the distance to each of some classes, and after them the
// gradient's squared length.
template <class A>
struct Sums {
  A of[kTogether + 1] = {};
};

template <class A>
struct AttractionShared {
  Sums<A> warp[2][kColumnThreads / kWarp];
};

// The columns from `column` on of some classes; adds to the gradient of those before them.
template <class T, int WIDTH>
__device__ void attract(const Attracted<T>& by, const Bank<const accumulate_t<T>>& bank,
                        accumulate_t<T> unit, const Actor<accumulate_t<T>> (&actors)[kTogether],
                        bool adds, int64_t sample, int64_t column, Sums<accumulate_t<T>>& sums) {
  using A = accumulate_t<T>;
  const int64_t at = sample * by.width + bank.first + column;
  const Vector<T, WIDTH> raw = load<WIDTH>(by.z + at);
  A x[WIDTH], pull[WIDTH] = {}, inverse[WIDTH], before[WIDTH] = {};
  load_many(by.var + bank.first + column, inverse);
  if (adds) load_own(by.result.gradient + at, before);
#pragma unroll
  for (int w = 0; w < WIDTH; ++w) {
    x[w] = widen(raw.item[w]);
    inverse[w] = reciprocal(inverse[w]);
  }
#pragma unroll
  for (int r = 0; r < kTogether; ++r) {
    if (actors[r].row < 0) continue;  // mask: no class
    A center[WIDTH];
    load_many(bank.mean + actors[r].row * bank.dims + column, center);
#pragma unroll
    for (int w = 0; w < WIDTH; ++w) {
      const A difference = x[w] - center[w];
      pull[w] += actors[r].coefficient * difference;
      sums.of[r] += difference * difference * inverse[w];
    }
  }
#pragma unroll
  for (int w = 0; w < WIDTH; ++w) {
    pull[w] = fused_multiply_add(pull[w] * inverse[w], unit, before[w]);
    sums.of[kTogether] += pull[w] * pull[w];
  }
  store_many(by.result.gradient + at, pull);
}

// Every thread gets the sums over the block. Alternating rooms: one may still be read.
template <class A>
__device__ void sum_over_block(Sums<A>& sums, Sums<A> (&room)[kColumnThreads / kWarp]) {
#pragma unroll
  for (int i = 0; i <= kTogether; ++i)
    for (unsigned lane = kWarp / 2; lane > 0; lane /= 2)
      sums.of[i] += __shfl_xor_sync(kAllLanes, sums.of[i], lane);
  if (threadIdx.x % kWarp == 0) room[threadIdx.x / kWarp] = sums;
  __syncthreads();
#pragma unroll
  for (int i = 0; i <= kTogether; ++i) {
    sums.of[i] = room[0].of[i];
    for (unsigned warp = 1; warp < kColumnThreads / kWarp; ++warp) sums.of[i] += room[warp].of[i];
  }
}

template <class T>
__global__ void __launch_bounds__(kColumnThreads, 1)
    class_attraction_kernel(const __grid_constant__ Layers<Bank<const accumulate_t<T>>> layers,
                            Attracted<T> by, Acting<accumulate_t<T>> acting) {
  using A = accumulate_t<T>;
  AttractionShared<A>& shared = shared_memory<AttractionShared<A>>();
  const int64_t layer = blockIdx.x / by.batch, sample = blockIdx.x % by.batch;
  const Bank<const A>& bank = layers.layer[layer];
  const int64_t first = bank.first, dims = bank.dims, count = acting.own + acting.others;
  const A unit = by.unit[layer];
  const bool known = acts(acting, bank.classes, sample);
  const bool vectors = dims % kVectorWidth<T> == 0 && vectors_fit(bank.mean, dims) &&
                       vectors_fit(by.z + first, by.width) && vectors_fit(by.var + first, dims) &&
                       vectors_fit(by.result.gradient + first, by.width);
  A energy = 0, own = kInfinity<A>, rival = kInfinity<A>, squares = 0;
  for (int64_t j = 0; j == 0 || j < count; j += kTogether) {
    Actor<A> actors[kTogether];
#pragma unroll
    for (int r = 0; r < kTogether; ++r)
      actors[r] = known ? actor(acting, bank.classes, sample, j + r) : Actor<A>{-1, 0};
    Sums<A> sums;
    if (vectors) {
      constexpr int kWidth = kVectorWidth<T>;
      for (int64_t column = threadIdx.x * kWidth; column < dims; column += blockDim.x * kWidth)
        attract<T, kWidth>(by, bank, unit, actors, j > 0, sample, column, sums);
    } else {
      for (int64_t column = threadIdx.x; column < dims; column += blockDim.x)
        attract<T, 1>(by, bank, unit, actors, j > 0, sample, column, sums);
    }
    sum_over_block(sums, shared.warp[j / kTogether % 2]);
#pragma unroll
    for (int r = 0; r < kTogether; ++r) {
      if (actors[r].row < 0) continue;  // mask: no class
      const A distance = sums.of[r];
      energy += actors[r].coefficient * distance;
      if (j + r == 0 && acting.own > 0) own = distance;
      if (j + r >= acting.own && !(distance >= rival)) rival = distance;  // NaN stays
    }
    squares = sums.of[kTogether];
  }
  if (threadIdx.x > 0) return;
  by.result.energy[blockIdx.x] = energy / 2 / (dims > 0 ? dims : 1);
  by.result.nearest[blockIdx.x] = own < rival && rival < kInfinity<A> ? A(1) : A(0);
  by.result.right[blockIdx.x] = is_right(acting, bank.classes, sample) ? A(1) : A(0);
  by.result.squares[blockIdx.x] = squares < kSmallestNormal<A> ? kSmallestNormal<A> : squares;
}

// z (B, width) and the bank -> the numbers of all layers, and the gradient.
template <class T, class Launcher, class A>
void class_attraction(Launcher& launch, Matrix<const T> z, const std::vector<Bank<const A>>& layers,
                      const A* var, const A* unit, Acting<A> acting, Attraction<A> result) {
  for_layers_of_launches(layers, [&](const Layers<Bank<const A>>& some, int first) {
    const int64_t at = first * z.rows;
    launch(class_attraction_kernel<T>, some.count * z.rows, kColumnThreads,
           sizeof(AttractionShared<A>), some,
           Attracted<T>{z.data,
                        z.rows,
                        z.cols,
                        var,
                        unit + first,
                        {result.energy + at, result.nearest + at, result.right + at,
                         result.squares + at, result.gradient}},
           acting);
  });
}

}  // namespace cwbr::cuda
