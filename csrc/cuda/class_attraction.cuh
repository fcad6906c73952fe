// class_attraction: weighted squared Mahalanobis distances of each sample to some class means, and
// their gradient. One block per sample reads it and the means it needs once. Variances must be
// normal numbers, which the floor of a bank's metric sees to.
#pragma once

#include "common.cuh"

namespace cwbr::cuda {

// The class means, their shared variances, and the classes that act on each sample.
template <class A>
struct Attraction {
  Bank<const A> bank;
  const A* var;
  Acting<A> acting;
};

// Energy of the columns from `column` on; writes their gradient.
template <class T, int WIDTH>
__device__ accumulate_t<T> attract(const Attraction<accumulate_t<T>>& by, const T* z,
                                   const int64_t* index, const accumulate_t<T>* coefficient,
                                   int64_t column, accumulate_t<T>* gradient) {
  using A = accumulate_t<T>;
  const Vector<T, WIDTH> raw = load<WIDTH>(z + column);
  A x[WIDTH], pull[WIDTH] = {}, squares[WIDTH] = {}, var[WIDTH];
#pragma unroll
  for (int w = 0; w < WIDTH; ++w) x[w] = widen(raw.item[w]);
  for (int64_t j = 0; j < by.acting.count; ++j) {
    const int64_t k = index[j];
    if (k < 0) continue;  // mask: no class
    device_check(k < by.bank.classes);
    const A c = coefficient[j];
    A center[WIDTH];
    load_many(by.bank.mean + k * by.bank.dims + column, center);
#pragma unroll
    for (int w = 0; w < WIDTH; ++w) {
      const A difference = x[w] - center[w];
      pull[w] += c * difference;
      squares[w] += c * difference * difference;
    }
  }
  load_many(by.var + column, var);
  A energy = 0;
#pragma unroll
  for (int w = 0; w < WIDTH; ++w) {
    const A inverse = reciprocal(var[w]);
    pull[w] *= inverse;
    energy += squares[w] * inverse;
  }
  store_many(gradient + column, pull);
  return energy / 2;
}

// The energy of the columns of this thread, WIDTH at a time.
template <class T, int WIDTH>
__device__ accumulate_t<T> attract_all(const Attraction<accumulate_t<T>>& by, const T* z,
                                       accumulate_t<T>* gradient) {
  const int64_t sample = blockIdx.x, dims = by.bank.dims;
  const int64_t first_class = sample * by.acting.count, row = sample * dims;
  accumulate_t<T> energy = 0;
  for (int64_t column = threadIdx.x * WIDTH; column < dims; column += blockDim.x * WIDTH)
    energy += attract<T, WIDTH>(by, z + row, by.acting.index + first_class,
                                by.acting.coefficient + first_class, column, gradient + row);
  return energy;
}

template <class T>
__global__ void __launch_bounds__(kColumnThreads, 1)
    class_attraction_kernel(const T* z, Attraction<accumulate_t<T>> by, accumulate_t<T>* energy,
                            accumulate_t<T>* gradient) {
  using A = accumulate_t<T>;
  SumShared<A>& shared = shared_memory<SumShared<A>>();
  const int64_t dims = by.bank.dims;
  const bool vectors = vectors_fit(z, dims) && vectors_fit(by.bank.mean, dims) &&
                       vectors_fit(by.var, dims) && vectors_fit(gradient, dims);
  const A mine = vectors ? attract_all<T, kVectorWidth<T>>(by, z, gradient)
                         : attract_all<T, 1>(by, z, gradient);
  const A sum = block_sum(mine, shared.scratch);
  if (threadIdx.x == 0) energy[blockIdx.x] = sum;
}

// z (B, D) and the bank -> energy (B,), gradient (B, D).
template <class T, class Launcher, class A>
void class_attraction(Launcher& launch, Matrix<const T> z, Bank<const A> bank, const A* var,
                      Acting<A> acting, A* energy, A* gradient) {
  launch(class_attraction_kernel<T>, z.rows, kColumnThreads, sizeof(SumShared<A>), z.data,
         Attraction<A>{bank, var, acting}, energy, gradient);
}

}  // namespace cwbr::cuda
