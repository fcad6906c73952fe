// The thread pool that the kernels run on: torch's in the extension, plain threads in a harness.
#pragma once

#include <algorithm>
#include <cstdint>
#include <functional>

namespace cwbr {

// Calls body(first, last) on disjoint ranges that cover [begin, end), each of at least `grain`
// indices where there are that many; in the calling thread when they fit one grain.
void parallel_for(int64_t begin, int64_t end, int64_t grain,
                  const std::function<void(int64_t, int64_t)>& body);

// How many indices, at least one, are `work` together where one of them is `each`.
inline int64_t grain_of(int64_t work, int64_t each) {
  return std::max<int64_t>(1, work / std::max<int64_t>(1, each));
}

// Calls body(i) for each i in [0, count), `grain` of them or more in one thread.
void for_each(int64_t count, int64_t grain, const auto& body) {
  parallel_for(0, count, grain, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) body(i);
  });
}

int num_threads();

}  // namespace cwbr
