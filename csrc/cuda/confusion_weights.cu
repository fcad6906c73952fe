#include "confusion_weights.cuh"
#include "groups.h"

namespace cwbr::cuda {
namespace {

Tensor confusion_weights_op(const Tensor& logits, const Tensor& order, const Tensor& offsets,
                            const Tensor& classes) {
  Launcher launch(logits);
  const Tensor rows = launch.matrix(logits, "logits");
  const GroupTensors groups(launch, order, offsets, rows.size(0));
  const Tensor columns = launch.input<int64_t, 1>(classes, "classes", {groups.count()});
  return with_element_type(logits, "logits", [&](auto type) {
    using T = decltype(type);
    using A = accumulate_t<T>;
    const Tensor alpha = launch.empty<A>({groups.count(), groups.count()});
    confusion_weights(launch, elements<T>(rows), rows.size(1), groups.pointers().order,
                      groups.pointers().offsets, elements<int64_t>(columns), groups.count(),
                      data<A>(alpha));
    return alpha;
  });
}

}  // namespace
}  // namespace cwbr::cuda

STABLE_TORCH_LIBRARY_IMPL(cwbr_fused, CUDA, m) {
  m.impl("confusion_weights", TORCH_BOX(&cwbr::cuda::confusion_weights_op));
}
