// From torch's tensors to kernels: checked arguments, results, scratch memory, launches.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>

#include <limits>
#include <vector>

#include "tensors.h"

namespace cwbr::cuda {

// Runs kernels on the current stream of a tensor's device, without waiting for them.
class Launcher {
 public:
  explicit Launcher(const Tensor& like)
      : like_(like), device_(like.get_device_index()), guard_(device_) {
    stream_ = static_cast<cudaStream_t>(
        torch::stable::accelerator::getCurrentStream(device_).nativeHandle());
  }

  template <class... Parameters, class... Arguments>
  void operator()(void (*kernel)(Parameters...), int64_t grid, int threads, size_t shared,
                  Arguments... arguments) {
    if (grid == 0) return;
    check(grid <= std::numeric_limits<int>::max(), "the problem needs ", grid, " blocks");
    constexpr size_t kAlwaysAllowed = 48 << 10;
    if (shared > kAlwaysAllowed)
      check_launch(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                        static_cast<int>(shared)));
    kernel<<<static_cast<unsigned>(grid), threads, shared, stream_>>>(arguments...);
    check_launch(cudaGetLastError());
  }

  // A new contiguous tensor on the device.
  Tensor empty(ScalarType dtype, const std::vector<int64_t>& sizes) const {
    return torch::stable::new_empty(like_, sizes, dtype);
  }
  template <class T>
  Tensor empty(const std::vector<int64_t>& sizes) const {
    return empty(scalar_type_of<T>, sizes);
  }

  // Memory that the stream may use until this object is gone.
  template <class T>
  T* scratch(int64_t count) {
    scratch_.push_back(empty(ScalarType::Byte, {count * static_cast<int64_t>(sizeof(T))}));
    return static_cast<T*>(scratch_.back().mutable_data_ptr());
  }

  int processors() const {
    int count = 1;
    check_launch(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device_));
    return count;
  }

  // `t` of this dtype and shape (-1: any size) on the device, made contiguous where it is not.
  template <class T, size_t N>
  Tensor input(const Tensor& t, const char* name, const std::array<int64_t, N>& sizes) const {
    check_device(t, name);
    return checked<T, N>(t, name, sizes);
  }

  // The elements of such a tensor on the device, to be written in place.
  template <class T, size_t N>
  T* written(const Tensor& t, const char* name, const std::array<int64_t, N>& sizes) const {
    check_device(t, name);
    return cwbr::written<T, N>(t, name, sizes);
  }

  // A contiguous matrix of any floating dtype.
  Tensor matrix(const Tensor& t, const char* name) const {
    check_device(t, name);
    check(t.dim() == 2, name, ": expected a matrix, got shape ", shape(t.sizes()));
    return t.is_contiguous() ? t : torch::stable::contiguous(t);
  }

 private:
  void check_device(const Tensor& t, const char* name) const {
    check(t.is_cuda() && t.get_device_index() == device_, name,
          ": expected a tensor on cuda:", device_);
  }
  static void check_launch(cudaError_t error) {
    check(error == cudaSuccess, "CUDA error: ", cudaGetErrorString(error));
  }

  Tensor like_;
  torch::stable::accelerator::DeviceIndex device_;
  torch::stable::accelerator::DeviceGuard guard_;
  cudaStream_t stream_;
  std::vector<Tensor> scratch_;
};

// Calls f(T()) with the element type of `t`.
template <class F>
auto with_element_type(const Tensor& t, const char* name, const F& f) {
  switch (t.scalar_type()) {
    case ScalarType::Double:
      return f(double());
    case ScalarType::Half:
      return f(__half());
    case ScalarType::BFloat16:
      return f(__nv_bfloat16());
    default:
      check(t.scalar_type() == ScalarType::Float, name, ": expected a floating dtype, got ",
            name_of(t.scalar_type()));
      return f(float());
  }
}

// Calls f(A()) with double or float, whichever is the dtype of `t`.
template <class F>
auto with_accumulated_type(const Tensor& t, const F& f) {
  return t.scalar_type() == ScalarType::Double ? f(double()) : f(float());
}

// The address of a tensor's elements as the type that a kernel takes.
template <class T>
const T* elements(const Tensor& t) {
  return static_cast<const T*>(t.const_data_ptr());
}
template <class T>
T* new_elements(const Tensor& t) {
  return static_cast<T*>(t.mutable_data_ptr());
}

}  // namespace cwbr::cuda
