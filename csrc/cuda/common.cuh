// What the kernels share: number formats, 128-bit vectors, sums and scans over a block, a sort.
#pragma once

#include <cstdint>
#include <limits>
#include <type_traits>
#include <vector>

#include "arguments.h"
#include "check.h"
#include "intrinsics.cuh"

namespace cwbr::cuda {

constexpr unsigned kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffff;
constexpr int kMaxWarps = 32;

template <class A>
constexpr A kInfinity = std::numeric_limits<A>::infinity();
template <class A>
constexpr A kSmallestNormal = std::numeric_limits<A>::min();

template <class T>
constexpr __host__ __device__ T ceil_div(T a, T b) {
  return (a + b - 1) / b;
}

// Calls f(T()) with the element type that `type` names, of those that accumulate in A.
template <class A>
auto with_element_type_of(ElementType type, const auto& f) {
  if constexpr (std::is_same_v<A, double>) {
    return f(double());
  } else if (type == ElementType::kHalf) {
    return f(__half());
  } else if (type == ElementType::kBFloat16) {
    return f(__nv_bfloat16());
  } else {
    return f(float());
  }
}

// The same for all element types.
auto with_any_element_type(ElementType type, const auto& f) {
  return type == ElementType::kDouble ? f(double()) : with_element_type_of<float>(type, f);
}

__device__ inline float widen(float x) { return x; }
__device__ inline double widen(double x) { return x; }
__device__ inline float widen(__half x) { return __half2float(x); }
__device__ inline float widen(__nv_bfloat16 x) { return __bfloat162float(x); }

template <class T>
__device__ T narrow(accumulate_t<T> x) {
  if constexpr (std::is_same_v<T, __half>)
    return __float2half(x);
  else if constexpr (std::is_same_v<T, __nv_bfloat16>)
    return __float2bfloat16(x);
  else
    return x;
}

__device__ inline float exponential(float x) { return expf(x); }
__device__ inline double exponential(double x) { return exp(x); }
__device__ inline float logarithm(float x) { return logf(x); }
__device__ inline double logarithm(double x) { return log(x); }
__device__ inline float log_of_1_plus(float x) { return log1pf(x); }
__device__ inline double log_of_1_plus(double x) { return log1p(x); }
__device__ inline float square_root(float x) { return sqrtf(x); }
__device__ inline double square_root(double x) { return sqrt(x); }
__device__ inline float fused_multiply_add(float a, float b, float c) { return fmaf(a, b, c); }
__device__ inline double fused_multiply_add(double a, double b, double c) { return fma(a, b, c); }

// The larger one; NaN only where both are NaN.
__device__ inline float larger(float a, float b) { return fmaxf(a, b); }
__device__ inline double larger(double a, double b) { return fmax(a, b); }

// WIDTH adjacent elements, moved by one instruction.
template <class T, int WIDTH>
struct Vector {
  T item[WIDTH];
};

template <class T>
constexpr int kVectorWidth = 16 / sizeof(T);

template <int WIDTH, class T>
__device__ Vector<T, WIDTH> load(const T* from) {
  Vector<T, WIDTH> result;
  if constexpr (WIDTH == 1) {
    result.item[0] = *from;
  } else {
    static_assert(sizeof(result) == 16);
    const uint4 bits = load_128(from);
    __builtin_memcpy(&result, &bits, sizeof(bits));
  }
  return result;
}

template <class T, int WIDTH>
__device__ void store(T* to, const Vector<T, WIDTH>& value) {
  if constexpr (WIDTH == 1) {
    *to = value.item[0];
  } else {
    static_assert(sizeof(value) == 16);
    uint4 bits;
    __builtin_memcpy(&bits, &value, sizeof(bits));
    store_128(to, bits);
  }
}

// COUNT adjacent numbers at an address that vectors fit, or a single one anywhere.
template <int COUNT, class T>
__device__ void load_many(const T* from, T (&values)[COUNT]) {
  constexpr int WIDTH = COUNT == 1 ? 1 : kVectorWidth<T>;
#pragma unroll
  for (int first = 0; first < COUNT; first += WIDTH) {
    const Vector<T, WIDTH> part = load<WIDTH>(from + first);
#pragma unroll
    for (int w = 0; w < WIDTH; ++w) values[first + w] = part.item[w];
  }
}

template <int COUNT, class T>
__device__ void store_many(T* to, const T (&values)[COUNT]) {
  constexpr int WIDTH = COUNT == 1 ? 1 : kVectorWidth<T>;
#pragma unroll
  for (int first = 0; first < COUNT; first += WIDTH) {
    Vector<T, WIDTH> part;
#pragma unroll
    for (int w = 0; w < WIDTH; ++w) part.item[w] = values[first + w];
    store(to + first, part);
  }
}

// As load_many, of memory that this thread has written.
template <int COUNT, class T>
__device__ void load_own(const T* from, T (&values)[COUNT]) {
  if constexpr (COUNT == 1) {
    values[0] = *from;
  } else {
    static_assert(sizeof(values) % 16 == 0);
#pragma unroll
    for (int first = 0; first < COUNT; first += kVectorWidth<T>) {
      const uint4 bits = load_own_128(from + first);
      __builtin_memcpy(values + first, &bits, sizeof(bits));
    }
  }
}

// Whether all rows of a contiguous matrix with `dims` columns can be read 128 bits at a time.
template <class T>
__device__ bool vectors_fit(const T* data, int64_t dims) {
  return dims % kVectorWidth<T> == 0 && reinterpret_cast<uintptr_t>(data) % 16 == 0;
}

// A slice of columns is what one block covers: a vector for each of its threads.
constexpr int kColumnThreads = 128;

template <class T>
constexpr int kSliceColumns = kColumnThreads * kVectorWidth<T>;

// Calls run(width, column) for the columns of a slice that this thread owns: one vector, or as many
// single columns where vectors do not fit.
template <int WIDTH>
struct Width {
  static constexpr int value = WIDTH;
};

template <class T, class Run>
__device__ void for_columns(int64_t slice, int64_t dims, bool vectors, Run run) {
  if (vectors) {
    const int64_t column = slice * kSliceColumns<T> + threadIdx.x * kVectorWidth<T>;
    if (column < dims)  // mask: the last slice is ragged
      run(Width<kVectorWidth<T>>{}, column);
  } else {
    for (int part = 0; part < kVectorWidth<T>; ++part) {
      const int64_t column = slice * kSliceColumns<T> + part * kColumnThreads + threadIdx.x;
      if (column < dims)  // mask: the last slice is ragged
        run(Width<1>{}, column);
    }
  }
}

// What one launch knows of each layer, and of how many.
constexpr int kMaxLayers = 32;

template <class Layer>
struct Layers {
  Layer layer[kMaxLayers];
  int count;
};

// The layer whose blocks `slice` is among: each begins at its first_slice.
template <class Layer>
__device__ const Layer& layer_of(const Layers<Layer>& layers, int64_t slice) {
  int found = 0;
  while (found + 1 < layers.count && slice >= layers.layer[found + 1].first_slice) ++found;
  return layers.layer[found];
}

// Calls run(some, first) for the layers that one launch takes, from number `first` on.
template <class Layer>
void for_layers_of_launches(const std::vector<Layer>& layers, const auto& run) {
  const int total = static_cast<int>(layers.size());
  for (int first = 0; first < total; first += kMaxLayers) {
    Layers<Layer> some{};
    for (int l = first; l < total && some.count < kMaxLayers; ++l)
      some.layer[some.count++] = layers[l];
    run(some, first);
  }
}

// Combines the values of all threads of the block in one fixed order; every thread gets the result.
template <class T, class Combine>
__device__ T block_reduce(T value, T (&scratch)[kMaxWarps], Combine combine) {
  for (unsigned lane = kWarp / 2; lane > 0; lane /= 2)
    value = combine(value, __shfl_xor_sync(kAllLanes, value, lane));
  __syncthreads();  // the scratch may still be read by an earlier reduction
  if (threadIdx.x % kWarp == 0) scratch[threadIdx.x / kWarp] = value;
  __syncthreads();
  T result = scratch[0];
  for (unsigned warp = 1; warp < blockDim.x / kWarp; ++warp)
    result = combine(result, scratch[warp]);
  return result;
}

template <class T>
__device__ T block_sum(T value, T (&scratch)[kMaxWarps]) {
  return block_reduce(value, scratch, [](T a, T b) { return a + b; });
}

template <class T>
__device__ T block_max(T value, T (&scratch)[kMaxWarps]) {
  return block_reduce(value, scratch, [](T a, T b) { return larger(a, b); });
}

// The sum of `count` numbers of global memory, in one fixed order; every thread gets it.
template <class T>
__device__ T sum_of(const T* values, int64_t count, T (&scratch)[kMaxWarps]) {
  T sum = 0;
  for (int64_t i = threadIdx.x; i < count; i += blockDim.x) sum += values[i];
  return block_sum(sum, scratch);
}

// What a kernel needs that only sums over the block.
template <class T>
struct SumShared {
  T scratch[kMaxWarps];
};

struct Scan {
  int before;  // the sum over the threads before this one
  int total;   // the sum over all threads
};

__device__ inline Scan block_scan(int value, int (&scratch)[kMaxWarps]) {
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  int inclusive = value;
  for (unsigned step = 1; step < kWarp; step *= 2) {
    const int left = __shfl_up_sync(kAllLanes, inclusive, step);
    if (lane >= static_cast<int>(step)) inclusive += left;
  }
  __syncthreads();  // the scratch may still be read by an earlier scan
  if (lane == kWarp - 1) scratch[warp] = inclusive;
  __syncthreads();
  Scan result{inclusive - value, 0};
  for (unsigned other = 0; other < blockDim.x / kWarp; ++other) {
    if (static_cast<int>(other) < warp) result.before += scratch[other];
    result.total += scratch[other];
  }
  return result;
}

// What a kernel needs that only scans over the block.
struct ScanShared {
  int scratch[kMaxWarps];
};

// Whether this block is the last of `expected` to get here; what the others wrote is then visible.
__device__ inline bool arrives_last(int* ticket, int64_t expected, int& shared_last) {
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) shared_last = atomicAdd(ticket, 1) == expected - 1;
  __syncthreads();
  __threadfence();
  return shared_last != 0;
}

// Sorts `size` keys, a power of two, by one block; largest last. Works in shared or global memory.
template <class Key>
__device__ void bitonic_sort(Key* keys, int size) {
  for (int width = 2; width <= size; width *= 2) {
    for (int stride = width / 2; stride > 0; stride /= 2) {
      __syncthreads();
      for (int t = threadIdx.x; t < size / 2; t += blockDim.x) {
        const int low = 2 * t - (t & (stride - 1)), high = low + stride;
        const bool ascending = (low & width) == 0;
        const Key a = keys[low], b = keys[high];
        if ((b < a) == ascending) {
          keys[low] = b;
          keys[high] = a;
        }
      }
    }
  }
  __syncthreads();
}

// Pairs i < j of `count` things are numbered row by row: row i starts at i (2 count - i - 1) / 2.
__device__ inline int64_t first_pair_of_row(int64_t i, int64_t count) {
  return i * (2 * count - i - 1) / 2;
}

struct Pair {
  int64_t i, j;
};

__device__ inline Pair pair_of_number(int64_t number, int64_t count) {
  const double edge = 2.0 * count - 1;
  int64_t i = static_cast<int64_t>((edge - sqrt(edge * edge - 8.0 * number)) / 2);
  while (first_pair_of_row(i, count) > number) --i;  // the square root is rounded
  while (first_pair_of_row(i + 1, count) <= number) ++i;
  return {i, number - first_pair_of_row(i, count) + i + 1};
}

inline int power_of_two_from(int64_t count) {
  int size = 1;
  while (size < count) size *= 2;
  return size;
}

// Threads of a block that works on `count` items: whole warps, at most `most`.
inline int threads_for(int64_t count, int most) {
  const int64_t whole_warps = ceil_div<int64_t>(count, kWarp) * kWarp;
  return static_cast<int>(whole_warps < kWarp ? kWarp : whole_warps > most ? most : whole_warps);
}

}  // namespace cwbr::cuda
