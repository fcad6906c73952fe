#include "all_pair_distance.cuh"
#include "moments.h"

namespace cwbr::cuda {
namespace {

Tensor all_pair_distance_op(const Tensor& mean, const Tensor& var, double eps) {
  Launcher launch(mean);
  return with_accumulated_type(mean, [&](auto type) {
    using A = decltype(type);
    const MomentTensors<A> moments(launch, mean, var);
    const Tensor distance = launch.empty<A>({moments.rows, moments.rows});
    all_pair_distance(launch, moments.mean(), moments.var(), moments.rows, moments.dims, eps,
                      data<A>(distance));
    return distance;
  });
}

std::tuple<Tensor, Tensor> all_pair_distance_backward_op(const Tensor& grad, const Tensor& mean,
                                                         const Tensor& var, double eps) {
  Launcher launch(mean);
  return with_accumulated_type(mean, [&](auto type) {
    using A = decltype(type);
    const MomentTensors<A> moments(launch, mean, var);
    const Tensor g = launch.input<A, 2>(grad, "grad", {moments.rows, moments.rows});
    const auto [grad_mean, grad_var] = moments.new_gradients(launch);
    all_pair_distance_backward(launch, elements<A>(g), moments.mean(), moments.var(), moments.rows,
                               moments.dims, eps, data<A>(grad_mean), data<A>(grad_var));
    return std::make_tuple(grad_mean, grad_var);
  });
}

}  // namespace
}  // namespace cwbr::cuda

STABLE_TORCH_LIBRARY_IMPL(cwbr_fused, CUDA, m) {
  m.impl("all_pair_distance", TORCH_BOX(&cwbr::cuda::all_pair_distance_op));
  m.impl("all_pair_distance_backward", TORCH_BOX(&cwbr::cuda::all_pair_distance_backward_op));
}
