#pragma once

#include <cstdint>
#include <functional>

namespace cwbr {

// Calls body(first, last) on disjoint ranges that cover [begin, end), each at least `grain` long
// but for the last, possibly on several threads. The library defines it over torch's thread pool,
// the tests without torch over std::thread.
void parallel_for(int64_t begin, int64_t end, int64_t grain,
                  const std::function<void(int64_t, int64_t)>& body);

int num_threads();

}  // namespace cwbr
