// Memory, blocks and threads of the emulated GPU, whatever runs the threads.
#pragma once

#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>
#include <cstring>
#include <memory>
#include <vector>

#ifdef EMULATE_THREADS
#define PER_THREAD thread_local
#else
#define PER_THREAD
#endif

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};

inline PER_THREAD dim3 threadIdx, blockIdx;
inline dim3 blockDim, gridDim;

namespace emulation {

// What one launch needs to know, set by the test.
inline uint64_t seed = 0;
inline bool uneven = false;  // whether some warps run ahead of others
inline int mutant = -1;      // which defect, planted by the test into a copy of a kernel, is awake
inline const char* failed = nullptr;

inline uint64_t random_bits() {
  seed += 0x9e3779b97f4a7c15;
  uint64_t z = seed;
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9;
  z = (z ^ (z >> 27)) * 0x94d049bb133111eb;
  return z ^ (z >> 31);
}

// `value` with every bit flipped, which makes 0 a NaN: what a defect puts in its place.
template <class T>
T spoiled(T value) {
  unsigned char bytes[sizeof(T)];
  memcpy(bytes, &value, sizeof(T));
  for (unsigned char& byte : bytes) byte = ~byte;
  memcpy(&value, bytes, sizeof(T));
  return value;
}

// Memory full of NaN whose last byte is followed by a page that faults; or, where its address shall
// leave a remainder when it is divided by 16, by that page and less than 16 bytes before it.
class Guarded {
 public:
  explicit Guarded(size_t bytes, unsigned remainder = 0) : page_(sysconf(_SC_PAGESIZE)) {
    length_ = (bytes + 16 + page_ - 1) / page_ * page_ + 2 * page_;
    base_ = static_cast<char*>(
        mmap(nullptr, length_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    mprotect(base_, page_, PROT_NONE);
    mprotect(base_ + length_ - page_, page_, PROT_NONE);
    data_ = base_ + length_ - page_ - bytes;
    if (remainder != 0) data_ -= (reinterpret_cast<uintptr_t>(data_) + 16 - remainder) % 16;
    memset(base_ + page_, 0xff, length_ - 2 * page_);
  }
  ~Guarded() { munmap(base_, length_); }
  Guarded(const Guarded&) = delete;
  Guarded& operator=(const Guarded&) = delete;
  void* data() const { return data_; }

 private:
  size_t page_, length_;
  char *base_, *data_;
};

inline void copy_in(void* device, const void* host, size_t bytes) { memcpy(device, host, bytes); }
inline void copy_out(void* host, const void* device, size_t bytes) { memcpy(host, device, bytes); }

// The copies that the current thread has started and not yet waited for.
struct Copy {
  void* to;
  const void* from;
};

struct Exchange {  // what the lanes of a warp show each other, alternating between two slots
  uint64_t value[2][32];
};

struct Block {
  unsigned number = 0;
  std::unique_ptr<Guarded> shared;
  std::vector<Exchange> exchanges;
  int votes = 0, last_votes = 0, waiting = 0, left = 0;
  std::vector<int> waiting_at_warp;
};

struct Thread {
  Block* block = nullptr;
  std::vector<Copy> copies;
  unsigned exchanges = 0;
};

inline PER_THREAD Thread* self;
inline size_t shared_bytes;

}  // namespace emulation
