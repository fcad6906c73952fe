// Means and variances as the operations on pairs receive them.
#pragma once

#include <tuple>

#include "launcher.h"

namespace cwbr::cuda {

// mean and var (rows, dims) of one shape.
template <class A>
struct MomentTensors {
  Tensor mean_tensor, var_tensor;
  int64_t rows, dims;

  MomentTensors(const Launcher& launch, const Tensor& mean, const Tensor& var)
      : mean_tensor(launch.input<A, 2>(mean, "mean", {-1, -1})),
        var_tensor(launch.input<A, 2>(var, "var", {mean.size(0), mean.size(1)})),
        rows(mean.size(0)),
        dims(mean.size(1)) {}

  const A* mean() const { return elements<A>(mean_tensor); }
  const A* var() const { return elements<A>(var_tensor); }
  std::tuple<Tensor, Tensor> new_gradients(const Launcher& launch) const {
    return {launch.empty<A>({rows, dims}), launch.empty<A>({rows, dims})};
  }
};

}  // namespace cwbr::cuda
