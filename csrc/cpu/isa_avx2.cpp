#include "cpu/isa_headers.h"

#if defined(__x86_64__)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC target("avx2,fma")
#endif
#define CWBR_ISA avx2
#define CWBR_AVX2
#include "cpu/isa_tables.h"
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
