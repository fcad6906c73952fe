#include <tuple>

#include "class_attraction.cuh"
#include "launcher.h"

namespace cwbr::cuda {
namespace {

std::tuple<Tensor, Tensor> class_attraction_op(const Tensor& z, const Tensor& mean,
                                               const Tensor& var, const Tensor& index,
                                               const Tensor& coefficient) {
  Launcher launch(z);
  const Tensor samples = launch.matrix(z, "z");
  const int64_t batch = samples.size(0), dims = samples.size(1);
  const Tensor chosen = launch.input<int64_t, 2>(index, "index", {batch, -1});
  const int64_t count = chosen.size(1);
  return with_element_type(z, "z", [&](auto type) {
    using T = decltype(type);
    using A = accumulate_t<T>;
    const Tensor means = launch.input<A, 2>(mean, "mean", {-1, dims});
    const Tensor variances = launch.input<A, 1>(var, "var", {dims});
    const Tensor factor = launch.input<A, 2>(coefficient, "coefficient", {batch, count});
    const Tensor energy = launch.empty<A>({batch});
    const Tensor gradient = launch.empty<A>({batch, dims});
    const Attraction<A> bank{elements<A>(means),        elements<A>(variances), means.size(0), dims,
                             elements<int64_t>(chosen), elements<A>(factor),    count};
    class_attraction(launch, elements<T>(samples), batch, bank, data<A>(energy), data<A>(gradient));
    return std::make_tuple(energy, gradient);
  });
}

}  // namespace
}  // namespace cwbr::cuda

STABLE_TORCH_LIBRARY_IMPL(cwbr_fused, CUDA, m) {
  m.impl("class_attraction", TORCH_BOX(&cwbr::cuda::class_attraction_op));
}
