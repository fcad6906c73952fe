#include "moments.h"
#include "pair_distance.cuh"

namespace cwbr::cuda {
namespace {

Tensor pair_distance_op(const Tensor& mean, const Tensor& var, const Tensor& pairs, double eps) {
  Launcher launch(mean);
  return with_accumulated_type(mean, [&](auto type) {
    using A = decltype(type);
    const MomentTensors<A> moments(launch, mean, var);
    const Tensor index = launch.input<int64_t, 2>(pairs, "pairs", {-1, 2});
    const Tensor distance = launch.empty<A>({index.size(0)});
    pair_distance(launch, moments.mean(), moments.var(), moments.rows, moments.dims,
                  elements<int64_t>(index), index.size(0), eps, data<A>(distance));
    return distance;
  });
}

std::tuple<Tensor, Tensor> pair_distance_backward_op(const Tensor& grad, const Tensor& mean,
                                                     const Tensor& var, const Tensor& pairs,
                                                     double eps) {
  Launcher launch(mean);
  return with_accumulated_type(mean, [&](auto type) {
    using A = decltype(type);
    const MomentTensors<A> moments(launch, mean, var);
    const Tensor index = launch.input<int64_t, 2>(pairs, "pairs", {-1, 2});
    const Tensor g = launch.input<A, 1>(grad, "grad", {index.size(0)});
    const auto [grad_mean, grad_var] = moments.new_gradients(launch);
    pair_distance_backward(launch, elements<A>(g), moments.mean(), moments.var(), moments.rows,
                           moments.dims, elements<int64_t>(index), index.size(0), eps,
                           data<A>(grad_mean), data<A>(grad_var));
    return std::make_tuple(grad_mean, grad_var);
  });
}

}  // namespace
}  // namespace cwbr::cuda

STABLE_TORCH_LIBRARY_IMPL(cwbr_fused, CUDA, m) {
  m.impl("pair_distance", TORCH_BOX(&cwbr::cuda::pair_distance_op));
  m.impl("pair_distance_backward", TORCH_BOX(&cwbr::cuda::pair_distance_backward_op));
}
