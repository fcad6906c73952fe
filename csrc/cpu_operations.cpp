// The CPU's kernels, registered under the schemas that cwbr_fused declares.
#include <array>
#include <functional>
#include <string>

#include "cpu/kernels.h"
#include "cpu/parallel.h"
#include "operations.h"

namespace cwbr {

void parallel_for(int64_t begin, int64_t end, int64_t grain,
                  const std::function<void(int64_t, int64_t)>& body) {
  torch::stable::parallel_for(begin, end, grain, body);
}

int num_threads() { return static_cast<int>(torch::stable::get_num_threads()); }

struct CpuDevice : Cpu {
  static constexpr bool kOnHost = true;         // the values of index tensors can be checked
  static constexpr bool kKeepsMoments = false;  // the regularizer's, for its backward pass

  explicit CpuDevice(const Tensor&) {}

  static void check_device(const Tensor&, const char*) {}  // the dispatcher has

  // The C shim's own function, because torch::stable::empty looks the operator up by name each
  // time.
  static Tensor empty(ScalarType dtype, Sizes sizes) {
    std::array<int64_t, 3> strides{};  // no result has more dimensions
    int64_t stride = 1;
    for (size_t i = sizes.size(); i-- > 0; stride *= std::max<int64_t>(1, sizes.begin()[i]))
      strides[i] = stride;
    AtenTensorHandle handle = nullptr;
    const auto code = torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype));
    TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(sizes.size(), sizes.begin(), strides.data(),
                                                    code, aoti_torch_device_type_cpu(), 0,
                                                    &handle));
    return Tensor(handle);
  }

  static auto with_element_type(ElementType type, const auto& f) {
    return type == ElementType::kDouble ? f(double()) : with_element_type_of<float>(type, f);
  }
};

namespace {

std::string cpu_isa() { return isa_name(); }

}  // namespace
}  // namespace cwbr

STABLE_TORCH_LIBRARY_IMPL(cwbr_fused, CPU, m) {
  using Device = cwbr::CpuDevice;
  CWBR_FOR_EACH_OPERATION(CWBR_REGISTER)
}

// For `python -m cwbr_fused.info`: a fact of this build, not an operation of the schema.
STABLE_TORCH_LIBRARY_FRAGMENT(cwbr_fused_build, m) { m.def("cpu_isa() -> str"); }

STABLE_TORCH_LIBRARY_IMPL(cwbr_fused_build, CompositeExplicitAutograd, m) {
  m.impl("cpu_isa", TORCH_BOX(&cwbr::cpu_isa));
}
