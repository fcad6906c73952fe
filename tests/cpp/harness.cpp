#include "harness.h"

#include <algorithm>
#include <thread>

#include "cpu/parallel.h"

namespace cwbr {

void parallel_for(int64_t begin, int64_t end, int64_t grain,
                  const std::function<void(int64_t, int64_t)>& body) {
  const int64_t size = end - begin, chunks = (size + grain - 1) / std::max<int64_t>(1, grain);
  const int64_t threads = std::min<int64_t>(thread_count, chunks);
  if (size <= 0) return;
  if (threads <= 1) return body(begin, end);
  std::vector<std::thread> pool;
  for (int64_t t = 0; t < threads; ++t) {
    pool.emplace_back(body, begin + size * t / threads, begin + size * (t + 1) / threads);
  }
  for (std::thread& thread : pool) thread.join();
}

int num_threads() { return thread_count; }

}  // namespace cwbr
