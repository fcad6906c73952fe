#include <tuple>

#include "launcher.h"
#include "observe_classes.cuh"

namespace cwbr::cuda {
namespace {

std::tuple<Tensor, Tensor> observe_classes_op(const Tensor& mean, const Tensor& count,
                                              const Tensor& var, const Tensor& updates,
                                              const Tensor& classes, const Tensor& size,
                                              const Tensor& batch_mean, const Tensor& batch_var,
                                              double momentum, double floor) {
  Launcher launch(mean);
  return with_accumulated_type(mean, [&](auto accumulated) {
    using A = decltype(accumulated);
    const Tensor means = launch.input<A, 2>(mean, "mean", {-1, -1});
    const int64_t num_classes = means.size(0), dims = means.size(1);
    const Tensor seen = launch.input<A, 1>(count, "count", {num_classes});
    A* const variances = launch.written<A, 1>(var, "var", {dims});
    A* const number = launch.written<A, 0>(updates, "updates", {});
    const Tensor rows = launch.input<int64_t, 1>(classes, "classes", {-1});
    const int64_t groups = rows.size(0);
    const Tensor sizes = launch.input<A, 1>(size, "size", {groups});
    const Tensor batch_means = launch.input<A, 2>(batch_mean, "batch_mean", {groups, dims});
    const Tensor batch_vars = launch.input<A, 2>(batch_var, "batch_var", {groups, dims});
    const Tensor weight = launch.empty<A>({groups}), metric = launch.empty<A>({dims});
    observe_classes(launch, Bank<A>{elements<A>(means), elements<A>(seen), num_classes, dims},
                    BatchMoments<A>{elements<int64_t>(rows), elements<A>(sizes),
                                    elements<A>(batch_means), elements<A>(batch_vars), groups},
                    Variances<A>{variances, number, data<A>(metric), A(1 - momentum), A(floor)},
                    data<A>(weight));
    return std::make_tuple(weight, metric);
  });
}

}  // namespace
}  // namespace cwbr::cuda

STABLE_TORCH_LIBRARY_IMPL(cwbr_fused, CUDA, m) {
  m.impl("observe_classes", TORCH_BOX(&cwbr::cuda::observe_classes_op));
}
