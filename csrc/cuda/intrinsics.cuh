// The machine instructions that C++ has no name for. Compiled without nvcc, the same functions come
// from the test suite's emulation of a GPU, so every kernel body also runs on a CPU.
#pragma once

#ifdef __CUDACC__

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
#error "cwbr_fused: the CUDA kernels need compute capability 8.0, for asynchronous copies"
#endif

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

namespace cwbr::cuda {

// The block's dynamic shared memory, which holds one object of type T.
template <class T>
__device__ T& shared_memory() {
  extern __shared__ __align__(16) unsigned char bytes[];
  return *reinterpret_cast<T*>(bytes);
}

// 1/x to 1 ulp; x and the result must be normal numbers.
__device__ inline float reciprocal(float x) {
  float result;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
}
__device__ inline double reciprocal(double x) { return 1 / x; }

// log2(x) to 2^-22, absolutely for x in [0.5, 2] and relatively elsewhere; x must be normal.
__device__ inline float fast_log2(float x) {
  float result;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
}
__device__ inline double fast_log2(double x) { return log2(x); }

__device__ inline uint4 load_128(const void* global) {
  return __ldg(reinterpret_cast<const uint4*>(global));
}
// As load_128, of memory that the same kernel writes.
__device__ inline uint4 load_own_128(const void* global) {
  return *reinterpret_cast<const uint4*>(global);
}
__device__ inline void store_128(void* global, uint4 value) {
  *reinterpret_cast<uint4*>(global) = value;
}

// Copies 16 bytes from global to shared memory while the thread goes on.
__device__ inline void copy_async(void* shared, const void* global) {
  const unsigned address = static_cast<unsigned>(__cvta_generic_to_shared(shared));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(address), "l"(global) : "memory");
}
// Waits for all copies that this thread has started; other threads see them after a barrier.
__device__ inline void copy_async_wait() { asm volatile("cp.async.wait_all;" ::: "memory"); }

// Fails the kernel, and with it every later CUDA call, when an index would leave its tensor.
__device__ inline void device_check(bool holds) {
  if (!holds) __trap();
}

}  // namespace cwbr::cuda

#else
#include <emulation.h>
#endif
