// Picks the instruction set once per process.
#include <cstdlib>
#include <stdexcept>
#include <string>

#include "cpu/isa_batch_table.h"
#include "cpu/isa_pair_table.h"
#include "cpu/kernels.h"

namespace cwbr {

#if defined(__x86_64__)
namespace avx512 {
template <class T>
const PairKernels<T>& pair_kernels();
template <class In>
const BatchLoops<In>& batch_loops();
}  // namespace avx512
namespace avx2 {
template <class T>
const PairKernels<T>& pair_kernels();
template <class In>
const BatchLoops<In>& batch_loops();
}  // namespace avx2
#endif
namespace portable {
template <class T>
const PairKernels<T>& pair_kernels();
template <class In>
const BatchLoops<In>& batch_loops();
}  // namespace portable

namespace {

enum class Isa { avx512, avx2, portable };
constexpr const char* kNames[] = {"avx512", "avx2", "portable"};

bool supported(Isa isa) {
#if defined(__x86_64__)
  if (isa == Isa::avx512)
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
           __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
           __builtin_cpu_supports("fma");
  if (isa == Isa::avx2) return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#endif
  return isa == Isa::portable;
}

Isa choose() {
  const char* forced = std::getenv("CWBR_CPU_ISA");
  for (Isa isa : {Isa::avx512, Isa::avx2, Isa::portable}) {
    const char* name = kNames[static_cast<int>(isa)];
    if (forced != nullptr && *forced != '\0' && std::string(forced) != name) continue;
    if (supported(isa)) return isa;
    if (forced != nullptr && *forced != '\0')
      throw std::invalid_argument(std::string("CWBR_CPU_ISA: this processor has no ") + name);
  }
  throw std::invalid_argument(std::string("CWBR_CPU_ISA: expected avx512, avx2 or portable, got ") +
                              forced);
}

Isa isa() {
  static const Isa chosen = choose();
  return chosen;
}

}  // namespace

const char* isa_name() { return kNames[static_cast<int>(isa())]; }

template <class T>
const PairKernels<T>& pair_kernels() {
#if defined(__x86_64__)
  if (isa() == Isa::avx512) return avx512::pair_kernels<T>();
  if (isa() == Isa::avx2) return avx2::pair_kernels<T>();
#endif
  return portable::pair_kernels<T>();
}

template <class In>
const BatchLoops<In>& batch_loops() {
#if defined(__x86_64__)
  if (isa() == Isa::avx512) return avx512::batch_loops<In>();
  if (isa() == Isa::avx2) return avx2::batch_loops<In>();
#endif
  return portable::batch_loops<In>();
}

template const PairKernels<float>& pair_kernels<float>();
template const PairKernels<double>& pair_kernels<double>();
template const BatchLoops<float>& batch_loops<float>();
template const BatchLoops<double>& batch_loops<double>();
template const BatchLoops<Half>& batch_loops<Half>();
template const BatchLoops<BFloat16>& batch_loops<BFloat16>();

}  // namespace cwbr
