#include <algorithm>
#include <tuple>

#include "launcher.h"
#include "top_pairs.cuh"

namespace cwbr::cuda {
namespace {

std::tuple<Tensor, Tensor> top_pairs_op(const Tensor& alpha, int64_t top_m) {
  check(top_m >= 0, "top_m: expected at least 0, got ", top_m);
  Launcher launch(alpha);
  return with_accumulated_type(alpha, [&](auto type) {
    using A = decltype(type);
    const int64_t groups = alpha.dim() == 2 ? alpha.size(0) : -1;
    const Tensor weights_of = launch.input<A, 2>(alpha, "alpha", {groups, groups});
    const int64_t m = std::min(top_m, groups * (groups - 1) / 2);
    const Tensor pairs = launch.empty<int64_t>({m, 2});
    const Tensor weights = launch.empty<A>({m});
    top_pairs<A>(launch, AlphaWeights<A>{elements<A>(weights_of), groups}, m, data<int64_t>(pairs),
                 data<A>(weights));
    return std::make_tuple(pairs, weights);
  });
}

}  // namespace
}  // namespace cwbr::cuda

STABLE_TORCH_LIBRARY_IMPL(cwbr_fused, CUDA, m) {
  m.impl("top_pairs", TORCH_BOX(&cwbr::cuda::top_pairs_op));
}
