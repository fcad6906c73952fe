// Arguments and results of the operations as tensors of torch's stable ABI.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <array>
#include <cstdint>
#include <string>
#include <utility>

#include "check.h"

namespace cwbr {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

template <class T>
inline constexpr ScalarType scalar_type_of = ScalarType::Undefined;
template <>
inline constexpr ScalarType scalar_type_of<float> = ScalarType::Float;
template <>
inline constexpr ScalarType scalar_type_of<double> = ScalarType::Double;
template <>
inline constexpr ScalarType scalar_type_of<int64_t> = ScalarType::Long;

// "(3, 4)"; a negative size is written *.
template <class Sizes>
std::string shape(const Sizes& sizes) {
  std::string text;
  for (const int64_t size : sizes) {
    text += (text.empty() ? "" : ", ") + (size < 0 ? "*" : std::to_string(size));
  }
  return "(" + text + ")";
}

// A new contiguous CPU tensor. The C shim's own function, because torch::stable::empty looks the
// operator up by name each time.
template <class T, size_t N>
Tensor empty(const std::array<int64_t, N>& sizes) {
  std::array<int64_t, N> strides{};
  int64_t stride = 1;
  for (size_t i = N; i-- > 0; stride *= sizes[i] > 1 ? sizes[i] : 1) strides[i] = stride;
  AtenTensorHandle handle = nullptr;
  static const int32_t dtype =
      torch::stable::detail::to<int32_t>(torch::stable::detail::from(scalar_type_of<T>));
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(N, sizes.data(), strides.data(), dtype,
                                                  aoti_torch_device_type_cpu(), 0, &handle));
  return Tensor(handle);
}

template <class T>
T* data(const Tensor& t) {
  return static_cast<T*>(t.mutable_data_ptr());
}

template <class T>
const T* const_data(const Tensor& t) {
  return static_cast<const T*>(t.const_data_ptr());
}

// `t` of this shape (-1: any size) and dtype, made contiguous where it is not.
template <class T, size_t N>
Tensor checked(const Tensor& t, const char* name, const std::array<int64_t, N>& sizes) {
  check(t.scalar_type() == scalar_type_of<T>, name, ": expected dtype ",
        torch::headeronly::toString(scalar_type_of<T>), ", got ",
        torch::headeronly::toString(t.scalar_type()));
  bool fits = t.dim() == static_cast<int64_t>(N);
  for (size_t i = 0; fits && i < N; ++i) fits = sizes[i] < 0 || t.size(i) == sizes[i];
  check(fits, name, ": expected shape ", shape(sizes), ", got ", shape(t.sizes()));
  return t.is_contiguous() ? t : torch::stable::contiguous(t);
}

}  // namespace cwbr
