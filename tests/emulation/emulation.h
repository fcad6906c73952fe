// A GPU small enough to run in a unit test: what the kernels in csrc/cuda need of CUDA, on the CPU.
//
// Every thread of a block is a fiber. A fiber runs until its next barrier or shuffle; which one
// runs next is drawn from a seeded generator, and so is the order of the blocks; a few blocks are
// under way at once. Shared memory starts as NaN and ends at a page that may not be touched. A
// wrong use of a barrier ends the launch with a message in `failure()`.
//
// With -DEMULATE_THREADS every thread of a block is a thread of the operating system instead, so
// that ThreadSanitizer sees each race between the barriers.
#pragma once

#include <cmath>
#include <limits>
#include <type_traits>

#include "launch.h"

#define __global__
#define __device__
#define __host__
#define __launch_bounds__(...)
#define __grid_constant__

namespace emulation {

// A number in [-1, 1] that depends on the bits of x alone.
inline double noise(float x) {
  uint64_t z = to_bits(x) * 0x9e3779b97f4a7c15;
  z = (z ^ (z >> 29)) * 0xbf58476d1ce4e5b9;
  return static_cast<double>(z >> 32) / 2147483648.0 - 1.0;
}

}  // namespace emulation

inline void __syncthreads() { emulation::block_barrier(0); }
inline int __syncthreads_or(int vote) { return emulation::block_barrier(vote) != 0; }

template <class T>
T __shfl_xor_sync(unsigned, T value, int mask) {
  return emulation::from_lane(value, static_cast<int>(threadIdx.x % 32) ^ mask);
}
template <class T>
T __shfl_up_sync(unsigned, T value, int delta) {
  const int lane = threadIdx.x % 32;
  return emulation::from_lane(value, lane < delta ? lane : lane - delta);
}

template <class T>
T atomicAdd(T* address, T value) {
  static_assert(std::is_integral_v<T>, "a sum of floats would depend on the order of the threads");
  return __atomic_fetch_add(address, value, __ATOMIC_RELAXED);
}
inline void __threadfence() {}

inline unsigned __float_as_uint(float x) { return static_cast<unsigned>(emulation::to_bits(x)); }
inline long long __double_as_longlong(double x) { return emulation::to_bits(x); }
inline float __uint_as_float(unsigned bits) {
  float x;
  memcpy(&x, &bits, sizeof(x));
  return x;
}
inline double __longlong_as_double(long long bits) {
  double x;
  memcpy(&x, &bits, sizeof(x));
  return x;
}

struct __half {
  _Float16 value;
};
struct __nv_bfloat16 {
  uint16_t bits;
};
inline float __half2float(__half x) { return static_cast<float>(x.value); }
inline __half __float2half(float x) { return {static_cast<_Float16>(x)}; }
inline float __bfloat162float(__nv_bfloat16 x) { return __uint_as_float(unsigned(x.bits) << 16); }
inline __nv_bfloat16 __float2bfloat16(float x) {
  const unsigned bits = __float_as_uint(x);
  if (x != x) return {0x7fff};
  return {static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16)};
}

namespace cwbr::cuda {

template <class T>
T& shared_memory() {
  if (sizeof(T) > emulation::shared_bytes)
    emulation::fail("the launch asked for too little shared memory");
  return *static_cast<T*>(emulation::self->block->shared->data());
}

// The two fast instructions with the largest errors that NVIDIA's PTX manual allows them.
inline float reciprocal(float x) {
  const float result = 1 / x;
  return std::isfinite(result) ? result * (1 + static_cast<float>(emulation::noise(x)) * 0x1p-23f)
                               : result;
}
inline double reciprocal(double x) { return 1 / x; }
inline float fast_log2(float x) {
  const double result = std::log2(static_cast<double>(x));
  const double size = x >= 0.5f && x <= 2 ? 1 : std::abs(result);
  return static_cast<float>(result +
                            (std::isfinite(result) ? emulation::noise(x) * size * 0x1p-22 : 0));
}
inline double fast_log2(double x) { return std::log2(x); }

inline void check_aligned(const void* address) {
  if (reinterpret_cast<uintptr_t>(address) % 16 != 0)
    emulation::fail("a 128-bit access is misaligned");
}
inline uint4 load_128(const void* global) {
  check_aligned(global);
  uint4 value;
  memcpy(&value, global, sizeof(value));
  return value;
}
inline uint4 load_own_128(const void* global) { return load_128(global); }
inline void store_128(void* global, uint4 value) {
  check_aligned(global);
  memcpy(global, &value, sizeof(value));
}

// An asynchronous copy arrives as late as it may: until it is waited for its target holds NaN.
inline void copy_async(void* shared, const void* global) {
  check_aligned(shared);
  check_aligned(global);
  memset(shared, 0xff, 16);
  emulation::self->copies.push_back({shared, global});
}
inline void copy_async_wait() {
  for (const emulation::Copy& copy : emulation::self->copies) memcpy(copy.to, copy.from, 16);
  emulation::self->copies.clear();
}

inline void device_check(bool holds) {
  if (!holds) emulation::fail("an index leaves its tensor");
}

}  // namespace cwbr::cuda
