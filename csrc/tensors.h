// Arguments and results of the operations as tensors: checked, and as the kernels take them.
//
// A Device, the first parameter of most functions here, says where a call runs: CpuDevice, or a
// Launcher on a GPU. Tests bring tensors and a launcher of their own.
#pragma once

#ifdef CWBR_WITHOUT_TORCH
#include <emulated_tensors.h>
#else
#include "torch_tensors.h"
#endif

#include <initializer_list>
#include <limits>
#include <string>
#include <tuple>
#include <vector>

#include "arguments.h"
#include "check.h"

namespace cwbr {

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

using Sizes = std::initializer_list<int64_t>;

// "(3, 4)"; a negative size is written *.
std::string shape(const auto& sizes) {
  std::string text;
  for (const int64_t size : sizes) {
    text += (text.empty() ? "" : ", ") + (size < 0 ? "*" : std::to_string(size));
  }
  return "(" + text + ")";
}

template <class T>
T* data(const Tensor& t) {
  return static_cast<T*>(t.mutable_data_ptr());
}

template <class T>
const T* elements(const Tensor& t) {
  return static_cast<const T*>(t.const_data_ptr());
}

// A new contiguous tensor.
template <class T>
Tensor empty(const auto& on, Sizes sizes) {
  return on.empty(scalar_type_of<T>, sizes);
}

// `t` of this dtype and shape (-1: any size), made contiguous where it is not.
template <class T>
Tensor input(const auto& on, const Tensor& t, const char* name, Sizes sizes) {
  on.check_device(t, name);
  check(t.scalar_type() == scalar_type_of<T>, name, ": expected dtype ", name_of(scalar_type_of<T>),
        ", got ", name_of(t.scalar_type()));
  bool fits = t.dim() == static_cast<int64_t>(sizes.size());
  int64_t dim = 0;
  for (const int64_t size : sizes) fits = fits && (size < 0 || t.size(dim) == size), ++dim;
  if (!fits) fail(name, ": expected shape ", shape(sizes), ", got ", shape(t.sizes()));
  return made_contiguous(t);
}

// The elements of such a tensor, to be written in place.
template <class T>
T* written(const auto& on, const Tensor& t, const char* name, Sizes sizes) {
  check(t.is_contiguous(), name, ": expected a contiguous tensor");
  return data<T>(input<T>(on, t, name, sizes));
}

// A matrix of any floating dtype whose rows are contiguous: on the CPU at any distance from each
// other.
struct InputMatrix {
  Tensor tensor;
  ElementType type;
  int64_t rows, cols, stride;

  template <class In>
  Matrix<const In> as() const {
    return {elements<In>(tensor), rows, cols, stride};
  }
};

inline ElementType element_type(const Tensor& t, const char* name) {
  switch (t.scalar_type()) {
    case ScalarType::Float:
      return ElementType::kFloat;
    case ScalarType::Double:
      return ElementType::kDouble;
    case ScalarType::Half:
      return ElementType::kHalf;
    case ScalarType::BFloat16:
      return ElementType::kBFloat16;
    default:
      fail(name, ": expected a floating dtype, got ", name_of(t.scalar_type()));
  }
}

template <class Device>
InputMatrix input_matrix(const Device& on, const Tensor& t, const char* name) {
  on.check_device(t, name);
  if (t.dim() != 2) fail(name, ": expected a matrix, got shape ", shape(t.sizes()));
  const bool as_it_is = Device::kOnHost && t.stride(1) == 1 && t.stride(0) >= 0;
  const Tensor tensor = as_it_is ? t : made_contiguous(t);
  return {tensor, element_type(t, name), t.size(0), t.size(1), tensor.stride(0)};
}

// Classes of any integer dtype as contiguous int64, `batch` of them or, where it is -1, any number.
inline Tensor int64_targets(const auto& on, const Tensor& targets, int64_t batch = -1) {
  on.check_device(targets, "targets");
  if (targets.dim() != 1 || (batch >= 0 && targets.size(0) != batch)) {
    const std::string expected = batch < 0 ? "B" : std::to_string(batch);
    fail("targets: expected shape (", expected, ",), got ", shape(targets.sizes()));
  }
  switch (targets.scalar_type()) {
    case ScalarType::Long:
      return made_contiguous(targets);
    case ScalarType::Byte:
    case ScalarType::Char:
    case ScalarType::Short:
    case ScalarType::Int:
    case ScalarType::UInt16:
    case ScalarType::UInt32:
    case ScalarType::UInt64:
    case ScalarType::Bool:
      return made_contiguous(to_int64(targets));
    default:
      fail("targets: expected an integer dtype, got ", name_of(targets.scalar_type()));
  }
}

// Whether all of a contiguous int64 tensor is in [lowest, classes); a GPU's kernels ask themselves.
template <class Device>
void check_classes(const Device&, const Tensor& t, const char* name, int64_t lowest,
                   int64_t classes) {
  if constexpr (Device::kOnHost) {
    const int64_t* values = elements<int64_t>(t);
    for (int64_t i = 0; i < t.numel(); ++i) {
      check(values[i] >= lowest && values[i] < classes, name, ": expected numbers from ", lowest,
            " to ", classes - 1, ", got ", values[i]);
    }
  }
}

// The same without a lowest one.
template <class Device>
void check_below(const Device& on, const Tensor& t, const char* name, int64_t classes) {
  check_classes(on, t, name, std::numeric_limits<int64_t>::min(), classes);
}

inline void check_at_least(const char* name, int64_t value, int64_t least) {
  check(value >= least, name, ": expected at least ", least, ", got ", value);
}

// The groups of `batch` samples.
struct GroupTensors {
  Tensor order, offsets;

  template <class Device>
  GroupTensors(const Device& on, const Tensor& order_of, const Tensor& offsets_of, int64_t batch)
      : order(input<int64_t>(on, order_of, "order", {batch})),
        offsets(input<int64_t>(on, offsets_of, "offsets", {-1})) {
    check(count() >= 0, "offsets: expected at least one element");
    check_classes(on, order, "order", 0, batch);
    if constexpr (Device::kOnHost) {
      const int64_t* at = elements<int64_t>(offsets);
      int64_t last = 0;
      for (int64_t k = 0; k <= count(); last = at[k++]) {
        check(at[k] >= last && at[k] <= batch, "offsets: expected rising positions from 0 to ",
              batch, ", got ", at[k]);
      }
    }
  }

  int64_t count() const { return offsets.size(0) - 1; }
  Groups groups() const {
    return {elements<int64_t>(order), elements<int64_t>(offsets), count(), order.size(0)};
  }
};

// Pairs of rows below `rows`.
struct PairTensor {
  Tensor index;

  PairTensor(const auto& on, const Tensor& pairs, int64_t rows)
      : index(input<int64_t>(on, pairs, "pairs", {-1, 2})) {
    check_classes(on, index, "pairs", 0, rows);
  }

  int64_t count() const { return index.size(0); }
  Pairs pairs() const { return {elements<int64_t>(index), count()}; }
};

// Calls f(T()) with float or double, whichever is the dtype of `t`.
auto with_float_type(const Tensor& t, const auto& f) {
  return t.scalar_type() == ScalarType::Double ? f(double()) : f(float());
}

// mean and var (rows, dims) of one shape.
template <class T>
struct MomentTensors {
  Tensor mean, var;

  MomentTensors(const auto& on, const Tensor& mean_of, const Tensor& var_of)
      : mean(input<T>(on, mean_of, "mean", {-1, -1})),
        var(input<T>(on, var_of, "var", {mean.size(0), mean.size(1)})) {}

  int64_t rows() const { return mean.size(0); }
  int64_t dims() const { return mean.size(1); }
  Moments<T> moments() const { return {elements<T>(mean), elements<T>(var), rows(), dims()}; }
  std::tuple<Tensor, Tensor> empty_gradients(const auto& on) const {
    return {empty<T>(on, {rows(), dims()}), empty<T>(on, {rows(), dims()})};
  }
};

auto with_moments(const auto& on, const Tensor& mean, const Tensor& var, const auto& f) {
  return with_float_type(mean, [&]<class T>(T) { return f(MomentTensors<T>(on, mean, var)); });
}

using Two = std::tuple<Tensor, Tensor>;
using Three = std::tuple<Tensor, Tensor, Tensor>;

}  // namespace cwbr
