#include "cpu/isa_headers.h"

#if defined(__x86_64__)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512dq,avx512bw,avx512vl,fma"))), \
                             apply_to = function)
#else
#pragma GCC target("avx512f,avx512dq,avx512bw,avx512vl,fma")
#endif
#define CWBR_ISA avx512
#define CWBR_AVX512
#include "cpu/isa_tables.h"
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
