// Arguments and results of the operations as tensors of torch's stable ABI.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <array>
#include <cstdint>
#include <string>
#include <utility>

#include "check.h"
#include "cpu/batch_kernels.h"

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
template <>
inline constexpr ScalarType scalar_type_of<bool> = ScalarType::Bool;
template <>
inline constexpr ScalarType scalar_type_of<Half> = ScalarType::Half;
template <>
inline constexpr ScalarType scalar_type_of<BFloat16> = ScalarType::BFloat16;

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

inline const char* name_of(ScalarType dtype) { return torch::headeronly::toString(dtype); }

// `t` of this shape (-1: any size) and dtype, made contiguous where it is not.
template <class T, size_t N>
Tensor checked(const Tensor& t, const char* name, const std::array<int64_t, N>& sizes) {
  check(t.scalar_type() == scalar_type_of<T>, name, ": expected dtype ", name_of(scalar_type_of<T>),
        ", got ", name_of(t.scalar_type()));
  bool fits = t.dim() == static_cast<int64_t>(N);
  for (size_t i = 0; fits && i != N; ++i) fits = sizes[i] < 0 || t.size(i) == sizes[i];
  if (!fits) fail(name, ": expected shape ", shape(sizes), ", got ", shape(t.sizes()));
  return t.is_contiguous() ? t : torch::stable::contiguous(t);
}

// The elements of `t` of this shape and dtype, to be written in place.
template <class T, size_t N>
T* written(const Tensor& t, const char* name, const std::array<int64_t, N>& sizes) {
  check(t.is_contiguous(), name, ": expected a contiguous tensor");
  return data<T>(checked<T, N>(t, name, sizes));
}

// A matrix of any floating dtype whose rows are contiguous, at any distance from each other.
struct InputMatrix {
  Tensor tensor;
  InputType type;
  int64_t rows, cols, stride;

  template <class In>
  Matrix<const In> as() const {
    return {static_cast<const In*>(tensor.const_data_ptr()), rows, cols, stride};
  }
};

inline InputMatrix input_matrix(const Tensor& t, const char* name) {
  if (t.dim() != 2) fail(name, ": expected a matrix, got shape ", shape(t.sizes()));
  const bool contiguous_rows = t.stride(1) == 1 && t.stride(0) >= 0;
  const Tensor tensor = contiguous_rows ? t : torch::stable::contiguous(t);
  InputType type = InputType::kFloat;
  switch (t.scalar_type()) {
    case ScalarType::Float:
      break;
    case ScalarType::Double:
      type = InputType::kDouble;
      break;
    case ScalarType::Half:
      type = InputType::kHalf;
      break;
    case ScalarType::BFloat16:
      type = InputType::kBFloat16;
      break;
    default:
      fail(name, ": expected a floating dtype, got ", name_of(t.scalar_type()));
  }
  return {tensor, type, t.size(0), t.size(1), tensor.stride(0)};
}

// Classes of any integer dtype as contiguous int64.
inline Tensor int64_targets(const Tensor& targets) {
  if (targets.dim() != 1) fail("targets: expected shape (B,), got ", shape(targets.sizes()));
  switch (targets.scalar_type()) {
    case ScalarType::Long:
      return targets.is_contiguous() ? targets : torch::stable::contiguous(targets);
    case ScalarType::Byte:
    case ScalarType::Char:
    case ScalarType::Short:
    case ScalarType::Int:
    case ScalarType::UInt16:
    case ScalarType::UInt32:
    case ScalarType::UInt64:
    case ScalarType::Bool:
      return torch::stable::contiguous(torch::stable::to(targets, ScalarType::Long));
    default:
      fail("targets: expected an integer dtype, got ", name_of(targets.scalar_type()));
  }
}

// Calls f(T()) with float or double, whichever is the dtype of `t`.
template <class F>
auto with_float_type(const Tensor& t, const F& f) {
  return t.scalar_type() == ScalarType::Double ? f(double()) : f(float());
}

// Whether all of a contiguous int64 tensor is in [lowest, classes).
inline void check_classes(const Tensor& t, const char* name, int64_t lowest, int64_t classes) {
  const int64_t* values = const_data<int64_t>(t);
  for (int64_t i = 0; i < t.numel(); ++i) {
    check(values[i] >= lowest && values[i] < classes, name, ": expected classes from ", lowest,
          " to ", classes - 1, ", got ", values[i]);
  }
}

// The groups as the kernels take them, after checking that they index `batch` samples.
struct CheckedGroups {
  Tensor order, offsets;
  Groups groups;

  CheckedGroups(const Tensor& order_of, const Tensor& offsets_of, int64_t batch)
      : order(checked<int64_t, 1>(order_of, "order", {batch})),
        offsets(checked<int64_t, 1>(offsets_of, "offsets", {-1})),
        groups{const_data<int64_t>(order), const_data<int64_t>(offsets), offsets.size(0) - 1} {
    check(groups.count >= 0, "offsets: expected at least one element");
    for (int64_t s = 0; s < batch; ++s) {
      check(groups.order[s] >= 0 && groups.order[s] < batch, "order: expected indices below ",
            batch, ", got ", groups.order[s]);
    }
    int64_t last = 0;
    for (int64_t k = 0; k <= groups.count; ++k) {
      check(groups.offsets[k] >= last && groups.offsets[k] <= batch,
            "offsets: expected rising positions from 0 to ", batch, ", got ", groups.offsets[k]);
      last = groups.offsets[k];
    }
  }
};

// Pairs of rows below `rows`.
inline Tensor checked_pairs(const Tensor& pairs, int64_t rows) {
  const Tensor index = checked<int64_t, 2>(pairs, "pairs", {-1, 2});
  const int64_t* row = const_data<int64_t>(index);
  for (int64_t p = 0; p < 2 * index.size(0); ++p) {
    check(row[p] >= 0 && row[p] < rows, "pairs: expected rows below ", rows, ", got ", row[p]);
  }
  return index;
}

// mean and var (rows, dims) of one shape.
template <class T>
struct Moments {
  Tensor mean_tensor, var_tensor;
  int64_t rows, dims;

  Moments(const Tensor& mean, const Tensor& var)
      : mean_tensor(checked<T, 2>(mean, "mean", {-1, -1})),
        var_tensor(checked<T, 2>(var, "var", {mean.size(0), mean.size(1)})),
        rows(mean.size(0)),
        dims(mean.size(1)) {}

  const T* mean() const { return const_data<T>(mean_tensor); }
  const T* var() const { return const_data<T>(var_tensor); }
  std::pair<Tensor, Tensor> empty_gradients() const {
    return {empty<T, 2>({rows, dims}), empty<T, 2>({rows, dims})};
  }
};

// The value of a tensor without dimensions.
template <class T>
T scalar(const Tensor& t, const char* name) {
  return *const_data<T>(checked<T, 0>(t, name, {}));
}

}  // namespace cwbr
