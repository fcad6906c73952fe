// Everything of one instruction set: included by isa_<name>.cpp, which first includes isa_headers.h
// and then names its namespace CWBR_ISA and switches the compiler to its instructions.

#include "cpu/simd.h"
// simd.h comes first.
#include "cpu/all_pair_distance_simd.h"
#include "cpu/batch_loops_simd.h"
#include "cpu/class_bank_simd.h"
#include "cpu/pair_gradients_simd.h"
// pair_gradients_simd.h comes first.
#include "cpu/pair_distance_simd.h"

namespace cwbr::CWBR_ISA {

template <class T>
const PairKernels<T>& pair_kernels() {
  static constexpr PairKernels<T> table = {
      kLanes<T>,   scale<T>,         pack<T>,          tile<T>,
      gradient<T>, pair_distance<T>, near_distance<T>, pair_distance_backward<T>};
  return table;
}

template <class In>
const BatchLoops<In>& batch_loops() {
  using T = accumulate_t<In>;
  static constexpr BatchLoops<In> table = {
      moments<In, T>,           moments_gradient<In, T>, softmax_statistics<In, T>,
      add_probabilities<In, T>, top_confusions<In, T>,   class_attraction<In, T>,
      second_moments<In, T>,    add_scatter<In, T>,      move_towards<In, T>};
  return table;
}

template const PairKernels<float>& pair_kernels<float>();
template const PairKernels<double>& pair_kernels<double>();
template const BatchLoops<float>& batch_loops<float>();
template const BatchLoops<double>& batch_loops<double>();
template const BatchLoops<Half>& batch_loops<Half>();
template const BatchLoops<BFloat16>& batch_loops<BFloat16>();

}  // namespace cwbr::CWBR_ISA
