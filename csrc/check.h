#pragma once

#include <sstream>
#include <stdexcept>

namespace cwbr {

// Throws what arrives in Python as a RuntimeError; `parts` are written one after the other.
template <class... Parts>
[[noreturn]] void fail(const Parts&... parts) {
  std::ostringstream message;
  message << "cwbr_fused: ";
  (message << ... << parts);
  throw std::runtime_error(message.str());
}

template <class... Parts>
void check(bool condition, const Parts&... parts) {
  if (!condition) fail(parts...);
}

}  // namespace cwbr
