// What the code of one instruction set includes, before the compiler is switched to it: an inline
// function of the standard library must not be compiled for instructions that others lack.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>
#include <utility>

#if defined(__x86_64__)
#if defined(__GNUC__) && !defined(__clang__)
// GCC 12 warns of its own intrinsics, which leave the vectors they overwrite uninitialized.
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#include <immintrin.h>
#pragma GCC diagnostic pop
#else
#include <immintrin.h>
#endif
#endif

#include "cpu/isa_batch_table.h"
#include "cpu/isa_pair_table.h"

#define CWBR_INLINE __attribute__((always_inline)) inline
#define CWBR_NOINLINE __attribute__((noinline))
#define CWBR_LAMBDA_INLINE __attribute__((always_inline))
#if defined(__clang__)
#define CWBR_PRAGMA(x) _Pragma(#x)
#define CWBR_UNROLL(n) CWBR_PRAGMA(unroll n)
#else
#define CWBR_PRAGMA(x) _Pragma(#x)
#define CWBR_UNROLL(n) CWBR_PRAGMA(GCC unroll n)
#endif
