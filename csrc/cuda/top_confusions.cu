#include <algorithm>
#include <tuple>

#include "launcher.h"
#include "top_confusions.cuh"

namespace cwbr::cuda {
namespace {

std::tuple<Tensor, Tensor, Tensor> top_confusions_op(const Tensor& logits, const Tensor& targets,
                                                     const Tensor& seen, int64_t top) {
  check(top >= 0, "top: expected at least 0, got ", top);
  Launcher launch(logits);
  const Tensor rows = launch.matrix(logits, "logits");
  const int64_t batch = rows.size(0), num_classes = rows.size(1);
  const Tensor target = launch.input<int64_t, 1>(int64_targets(targets), "targets", {batch});
  const Tensor candidates = launch.input<bool, 1>(seen, "seen", {num_classes});
  const int64_t width = std::clamp<int64_t>(num_classes - 1, 0, top);
  return with_element_type(logits, "logits", [&](auto type) {
    using T = decltype(type);
    using A = accumulate_t<T>;
    const Tensor index = launch.empty<int64_t>({batch, width});
    const Tensor weight = launch.empty<A>({batch, width});
    const Tensor own = launch.empty<A>({batch});
    top_confusions(launch, elements<T>(rows), batch, num_classes, elements<int64_t>(target),
                   elements<bool>(candidates), width, data<int64_t>(index), data<A>(weight),
                   data<A>(own));
    return std::make_tuple(index, weight, own);
  });
}

}  // namespace
}  // namespace cwbr::cuda

STABLE_TORCH_LIBRARY_IMPL(cwbr_fused, CUDA, m) {
  m.impl("top_confusions", TORCH_BOX(&cwbr::cuda::top_confusions_op));
}
