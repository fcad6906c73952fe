// confusion_weights: mean softmax of each class group at the columns of the classes present.
//
// The logits are read once, by a streaming softmax that keeps a running maximum m and the sum of
// exp(x - m); the few columns wanted are then gathered while the row is still in the cache.
#pragma once

#include "common.cuh"

namespace cwbr::cuda {

constexpr int kSoftmaxThreads = 512;
constexpr int kSoftmaxWarps = kSoftmaxThreads / kWarp;

// Maximum and scaled sum of a part of a row: sum = sum(exp(x - max)).
template <class A>
struct PartialSoftmax {
  A max = -kInfinity<A>;
  A sum = 0;
};

// A part whose elements are all -inf counts nothing; NaN makes the sum NaN.
template <class A>
__device__ PartialSoftmax<A> merge(PartialSoftmax<A> a, PartialSoftmax<A> b) {
  PartialSoftmax<A> both;
  both.max = larger(a.max, b.max);
  if (a.sum != 0) both.sum += a.sum * exponential(a.max - both.max);
  if (b.sum != 0) both.sum += b.sum * exponential(b.max - both.max);
  return both;
}

template <class A, int WIDTH>
__device__ void include(PartialSoftmax<A>& part, const A (&values)[WIDTH]) {
  A max = part.max;
#pragma unroll
  for (int w = 0; w < WIDTH; ++w) max = larger(max, values[w]);
  A sum = part.sum != 0 ? part.sum * exponential(part.max - max) : A{0};
#pragma unroll
  for (int w = 0; w < WIDTH; ++w)
    if (!(values[w] == -kInfinity<A>)) sum += exponential(values[w] - max);
  part = {max, sum};
}

// The part of one row that falls to thread `rank` of `team`: single elements up to the first
// 128-bit boundary and after the last one, vectors between.
template <class T>
__device__ PartialSoftmax<accumulate_t<T>> part_of_row(const T* row, int64_t length, int rank,
                                                       int team) {
  using A = accumulate_t<T>;
  constexpr int WIDTH = kVectorWidth<T>;
  PartialSoftmax<A> part;
  const int64_t misaligned = reinterpret_cast<uintptr_t>(row) % 16 / sizeof(T);
  int64_t head = (WIDTH - misaligned) % WIDTH;
  if (head > length) head = length;  // clamp: a row may end before the first boundary
  const int64_t vectors = (length - head) / WIDTH, tail = head + vectors * WIDTH;
  for (int64_t i = rank; i < head; i += team) {
    const A value[1] = {widen(row[i])};
    include(part, value);
  }
#pragma unroll 4
  for (int64_t v = rank; v < vectors; v += team) {
    const Vector<T, WIDTH> raw = load<WIDTH>(row + head + v * WIDTH);
    A values[WIDTH];
#pragma unroll
    for (int w = 0; w < WIDTH; ++w) values[w] = widen(raw.item[w]);
    include(part, values);
  }
  for (int64_t i = tail + rank; i < length; i += team) {
    const A value[1] = {widen(row[i])};
    include(part, value);
  }
  return part;
}

template <class A>
struct SoftmaxShared {
  PartialSoftmax<A> part[kSoftmaxWarps];
  A max[kSoftmaxWarps];
  A scale[kSoftmaxWarps];
};

// One block per group: mean_probs[k, j] = mean over the samples of k of
// softmax(logits)[classes[j]].
template <class T>
__global__ void __launch_bounds__(kSoftmaxThreads, 1)
    mean_softmax_kernel(const T* logits, int64_t num_classes, const int64_t* order,
                        const int64_t* offsets, const int64_t* classes, int64_t groups,
                        accumulate_t<T>* mean_probs) {
  using A = accumulate_t<T>;
  SoftmaxShared<A>& shared = shared_memory<SoftmaxShared<A>>();
  const int64_t begin = offsets[blockIdx.x], end = offsets[blockIdx.x + 1], count = end - begin;
  A* probs = mean_probs + blockIdx.x * groups;
  for (int64_t j = threadIdx.x; j < groups; j += blockDim.x) probs[j] = 0;

  // Rows in flight at once; each has a team of warps.
  int rows = 1;
  while (rows < kSoftmaxWarps && rows < count) rows *= 2;
  const int team = kSoftmaxWarps / rows, warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  for (int64_t first = begin; first < end; first += rows) {
    const int64_t position = first + warp / team;
    PartialSoftmax<A> part;
    if (position < end)  // mask: fewer rows are left than teams
      part = part_of_row(logits + order[position] * num_classes, num_classes,
                         warp % team * kWarp + lane, team * kWarp);
    for (unsigned other = kWarp / 2; other > 0; other /= 2)
      part = merge(part, {__shfl_xor_sync(kAllLanes, part.max, other),
                          __shfl_xor_sync(kAllLanes, part.sum, other)});
    if (lane == 0) shared.part[warp] = part;
    __syncthreads();
    if (threadIdx.x < static_cast<unsigned>(rows)) {
      PartialSoftmax<A> row = shared.part[threadIdx.x * team];
      for (int w = 1; w < team; ++w) row = merge(row, shared.part[threadIdx.x * team + w]);
      shared.max[threadIdx.x] = row.max;
      shared.scale[threadIdx.x] = 1 / (row.sum * count);
    }
    __syncthreads();
    const int present = end - first < rows ? end - first : rows;
    for (int64_t j = threadIdx.x; j < groups; j += blockDim.x) {
      const int64_t column = classes[j];
      if (column < 0) continue;  // mask: an empty group has no column
      device_check(column < num_classes);
      A sum = 0;
      for (int r = 0; r < present; ++r) {
        const A logit = widen(logits[order[first + r] * num_classes + column]);
        sum += exponential(logit - shared.max[r]) * shared.scale[r];
      }
      probs[j] += sum;
    }
  }
}

// The symmetric weight of a pair, from mean probabilities (K, K).
template <class A>
struct SymmetricWeights {
  const A* mean_probs;
  int64_t groups;
  __device__ A operator()(int64_t i, int64_t j) const {
    return (mean_probs[i * groups + j] + mean_probs[j * groups + i]) / 2;
  }
};

template <class A>
__global__ void symmetrize_kernel(SymmetricWeights<A> weights, A* alpha) {
  const int64_t at = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  const int64_t i = at / weights.groups, j = at % weights.groups;
  if (i < weights.groups)  // mask: the last block is ragged
    alpha[at] = i == j ? A{0} : weights(i, j);
}

template <class T, class Launcher, class A>
void mean_softmax(Launcher& launch, Matrix<const T> logits, Groups groups, const int64_t* classes,
                  A* mean_probs) {
  launch(mean_softmax_kernel<T>, groups.count, kSoftmaxThreads, sizeof(SoftmaxShared<A>),
         logits.data, logits.cols, groups.order, groups.offsets, classes, groups.count, mean_probs);
}

// logits (B, C) and groups -> alpha (K, K), symmetric with a zero diagonal.
template <class T, class Launcher, class A>
void confusion_weights(Launcher& launch, Matrix<const T> logits, Groups groups,
                       const int64_t* classes, A* alpha) {
  const int64_t weights = groups.count * groups.count;
  A* mean_probs = launch.template scratch<A>(weights);
  mean_softmax(launch, logits, groups, classes, mean_probs);
  launch(symmetrize_kernel<A>, ceil_div<int64_t>(weights, kSoftmaxThreads), kSoftmaxThreads, 0,
         SymmetricWeights<A>{mean_probs, groups.count}, alpha);
}

}  // namespace cwbr::cuda
