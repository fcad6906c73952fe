// Class groups as the operations receive them.
#pragma once

#include "class_moments.cuh"
#include "launcher.h"

namespace cwbr::cuda {

struct GroupTensors {
  Tensor order, offsets;

  GroupTensors(const Launcher& launch, const Tensor& order_of, const Tensor& offsets_of,
               int64_t batch)
      : order(launch.input<int64_t, 1>(order_of, "order", {batch})),
        offsets(launch.input<int64_t, 1>(offsets_of, "offsets", {-1})) {
    check(count() >= 0, "offsets: expected at least one element");
  }

  int64_t count() const { return offsets.size(0) - 1; }
  Groups pointers() const {
    return {elements<int64_t>(order), elements<int64_t>(offsets), count(), order.size(0)};
  }
};

}  // namespace cwbr::cuda
