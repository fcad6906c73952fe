// follow_classes: moves the class means of a bank towards those of a batch. One block per layer and
// class of the batch; no two of them have the same row.
#pragma once

#include "common.cuh"

namespace cwbr::cuda {

// The columns of this thread, WIDTH at a time.
template <int WIDTH, class A>
__device__ void move_towards(A rate, const A* target, int64_t dims, A* mean) {
  for (int64_t column = threadIdx.x * WIDTH; column < dims; column += blockDim.x * WIDTH) {
    A to[WIDTH], from[WIDTH];
    load_many(target + column, to);
    load_own(mean + column, from);
#pragma unroll
    for (int w = 0; w < WIDTH; ++w) from[w] = fused_multiply_add(rate, to[w] - from[w], from[w]);
    store_many(mean + column, from);
  }
}

// batch.weight: of these layers.
template <class A>
__global__ void __launch_bounds__(kColumnThreads)
    follow_classes_kernel(const __grid_constant__ Layers<Bank<A>> layers, BatchClasses<A> batch,
                          A least_rate) {
  const Bank<A>& bank = layers.layer[blockIdx.x / batch.count];
  const int64_t k = blockIdx.x % batch.count, row = batch.classes[k], dims = bank.dims;
  const A weight = batch.weight[blockIdx.x];
  if (row < 0 || !(weight > 0)) return;  // mask: left out
  device_check(row < bank.classes);
  const A seen = bank.count[row] + weight;
  __syncthreads();  // all threads have read it
  if (threadIdx.x == 0) bank.count[row] = seen;
  const A rate = larger(weight / larger(seen, A(1)), least_rate);
  const A* target = batch.mean + bank.first;
  const bool vectors = vectors_fit(bank.mean, dims) && vectors_fit(target, batch.width);
  if (vectors)
    move_towards<kVectorWidth<A>>(rate, target + k * batch.width, dims, bank.mean + row * dims);
  else
    move_towards<1>(rate, target + k * batch.width, dims, bank.mean + row * dims);
}

// Writes rows of the bank.
template <class A, class Launcher>
void follow_classes(Launcher& launch, const std::vector<Bank<A>>& layers, BatchClasses<A> batch,
                    double momentum) {
  for_layers_of_launches(layers, [&](const Layers<Bank<A>>& some, int first) {
    BatchClasses<A> part = batch;
    part.weight += first * batch.count;
    launch(follow_classes_kernel<A>, some.count * batch.count, kColumnThreads, 0, some, part,
           A(1 - momentum));
  });
}

}  // namespace cwbr::cuda
