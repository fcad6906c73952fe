// GCC's and Clang's own vectors of 16 bytes: SSE2 on x86-64, NEON on AArch64.
#include "cpu/isa_headers.h"

#define CWBR_ISA portable
#include "cpu/isa_tables.h"
