// operations.cpp on a real GPU: the kernels as nvcc compiles them, in memory with guards on both
// sides, without torch. harness.py builds it where CWBR_HARDWARE=1 asks for it:
//   nvcc -std=c++20 -O3 -arch=native -shared -Xcompiler -fPIC
//        -I tests/emulation -I csrc/cuda -I csrc
#include <cuda_runtime.h>

#include <cstdint>
#include <deque>
#include <string>
#include <vector>

namespace emulation {

// What only the emulation heeds: a real GPU has an order and defects of its own.
inline uint64_t seed = 0;
inline bool uneven = false;
inline int mutant = -1;

inline const char* failed = nullptr;

inline void check(cudaError_t error, const char* where) {
  if (error == cudaSuccess || failed) return;
  static std::string message;
  message = std::string(where) + ": " + cudaGetErrorString(error);
  failed = message.c_str();
}

inline void copy_in(void* device, const void* host, size_t bytes) {
  check(cudaMemcpy(device, host, bytes, cudaMemcpyHostToDevice), "to the device");
}
inline void copy_out(void* host, const void* device, size_t bytes) {
  check(cudaMemcpy(host, device, bytes, cudaMemcpyDeviceToHost), "from the device");
}

// Device memory full of NaN, between guards that are looked at when it is released.
class Guarded {
 public:
  explicit Guarded(size_t bytes, unsigned remainder = 0)
      : front_(kGuard + remainder), bytes_(bytes) {
    check(cudaMalloc(&base_, front_ + bytes_ + kGuard), "cudaMalloc");
    check(cudaMemset(base_, 0xff, front_ + bytes_ + kGuard), "cudaMemset");
  }
  ~Guarded() {
    std::vector<unsigned char> edges(front_ + kGuard);
    copy_out(edges.data(), base_, front_);
    copy_out(edges.data() + front_, base_ + front_ + bytes_, kGuard);
    for (const unsigned char byte : edges)
      if (byte != 0xff && !failed) failed = "a kernel wrote outside of its tensor";
    cudaFree(base_);
  }
  Guarded(const Guarded&) = delete;
  Guarded& operator=(const Guarded&) = delete;
  void* data() const { return base_ + front_; }

 private:
  static constexpr size_t kGuard = 256;
  unsigned char* base_ = nullptr;
  size_t front_, bytes_;
};

class Launcher {
 public:
  explicit Launcher(int) {}
  ~Launcher() { check(cudaDeviceSynchronize(), "a kernel"); }

  template <class... Parameters, class... Arguments>
  void operator()(void (*kernel)(Parameters...), int64_t grid, int threads, size_t shared,
                  Arguments... arguments) {
    ++launches;
    if (grid == 0 || failed) return;
    if (shared > (48 << 10))
      check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                 static_cast<int>(shared)),
            "shared memory");
    kernel<<<static_cast<unsigned>(grid), threads, shared>>>(arguments...);
    check(cudaGetLastError(), "a launch");
  }

  template <class T>
  T* scratch(int64_t count) {
    scratch_.emplace_back(count * sizeof(T));
    return static_cast<T*>(scratch_.back().data());
  }

  int processors() const {
    int count = 1;
    check(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, 0), "processors");
    return count;
  }

  int launches = 0;

 private:
  std::deque<Guarded> scratch_;
};

}  // namespace emulation

#include "operations.cpp"
