#pragma once

#include <sstream>
#include <stdexcept>

namespace cwbr {

// Throws what arrives in Python as a RuntimeError; `parts` are written one after the other.
template <class... Parts>
inline void check(bool condition, const Parts&... parts) {
  if (condition) return;
  std::ostringstream message;
  message << "cwbr_fused: ";
  (message << ... << parts);
  throw std::runtime_error(message.str());
}

}  // namespace cwbr
