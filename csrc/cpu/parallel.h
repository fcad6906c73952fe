// The thread pool that the kernels run on: torch's in the extension, plain threads in a harness.
#pragma once

#include <cstdint>
#include <functional>

namespace cwbr {

// Calls body(first, last) on disjoint ranges that cover [begin, end), each of at least `grain`
// indices where there are that many; in the calling thread when they fit one grain.
void parallel_for(int64_t begin, int64_t end, int64_t grain,
                  const std::function<void(int64_t, int64_t)>& body);

int num_threads();

}  // namespace cwbr
