#include "follow_classes.cuh"
#include "launcher.h"

namespace cwbr::cuda {
namespace {

void follow_classes_op(const Tensor& mean, const Tensor& count, const Tensor& classes,
                       const Tensor& weight, const Tensor& batch_mean, double momentum) {
  Launcher launch(mean);
  with_accumulated_type(mean, [&](auto accumulated) {
    using A = decltype(accumulated);
    A* const means = launch.written<A, 2>(mean, "mean", {-1, -1});
    const int64_t num_classes = mean.size(0), dims = mean.size(1);
    A* const seen = launch.written<A, 1>(count, "count", {num_classes});
    const Tensor rows = launch.input<int64_t, 1>(classes, "classes", {-1});
    const int64_t groups = rows.size(0);
    const Tensor weights = launch.input<A, 1>(weight, "weight", {groups});
    const Tensor targets = launch.input<A, 2>(batch_mean, "batch_mean", {groups, dims});
    follow_classes(launch, means, seen, num_classes, dims,
                   FollowedClasses<A>{elements<int64_t>(rows), elements<A>(weights),
                                      elements<A>(targets), groups},
                   A(1 - momentum));
  });
}

}  // namespace
}  // namespace cwbr::cuda

STABLE_TORCH_LIBRARY_IMPL(cwbr_fused, CUDA, m) {
  m.impl("follow_classes", TORCH_BOX(&cwbr::cuda::follow_classes_op));
}
