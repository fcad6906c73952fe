// pair_distance and its gradient for a list of pairs: gathered, measured and summed in one pass.
//
// Four numbers are read per pair and dimension, so the kernels wait for memory and can afford the
// form that cancels nothing: D = sum (m_i - m_j)^2 / (4 S) + log(1 + (u_i - u_j)^2 / (4 u_i u_j)) /
// 4 with S = u_i + u_j. In the gradient each class walks the pairs that touch it, in order.
#pragma once

#include "common.cuh"

namespace cwbr::cuda {

template <class A>
__device__ A distance_term(A mean_i, A u_i, A mean_j, A u_j) {
  const A difference = mean_i - mean_j, gap = u_i - u_j;
  const A spread = gap / u_i * (gap / u_j) / 4;
  return difference * difference / (4 * (u_i + u_j)) + log_of_1_plus(spread) / 4;
}

template <class A, int WIDTH>
__device__ A distance_of_columns(const A* mean_i, const A* var_i, const A* mean_j, const A* var_j,
                                 int64_t dims, A eps) {
  A sum = 0;
  for (int64_t column = threadIdx.x * WIDTH; column < dims; column += kColumnThreads * WIDTH) {
    const Vector<A, WIDTH> m_i = load<WIDTH>(mean_i + column), m_j = load<WIDTH>(mean_j + column);
    const Vector<A, WIDTH> v_i = load<WIDTH>(var_i + column), v_j = load<WIDTH>(var_j + column);
#pragma unroll
    for (int w = 0; w < WIDTH; ++w)
      sum += distance_term(m_i.item[w], v_i.item[w] + eps, m_j.item[w], v_j.item[w] + eps);
  }
  return sum;
}

// The distance of one pair, by the whole block; every thread gets it.
template <class A>
__device__ A distance_of_pair(const A* mean, const A* var, int64_t groups, int64_t dims,
                              const int64_t* pair, A eps, A (&scratch)[kMaxWarps]) {
  const int64_t i = pair[0], j = pair[1];
  device_check(i >= 0 && i < groups && j >= 0 && j < groups);
  const A* rows[4] = {mean + i * dims, var + i * dims, mean + j * dims, var + j * dims};
  const bool vectors = vectors_fit(mean, dims) && vectors_fit(var, dims);
  const A part = vectors ? distance_of_columns<A, kVectorWidth<A>>(rows[0], rows[1], rows[2],
                                                                   rows[3], dims, eps)
                         : distance_of_columns<A, 1>(rows[0], rows[1], rows[2], rows[3], dims, eps);
  return block_sum(part, scratch);
}

template <class A>
__global__ void __launch_bounds__(kColumnThreads)
    pair_distance_kernel(const A* mean, const A* var, int64_t groups, int64_t dims,
                         const int64_t* pairs, A eps, A* distance) {
  const A sum = distance_of_pair(mean, var, groups, dims, pairs + 2 * blockIdx.x, eps,
                                 shared_memory<SumShared<A>>().scratch);
  if (threadIdx.x == 0) distance[blockIdx.x] = sum;
}

// For each group the ends of pairs that touch it, in order: end 2 p is i of pair p, 2 p + 1 its j.
struct Touching {
  int* start;  // (K + 1,)
  int* ends;   // (2 M,)
};

__device__ inline void find_touching(int64_t group, int64_t groups, const int64_t* pairs,
                                     int num_pairs, Touching touching, int (&scratch)[kMaxWarps]) {
  int before = 0;
  for (int end = threadIdx.x; end < 2 * num_pairs; end += blockDim.x) {
    device_check(pairs[end] >= 0 && pairs[end] < groups);
    before += pairs[end] < group;
  }
  int at = block_scan(before, scratch).total;
  if (threadIdx.x == 0) touching.start[group] = at;
  for (int first = 0; first < 2 * num_pairs; first += blockDim.x) {
    const int end = first + threadIdx.x;
    bool here = false;
    if (end < 2 * num_pairs)  // mask: the last round is short
      here = pairs[end] == group;
    const Scan scan = block_scan(here, scratch);
    if (here) touching.ends[at + scan.before] = end;
    at += scan.total;
  }
}

// One block per group, and one more for the end of the list.
static __global__ void __launch_bounds__(kColumnThreads)
    touching_kernel(const int64_t* pairs, int num_pairs, Touching touching) {
  find_touching(blockIdx.x, gridDim.x - 1, pairs, num_pairs, touching,
                shared_memory<ScanShared>().scratch);
}

// A pair is three loads, each of which waits for the one before: a class that is in hundreds of
// pairs has those of several on their way at once.
constexpr int kPairsInFlight = 4;

template <class A>
struct PairGradients {
  const A* grad;  // (M,)
  const int64_t* pairs;
  Touching touching;
};

// dL/dmean and dL/dvar of one group: with t = (m_i - m_j)/S the sums over its pairs of g t/2 and
// g ((u_i - u_j)/(S u_i) - t^2)/4.
template <class A, int WIDTH>
__device__ void walk_pairs(const PairGradients<A>& from, const A* mean, const A* var, int64_t dims,
                           int64_t group, int64_t column, A eps, A (&grad_mean)[WIDTH],
                           A (&grad_var)[WIDTH]) {
  A mean_i[WIDTH], u_i[WIDTH];
  load_many(mean + group * dims + column, mean_i);
  load_many(var + group * dims + column, u_i);
#pragma unroll
  for (int w = 0; w < WIDTH; ++w) {
    u_i[w] += eps;
    grad_mean[w] = grad_var[w] = 0;
  }
  const int last = from.touching.start[group + 1];
  for (int first = from.touching.start[group]; first < last; first += kPairsInFlight) {
    A g[kPairsInFlight], mean_j[kPairsInFlight][WIDTH], u_j[kPairsInFlight][WIDTH];
#pragma unroll
    for (int k = 0; k < kPairsInFlight; ++k) {
      const int end = from.touching.ends[first + k < last ? first + k : first];
      g[k] = from.grad[end / 2];
      const int64_t other = from.pairs[end ^ 1] * dims + column;
      load_many(mean + other, mean_j[k]);
      load_many(var + other, u_j[k]);
    }
#pragma unroll
    for (int k = 0; k < kPairsInFlight; ++k) {
      if (first + k >= last) continue;  // mask: the last round is short
      if (g[k] == 0) continue;
#pragma unroll
      for (int w = 0; w < WIDTH; ++w) {
        const A u = u_j[k][w] + eps, sum = u_i[w] + u, t = (mean_i[w] - mean_j[k][w]) / sum;
        grad_mean[w] += g[k] * t / 2;
        grad_var[w] += g[k] * ((u_i[w] - u) / sum / u_i[w] - t * t) / 4;
      }
    }
  }
}

// One block per group and slice of columns.
template <class A>
__global__ void __launch_bounds__(kColumnThreads, 1)
    pair_distance_backward_kernel(PairGradients<A> from, const A* mean, const A* var,
                                  int64_t groups, int64_t dims, A eps, A* grad_mean, A* grad_var) {
  const int64_t group = blockIdx.x % groups, slice = blockIdx.x / groups;
  const bool vectors = vectors_fit(mean, dims) && vectors_fit(var, dims);
  for_columns<A>(slice, dims, vectors, [&](auto width, int64_t column) {
    A by_mean[width.value], by_var[width.value];
    walk_pairs(from, mean, var, dims, group, column, eps, by_mean, by_var);
    store_many(grad_mean + group * dims + column, by_mean);
    store_many(grad_var + group * dims + column, by_var);
  });
}

// mean, var (K, D), pairs (M, 2) -> distance (M,).
template <class A, class Launcher>
void pair_distance(Launcher& launch, Moments<A> of, Pairs pairs, double eps, A* distance) {
  launch(pair_distance_kernel<A>, pairs.count, kColumnThreads, sizeof(SumShared<A>), of.mean,
         of.var, of.rows, of.dims, pairs.index, A(eps), distance);
}

// The memory for a Touching.
template <class Launcher>
Touching new_touching(Launcher& launch, int64_t groups, int64_t pairs) {
  return {launch.template scratch<int>(groups + 1), launch.template scratch<int>(2 * pairs)};
}

// grad (M,) -> grad_mean, grad_var (K, D).
template <class A, class Launcher>
void pair_distance_backward(Launcher& launch, const A* grad, Moments<A> of, Pairs pairs, double eps,
                            A* grad_mean, A* grad_var) {
  if (of.rows == 0) return;
  const Touching touching = new_touching(launch, of.rows, pairs.count);
  launch(touching_kernel, of.rows + 1, kColumnThreads, sizeof(ScanShared), pairs.index,
         static_cast<int>(pairs.count), touching);
  const int64_t slices = ceil_div<int64_t>(of.dims, kSliceColumns<A>);
  launch(pair_distance_backward_kernel<A>, slices * of.rows, kColumnThreads, 0,
         PairGradients<A>{grad, pairs.index, touching}, of.mean, of.var, of.rows, of.dims, A(eps),
         grad_mean, grad_var);
}

}  // namespace cwbr::cuda
