// Every CPU kernel on small and odd shapes: against the definitions, and bit for bit the same on
// any number of threads. Meant to run under sanitizers.
#include <stdexcept>

#include "cpu/kernels.h"
#include "harness.h"

void test_batch_kernels();
void test_class_bank();
void test_pair_kernels();

int main() {
  try {
    std::printf("%s: ", cwbr::isa_name());
  } catch (const std::invalid_argument& error) {
    std::printf("skipped: %s\n", error.what());
    return 0;
  }
  test_batch_kernels();
  test_class_bank();
  test_pair_kernels();
  std::printf("all kernels agree with their definitions, on 1 to 5 threads\n");
}
