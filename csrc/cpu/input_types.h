// The dtypes in which features and logits arrive. Half precision is converted by bits, so that
// neither torch nor a hardware instruction is needed.
#pragma once

#include <cstdint>
#include <cstring>

namespace cwbr {

struct Half {
  uint16_t bits;
};

struct BFloat16 {
  uint16_t bits;
};

enum class InputType { kFloat, kDouble, kHalf, kBFloat16 };

// What is computed from an input of type In: float64 from float64, float32 from the others.
template <class In>
struct AccumulateOf {
  using type = float;
};
template <>
struct AccumulateOf<double> {
  using type = double;
};
template <class In>
using Accumulate = typename AccumulateOf<In>::type;

// Calls f(In()) with the element type that `type` names, of those that accumulate in T.
template <class T, class F>
auto with_input_type_of(InputType type, const F& f) {
  if constexpr (sizeof(T) == sizeof(double)) {
    return f(double());
  } else if (type == InputType::kHalf) {
    return f(Half());
  } else if (type == InputType::kBFloat16) {
    return f(BFloat16());
  } else {
    return f(float());
  }
}

// Calls f(In()) with the element type that `type` names.
template <class F>
auto with_input_type(InputType type, const F& f) {
  return type == InputType::kDouble ? f(double()) : with_input_type_of<float>(type, f);
}

// For explicit instantiation: each input type with its accumulation type.
#define CWBR_FOR_EACH_INPUT(instantiate)                                         \
  instantiate(float, float) instantiate(double, double) instantiate(Half, float) \
      instantiate(BFloat16, float)

}  // namespace cwbr
