// The CUDA kernels, registered under the schemas that cwbr_fused declares: one translation unit,
// because torch's headers, which nvcc reads once for the host and once per architecture, cost more
// than the kernels.
#include <cuda_runtime.h>
#include <dlfcn.h>
#include <torch/csrc/stable/accelerator.h>

#include <limits>
#include <string>
#include <vector>

#define CWBR_CUDA
#include "operations.h"

namespace cwbr::cuda {

// The current stream of a device, asked of the torch that runs: a library that is linked to the
// function would not load where torch was built without CUDA.
inline cudaStream_t current_stream(int32_t device) {
  using Ask = AOTITorchError (*)(int32_t, void**);
  static const auto ask = [] {
    void* torch = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
    return reinterpret_cast<Ask>(
        dlsym(torch != nullptr ? torch : RTLD_DEFAULT, "aoti_torch_get_current_cuda_stream"));
  }();
  check(ask != nullptr, "this torch knows no CUDA streams");
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(ask(device, &stream));
  return static_cast<cudaStream_t>(stream);
}

// Runs kernels on the current stream of a tensor's device, without waiting for them.
class Launcher {
 public:
  static constexpr bool kOnHost = false;       // the values of index tensors cannot be looked at
  static constexpr bool kKeepsMoments = true;  // the regularizer's, for its backward pass

  explicit Launcher(const Tensor& like)
      : like_(like),
        device_(like.get_device_index()),
        guard_(device_),
        stream_(current_stream(device_)) {}

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
  Tensor empty(ScalarType dtype, Sizes sizes) const {
    return torch::stable::new_empty(like_, sizes, dtype);
  }

  // Memory that the stream may use until this object is gone.
  template <class T>
  T* scratch(int64_t count) {
    scratch_.push_back(empty(ScalarType::Byte, {count * static_cast<int64_t>(sizeof(T))}));
    return data<T>(scratch_.back());
  }

  int processors() const {
    int count = 1;
    check_launch(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device_));
    return count;
  }

  void check_device(const Tensor& t, const char* name) const {
    check(t.is_cuda() && t.get_device_index() == device_, name,
          ": expected a tensor on cuda:", device_);
  }

  static auto with_element_type(ElementType type, const auto& f) {
    return with_any_element_type(type, f);
  }

 private:
  static void check_launch(cudaError_t error) {
    check(error == cudaSuccess, "CUDA error: ", cudaGetErrorString(error));
  }

  Tensor like_;
  torch::stable::accelerator::DeviceIndex device_;
  torch::stable::accelerator::DeviceGuard guard_;
  cudaStream_t stream_;
  std::vector<Tensor> scratch_;
};

namespace {

std::string cuda_architectures() { return CWBR_CUDA_ARCHITECTURES; }

}  // namespace
}  // namespace cwbr::cuda

STABLE_TORCH_LIBRARY_IMPL(cwbr_fused, CUDA, m) {
  using Device = cwbr::cuda::Launcher;
  CWBR_FOR_EACH_OPERATION(CWBR_REGISTER)
}

// As TORCH_CUDA_ARCH_LIST writes them, "8.0;9.0+PTX": a fact of this build.
STABLE_TORCH_LIBRARY_FRAGMENT(cwbr_fused_build, m) { m.def("cuda_architectures() -> str"); }

STABLE_TORCH_LIBRARY_IMPL(cwbr_fused_build, CompositeExplicitAutograd, m) {
  m.impl("cuda_architectures", TORCH_BOX(&cwbr::cuda::cuda_architectures));
}
