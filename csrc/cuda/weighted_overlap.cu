#include "moments.h"
#include "weighted_overlap.cuh"

namespace cwbr::cuda {
namespace {

Tensor weighted_overlap_op(const Tensor& mean, const Tensor& var, const Tensor& alpha, double eps,
                           bool log) {
  Launcher launch(mean);
  return with_accumulated_type(mean, [&](auto type) {
    using A = decltype(type);
    const MomentTensors<A> moments(launch, mean, var);
    const Tensor weights = launch.input<A, 2>(alpha, "alpha", {moments.rows, moments.rows});
    const Tensor value = launch.empty<A>({});
    weighted_overlap(launch, moments.mean(), moments.var(), elements<A>(weights), moments.rows,
                     moments.dims, eps, log, data<A>(value));
    return value;
  });
}

std::tuple<Tensor, Tensor> weighted_overlap_backward_op(const Tensor& grad, const Tensor& value,
                                                        const Tensor& mean, const Tensor& var,
                                                        const Tensor& alpha, double eps, bool log) {
  Launcher launch(mean);
  return with_accumulated_type(mean, [&](auto type) {
    using A = decltype(type);
    const MomentTensors<A> moments(launch, mean, var);
    const Tensor weights = launch.input<A, 2>(alpha, "alpha", {moments.rows, moments.rows});
    const Tensor g = launch.input<A, 0>(grad, "grad", {});
    const Tensor v = launch.input<A, 0>(value, "value", {});
    const auto [grad_mean, grad_var] = moments.new_gradients(launch);
    weighted_overlap_backward(launch, elements<A>(g), elements<A>(v), moments.mean(), moments.var(),
                              elements<A>(weights), moments.rows, moments.dims, eps, log,
                              data<A>(grad_mean), data<A>(grad_var));
    return std::make_tuple(grad_mean, grad_var);
  });
}

std::tuple<Tensor, Tensor, Tensor> weighted_overlap_with_gradient_op(const Tensor& grad,
                                                                     const Tensor& mean,
                                                                     const Tensor& var,
                                                                     const Tensor& alpha,
                                                                     double eps, bool log) {
  Launcher launch(mean);
  return with_accumulated_type(mean, [&](auto type) {
    using A = decltype(type);
    const MomentTensors<A> moments(launch, mean, var);
    const Tensor weights = launch.input<A, 2>(alpha, "alpha", {moments.rows, moments.rows});
    const Tensor g = launch.input<A, 0>(grad, "grad", {});
    const Tensor value = launch.empty<A>({});
    const auto [grad_mean, grad_var] = moments.new_gradients(launch);
    weighted_overlap_with_gradient(launch, elements<A>(g), moments.mean(), moments.var(),
                                   elements<A>(weights), moments.rows, moments.dims, eps, log,
                                   data<A>(value), data<A>(grad_mean), data<A>(grad_var));
    return std::make_tuple(value, grad_mean, grad_var);
  });
}

}  // namespace
}  // namespace cwbr::cuda

STABLE_TORCH_LIBRARY_IMPL(cwbr_fused, CUDA, m) {
  m.impl("weighted_overlap", TORCH_BOX(&cwbr::cuda::weighted_overlap_op));
  m.impl("weighted_overlap_backward", TORCH_BOX(&cwbr::cuda::weighted_overlap_backward_op));
  m.impl("weighted_overlap_with_gradient",
         TORCH_BOX(&cwbr::cuda::weighted_overlap_with_gradient_op));
}
