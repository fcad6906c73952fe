// top_confusions: the most probable other seen classes of each sample, and its own probability.
//
// One block per row reads it once, chunk by chunk, with the streaming softmax of
// confusion_weights.cuh. The largest candidates so far are a sorted list, kept in the results
// themselves: while one left in the chunk exceeds the last of a full list, the largest is inserted.
// After the first few chunks nearly all of them cost one comparison per logit and one vote.
#pragma once

#include "confusion_weights.cuh"

namespace cwbr::cuda {

constexpr int kRowThreads = 512;
constexpr int kRowVectors = 2;  // per thread and chunk
constexpr int64_t kBeyondClasses = std::numeric_limits<int64_t>::max();

template <class T>
constexpr int kRowLogits = kRowVectors * kVectorWidth<T>;

template <class A>
struct ConfusionsShared {
  A values[kMaxWarps];
  int64_t classes[kMaxWarps];
  A threshold;
};

// The sorted list: falling, the smaller class first among equals. One thread writes it.
template <class A>
struct TopList {
  int64_t* index;
  A* value;
  int64_t size, count;

  // Returns what a value must exceed to have a place from now on.
  __device__ A insert(int64_t c, A x) const {
    int64_t at = count < size ? count : size - 1;
    for (; at > 0 && value[at - 1] < x; --at) {
      value[at] = value[at - 1];
      index[at] = index[at - 1];
    }
    value[at] = x;
    index[at] = c;
    return count + 1 < size ? -kInfinity<A> : value[size - 1];
  }
};

// The logits of one thread, of the chunk that begins at `first`, and the class of each.
template <class T>
struct RowPart {
  using A = accumulate_t<T>;
  static constexpr int WIDTH = kVectorWidth<T>;
  int64_t first;
  A values[kRowLogits<T>];

  __device__ int64_t class_of(int i) const {
    return first + (i / WIDTH * static_cast<int64_t>(blockDim.x) + threadIdx.x) * WIDTH + i % WIDTH;
  }

  // Vectors begin at 128-bit boundaries of memory; those that reach out of the row are read one by
  // one, and what is outside of it counts as -inf.
  __device__ void read(const T* row, int64_t length) {
#pragma unroll
    for (int v = 0; v < kRowVectors; ++v) {
      const int64_t at = class_of(v * WIDTH);
      if (at >= 0 && at + WIDTH <= length) {  // mask: not all of the vector is in the row
        const Vector<T, WIDTH> raw = load<WIDTH>(row + at);
#pragma unroll
        for (int w = 0; w < WIDTH; ++w) values[v * WIDTH + w] = widen(raw.item[w]);
      } else {
#pragma unroll
        for (int w = 0; w < WIDTH; ++w) {
          A value = -kInfinity<A>;             // neutral: no logit
          if (at + w >= 0 && at + w < length)  // mask: outside of the row
            value = widen(row[at + w]);
          values[v * WIDTH + w] = value;
        }
      }
    }
  }

  // Leaves only candidates that exceed `threshold`.
  __device__ void keep_candidates(A threshold, const bool* seen, int64_t target) {
#pragma unroll
    for (int i = 0; i < kRowLogits<T>; ++i) {
      const int64_t c = class_of(i);
      const bool candidate = values[i] > threshold && c != target && seen[c];
      if (!candidate) values[i] = -kInfinity<A>;
    }
  }

  __device__ bool exceeds(A threshold) const {
    bool larger = false;
#pragma unroll
    for (int i = 0; i < kRowLogits<T>; ++i) larger |= values[i] > threshold;
    return larger;
  }

  __device__ bool has_nan() const {
    bool nan = false;
#pragma unroll
    for (int i = 0; i < kRowLogits<T>; ++i) nan |= values[i] != values[i];
    return nan;
  }
};

// Moves the candidates of a chunk into the list, largest first; every thread gets the new
// threshold.
template <class T>
__device__ accumulate_t<T> insert_candidates(RowPart<T>& part, accumulate_t<T> threshold,
                                             TopList<accumulate_t<T>>& list, const bool* seen,
                                             int64_t target,
                                             ConfusionsShared<accumulate_t<T>>& shared) {
  using A = accumulate_t<T>;
  const bool found = part.exceeds(threshold);
  if (!__syncthreads_or(found)) return threshold;
  part.keep_candidates(threshold, seen, target);
  while (true) {
    A mine = -kInfinity<A>;
#pragma unroll
    for (int i = 0; i < kRowLogits<T>; ++i) mine = larger(mine, part.values[i]);
    const A best = block_max(mine, shared.values);
    if (!(best > threshold)) return threshold;
    int64_t first = kBeyondClasses;
#pragma unroll
    for (int i = kRowLogits<T> - 1; i >= 0; --i)
      if (part.values[i] == best) first = part.class_of(i);
    const int64_t chosen =
        block_reduce(first, shared.classes, [](int64_t a, int64_t b) { return a < b ? a : b; });
    if (threadIdx.x == 0) shared.threshold = list.insert(chosen, best);
    __syncthreads();
    threshold = shared.threshold;
    if (list.count < list.size) ++list.count;
#pragma unroll
    for (int i = 0; i < kRowLogits<T>; ++i)
      if (part.class_of(i) == chosen) part.values[i] = -kInfinity<A>;
  }
}

template <class T>
__global__ void __launch_bounds__(kRowThreads)
    top_confusions_kernel(const T* logits, int64_t num_classes, const int64_t* targets,
                          const bool* seen, int64_t top, int64_t* index, accumulate_t<T>* weight,
                          accumulate_t<T>* own) {
  using A = accumulate_t<T>;
  ConfusionsShared<A>& shared = shared_memory<ConfusionsShared<A>>();
  const int64_t target = targets[blockIdx.x], begin = blockIdx.x * top;
  device_check(target >= 0 && target < num_classes);
  const T* row = logits + blockIdx.x * num_classes;
  TopList<A> list{index + begin, weight + begin, top, 0};
  A threshold = top > 0 ? -kInfinity<A> : kInfinity<A>;
  PartialSoftmax<A> softmax;
  bool nan = false;

  RowPart<T> part;
  part.first = -static_cast<int64_t>(reinterpret_cast<uintptr_t>(row) % 16 / sizeof(T));
  for (; part.first < num_classes; part.first += blockDim.x * kRowLogits<T>) {
    part.read(row, num_classes);
    include(softmax, part.values);
    nan |= part.has_nan();
    threshold = insert_candidates(part, threshold, list, seen, target, shared);
  }

  const A max = block_max(softmax.max, shared.values);
  A scaled = 0;
  if (softmax.sum != 0) scaled = softmax.sum * exponential(softmax.max - max);
  const A sum = block_sum(scaled, shared.values);  // NaN where a logit is NaN or infinity
  for (int64_t j = threadIdx.x; j < top; j += blockDim.x) {
    const bool used = j < list.count && sum == sum;
    weight[begin + j] = used ? exponential(weight[begin + j] - max) / sum : A{0};
    if (!used) index[begin + j] = -1;
  }
  const bool any_nan = block_max(A(nan), shared.values) > 0;
  if (threadIdx.x == 0) {
    const A logit = widen(row[target]);
    const bool beside_infinity = max == kInfinity<A> && logit < kInfinity<A> && !any_nan;
    own[blockIdx.x] = beside_infinity ? A{0} : exponential(logit - max) / sum;
  }
}

// logits (B, C), targets (B,), seen (C,) -> index, weight (B, top), own (B,); top < C, or 0.
template <class T, class Launcher, class A>
void top_confusions(Launcher& launch, Matrix<const T> logits, const int64_t* targets,
                    const bool* seen, int64_t top, int64_t* index, A* weight, A* own) {
  const int threads = threads_for(ceil_div<int64_t>(logits.cols, kRowLogits<T>), kRowThreads);
  launch(top_confusions_kernel<T>, logits.rows, threads, sizeof(ConfusionsShared<A>), logits.data,
         logits.cols, targets, seen, top, index, weight, own);
}

}  // namespace cwbr::cuda
