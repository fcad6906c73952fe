// Tensors of torch's stable ABI, by the names that tensors.h knows.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>

namespace cwbr {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline const char* name_of(ScalarType dtype) { return torch::headeronly::toString(dtype); }

inline Tensor made_contiguous(const Tensor& t) {
  return t.is_contiguous() ? t : torch::stable::contiguous(t);
}

inline Tensor to_int64(const Tensor& t) { return torch::stable::to(t, ScalarType::Long); }

}  // namespace cwbr
