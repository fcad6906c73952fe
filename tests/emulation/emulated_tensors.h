// Tensors for the tests of the CUDA operations: what csrc/tensors.h asks of torch's, in memory that
// notices who leaves it.
#pragma once

#include <algorithm>
#include <cstdint>
#include <memory>
#include <vector>

#include "check.h"

namespace cwbr {

// The first six by the numbers that harness.py gives them.
enum class ScalarType {
  Double,
  Float,
  Half,
  BFloat16,
  Long,
  Bool,
  Byte,
  Char,
  Short,
  Int,
  UInt16,
  UInt32,
  UInt64,
  Undefined
};

inline const char* name_of(ScalarType dtype) {
  constexpr const char* names[] = {"Double", "Float", "Half", "BFloat16", "Long", "Bool"};
  return dtype <= ScalarType::Bool ? names[static_cast<int>(dtype)] : "another dtype";
}

inline int64_t element_size(ScalarType dtype) {
  constexpr int64_t sizes[] = {8, 4, 2, 2, 8, 1, 1};
  check(dtype <= ScalarType::Byte, "no such tensors here");
  return sizes[static_cast<int>(dtype)];
}

// Contiguous, on the GPU.
class Tensor {
 public:
  // New, full of NaN; its address leaves this remainder when it is divided by 16 bytes.
  Tensor(ScalarType dtype, std::vector<int64_t> sizes, unsigned remainder = 0)
      : dtype_(dtype),
        sizes_(std::move(sizes)),
        memory_(std::make_shared<emulation::Guarded>(bytes(), remainder)) {}

  int64_t dim() const { return static_cast<int64_t>(sizes_.size()); }
  int64_t size(int64_t i) const { return sizes_[i]; }
  const std::vector<int64_t>& sizes() const { return sizes_; }
  int64_t stride(int64_t i) const {
    int64_t stride = 1;
    for (size_t later = i + 1; later < sizes_.size(); ++later) stride *= sizes_[later];
    return stride;
  }
  int64_t numel() const { return dim() == 0 ? 1 : sizes_[0] * stride(0); }
  int64_t bytes() const { return numel() * element_size(dtype_); }
  bool is_contiguous() const { return true; }
  ScalarType scalar_type() const { return dtype_; }
  const void* const_data_ptr() const { return memory_->data(); }
  void* mutable_data_ptr() const { return memory_->data(); }

 private:
  ScalarType dtype_;
  std::vector<int64_t> sizes_;
  std::shared_ptr<emulation::Guarded> memory_;
};

inline Tensor made_contiguous(const Tensor& t) { return t; }
inline Tensor to_int64(const Tensor&) { fail("only int64 targets here"); }

}  // namespace cwbr
