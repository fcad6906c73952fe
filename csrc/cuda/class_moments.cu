#include <tuple>

#include "class_moments.cuh"
#include "groups.h"

namespace cwbr::cuda {
namespace {

std::tuple<Tensor, Tensor> class_moments_op(const Tensor& z, const Tensor& order,
                                            const Tensor& offsets, double eps) {
  Launcher launch(z);
  const Tensor features = launch.matrix(z, "z");
  const GroupTensors groups(launch, order, offsets, features.size(0));
  return with_element_type(z, "z", [&](auto type) {
    using T = decltype(type);
    using A = accumulate_t<T>;
    const int64_t dims = features.size(1);
    const Tensor mean = launch.empty<A>({groups.count(), dims});
    const Tensor var = launch.empty<A>({groups.count(), dims});
    class_moments(launch, elements<T>(features), dims, groups.pointers(), eps, data<A>(mean),
                  data<A>(var));
    return std::make_tuple(mean, var);
  });
}

Tensor class_moments_backward_op(const Tensor& grad_mean, const Tensor& grad_var, const Tensor& z,
                                 const Tensor& mean, const Tensor& var, const Tensor& order,
                                 const Tensor& offsets, double eps) {
  Launcher launch(z);
  const Tensor features = launch.matrix(z, "z");
  const GroupTensors groups(launch, order, offsets, features.size(0));
  return with_element_type(z, "z", [&](auto type) {
    using T = decltype(type);
    using A = accumulate_t<T>;
    const int64_t dims = features.size(1);
    const std::array<int64_t, 2> sizes{groups.count(), dims};
    const Tensor grad_m = launch.input<A>(grad_mean, "grad_mean", sizes);
    const Tensor grad_v = launch.input<A>(grad_var, "grad_var", sizes);
    const Tensor m = launch.input<A>(mean, "mean", sizes), v = launch.input<A>(var, "var", sizes);
    const Tensor grad_z = launch.empty(z.scalar_type(), {features.size(0), dims});
    class_moments_backward(launch, elements<A>(grad_m), elements<A>(grad_v), elements<T>(features),
                           dims, elements<A>(m), elements<A>(v), groups.pointers(), eps,
                           new_elements<T>(grad_z));
    return grad_z;
  });
}

}  // namespace
}  // namespace cwbr::cuda

STABLE_TORCH_LIBRARY_IMPL(cwbr_fused, CUDA, m) {
  m.impl("class_moments", TORCH_BOX(&cwbr::cuda::class_moments_op));
  m.impl("class_moments_backward", TORCH_BOX(&cwbr::cuda::class_moments_backward_op));
}
