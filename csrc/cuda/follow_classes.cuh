// follow_classes: moves the class means of a bank towards those of a batch. One block per class of
// the batch; no two of them have the same row.
#pragma once

#include "common.cuh"

namespace cwbr::cuda {

// Adjacent numbers of a row that this block also writes.
template <int WIDTH, class A>
__device__ void load_own(const A* from, A (&values)[WIDTH]) {
  if constexpr (WIDTH == 1) {
    values[0] = *from;
  } else {
    static_assert(sizeof(values) == 16);
    const uint4 bits = load_own_128(from);
    __builtin_memcpy(values, &bits, sizeof(bits));
  }
}

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

template <class A>
__global__ void __launch_bounds__(kColumnThreads)
    follow_classes_kernel(Bank<A> bank, BatchClasses<A> batch, A least_rate) {
  const int64_t k = blockIdx.x, row = batch.classes[k];
  const A weight = batch.weight[k];
  if (row < 0 || !(weight > 0)) return;  // mask: left out
  device_check(row < bank.classes);
  const A seen = bank.count[row] + weight;
  __syncthreads();  // all threads have read it
  if (threadIdx.x == 0) bank.count[row] = seen;
  const A rate = larger(weight / larger(seen, A(1)), least_rate);
  const int64_t dims = bank.dims;
  const bool vectors = vectors_fit(bank.mean, dims) && vectors_fit(batch.mean, dims);
  if (vectors)
    move_towards<kVectorWidth<A>>(rate, batch.mean + k * dims, dims, bank.mean + row * dims);
  else
    move_towards<1>(rate, batch.mean + k * dims, dims, bank.mean + row * dims);
}

// Writes rows of the bank.
template <class A, class Launcher>
void follow_classes(Launcher& launch, Bank<A> bank, BatchClasses<A> batch, double momentum) {
  launch(follow_classes_kernel<A>, batch.count, kColumnThreads, 0, bank, batch, A(1 - momentum));
}

}  // namespace cwbr::cuda
