// The operations that cwbr_fused declares, on any Device: each checks its arguments, makes its
// results and calls the kernel of its name, that of csrc/cpu or of csrc/cuda.
// CWBR_CUDA says that the file that includes this is for a GPU.
#pragma once

#include "batch_operations.h"
#include "pair_operations.h"

#define CWBR_FOR_EACH_OPERATION(use) \
  CWBR_FOR_EACH_BATCH_OPERATION(use) CWBR_FOR_EACH_PAIR_OPERATION(use)

// Registers all of them with a torch library `m` as kernels of `Device`.
#define CWBR_REGISTER(name) m.impl(#name, TORCH_BOX(&cwbr::name##_op<Device>));
