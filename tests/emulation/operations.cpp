// Every operation of csrc/operations.h on the emulated GPU, or in hardware.cu on a real one, behind
// one C function for the tests.
#include <cstring>
#include <stdexcept>
#include <string>
#include <tuple>
#include <type_traits>
#include <utility>

#define CWBR_CUDA
#define CWBR_WITHOUT_TORCH
#ifndef __CUDACC__
#include "emulation.h"
#endif
#include "operations.h"

namespace cwbr::cuda {

// How many multiprocessors the GPU claims to have.
inline int claimed_processors = 4;
// What the last call has launched, and borrowed beside its results.
inline int launches = 0;
inline int64_t scratch_bytes = 0;

// As the operations know it; in this namespace the kernels are found.
class TestLauncher : public emulation::Launcher {
 public:
  static constexpr bool kOnHost = false, kKeepsMoments = true;

  explicit TestLauncher(const Tensor&) : emulation::Launcher(claimed_processors) {}
  ~TestLauncher() { cuda::launches += emulation::Launcher::launches; }

  Tensor empty(ScalarType dtype, Sizes sizes) const { return Tensor(dtype, sizes); }
  template <class T>
  T* scratch(int64_t count) {
    scratch_bytes += count * static_cast<int64_t>(sizeof(T));
    return emulation::Launcher::scratch<T>(count);
  }
  void check_device(const Tensor&, const char*) const {}
  static auto with_element_type(ElementType type, const auto& f) {
    return with_any_element_type(type, f);
  }
};

}  // namespace cwbr::cuda

namespace {

using cwbr::Tensor;

// Memory of the caller. `written`: the operation writes it in place.
struct HostTensor {
  void* data;
  const int64_t* sizes;
  int32_t dim, dtype, written;

  std::vector<int64_t> shape() const { return {sizes, sizes + dim}; }
};

// Tensors, or a number.
struct Argument {
  const HostTensor* tensors;
  int64_t count, whole;
  double number;
};

Tensor to_device(const HostTensor& host) {
  const unsigned remainder = reinterpret_cast<uintptr_t>(host.data) % 16;
  const Tensor t(static_cast<cwbr::ScalarType>(host.dtype), host.shape(), remainder);
  emulation::copy_in(t.mutable_data_ptr(), host.data, t.bytes());
  return t;
}

template <class T>
T unboxed(const Argument& argument) {
  if constexpr (std::is_same_v<T, Tensor>) {
    return to_device(argument.tensors[0]);
  } else if constexpr (std::is_same_v<T, std::vector<Tensor>>) {
    std::vector<Tensor> all;
    for (int64_t i = 0; i < argument.count; ++i) all.push_back(to_device(argument.tensors[i]));
    return all;
  } else {
    return std::is_same_v<T, double> ? T(argument.number) : T(argument.whole);
  }
}

// What an operation returned, and what it wrote.
void collect(std::vector<Tensor>& into, const Tensor& t) { into.push_back(t); }
void collect(std::vector<Tensor>& into, const std::vector<Tensor>& all) {
  into.insert(into.end(), all.begin(), all.end());
}
template <class... Parts>
void collect(std::vector<Tensor>& into, const std::tuple<Parts...>& all) {
  std::apply([&](const auto&... part) { (collect(into, part), ...); }, all);
}
void collect_written(const HostTensor& host, const Tensor& t) {
  if (host.written) emulation::copy_out(host.data, t.const_data_ptr(), t.bytes());
}
void collect_written(const Argument& argument, const Tensor& t) {
  collect_written(argument.tensors[0], t);
}
void collect_written(const Argument& argument, const std::vector<Tensor>& all) {
  for (size_t i = 0; i < all.size(); ++i) collect_written(argument.tensors[i], all[i]);
}
void collect_written(const Argument&, const auto&) {}

template <class Result, class... Parameters, size_t... I>
std::vector<Tensor> call(Result (*operation)(Parameters...), const Argument* arguments,
                         std::index_sequence<I...>) {
  std::vector<Tensor> results;
  const std::tuple<std::decay_t<Parameters>...> given{
      unboxed<std::decay_t<Parameters>>(arguments[I])...};
  if constexpr (std::is_void_v<Result>)
    std::apply(operation, given);
  else
    collect(results, std::apply(operation, given));
  (collect_written(arguments[I], std::get<I>(given)), ...);
  return results;
}

template <class Result, class... Parameters>
std::vector<Tensor> call(Result (*operation)(Parameters...), const Argument* arguments,
                         int64_t count) {
  cwbr::check(count == sizeof...(Parameters), "expected ", sizeof...(Parameters), " arguments");
  return call(operation, arguments, std::index_sequence_for<Parameters...>());
}

std::vector<Tensor> call(const std::string& name, const Argument* arguments, int64_t count) {
#define CWBR_CALL(operation) \
  if (name == #operation)    \
    return call(&cwbr::operation##_op<cwbr::cuda::TestLauncher>, arguments, count);
  CWBR_FOR_EACH_OPERATION(CWBR_CALL)
  cwbr::fail("no operation ", name);
}

// Copies the results to where the caller has made room for what schema.FAKES says of them.
void hand_over(const std::vector<Tensor>& results, const HostTensor* room, int64_t count) {
  cwbr::check(std::ssize(results) == count, "schema.FAKES says ", count, " results, the operation ",
              results.size());
  for (int64_t i = 0; i < count; ++i) {
    const Tensor& t = results[i];
    const auto dtype = static_cast<cwbr::ScalarType>(room[i].dtype);
    cwbr::check(t.scalar_type() == dtype && t.sizes() == room[i].shape(), "schema.FAKES says ",
                cwbr::name_of(dtype), cwbr::shape(room[i].shape()), " of result ", i,
                ", the operation ", cwbr::name_of(t.scalar_type()), cwbr::shape(t.sizes()));
    emulation::copy_out(room[i].data, t.const_data_ptr(), t.bytes());
  }
}

std::string message;

}  // namespace

extern "C" {

void configure(uint64_t seed, int mutant, int processors) {
  emulation::seed = seed;
  emulation::uneven = seed % 2 == 1;
  emulation::mutant = mutant;
  emulation::failed = nullptr;
  cwbr::cuda::claimed_processors = processors;
}

// Runs an operation; returns what went wrong, or null.
const char* run(const char* name, const Argument* arguments, int64_t count, const HostTensor* room,
                int64_t results) {
  cwbr::cuda::launches = 0;
  cwbr::cuda::scratch_bytes = 0;
  try {
    const std::vector<Tensor> made = call(name, arguments, count);
    if (emulation::failed == nullptr) hand_over(made, room, results);
  } catch (const std::runtime_error& error) {
    message = error.what();
    return message.c_str();
  }
  return emulation::failed;
}

int launches() { return cwbr::cuda::launches; }
int64_t scratch_bytes() { return cwbr::cuda::scratch_bytes; }

}  // extern "C"
