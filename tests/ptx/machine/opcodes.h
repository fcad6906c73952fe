// Every instruction of the machine by its name: PTX's, without modifiers that change no result.
#pragma once

#include "arithmetic.h"
#include "memory.h"

namespace machine {

using Execute = void (*)(Warp&, const Instruction&, Lanes);

struct Opcode {
  const char* name;
  Execute execute;
};

// result[lane] = function(a[lane], b[lane], ...), for the operands after the first.
template <class Result, class... Arguments, class Function, size_t... I>
void apply(Warp& warp, const Instruction& in, Lanes lanes, Function f, std::index_sequence<I...>) {
  Result* result = warp.registers<Result>(in.operand[0]);
  auto compute = [&](auto... argument) {
    for_each(lanes, [&](int lane) { result[lane] = f(argument[lane]...); });
  };
  compute(warp.registers<Arguments>(in.operand[I + 1])...);
}

#define LANES [](Warp& warp, const Instruction& in, Lanes lanes)
#define MAP1(name, R, A, expression)                                               \
  {name, LANES{apply<R, A>(                                                        \
             warp, in, lanes, [](A a) -> R { return static_cast<R>(expression); }, \
             std::make_index_sequence<1>());                                       \
  }                                                                                \
  }
#define MAP2(name, R, A, B, expression)                                                 \
  {name, LANES{apply<R, A, B>(                                                          \
             warp, in, lanes, [](A a, B b) -> R { return static_cast<R>(expression); }, \
             std::make_index_sequence<2>());                                            \
  }                                                                                     \
  }
#define MAP3(name, R, A, B, C, expression)                                                   \
  {name, LANES{apply<R, A, B, C>(                                                            \
             warp, in, lanes, [](A a, B b, C c) -> R { return static_cast<R>(expression); }, \
             std::make_index_sequence<3>());                                                 \
  }                                                                                          \
  }

using b8 = uint8_t;
using pred = uint8_t;
using u16 = uint16_t;
using s16 = int16_t;
using u32 = uint32_t;
using s32 = int32_t;
using u64 = uint64_t;
using s64 = int64_t;
using f32 = float;
using f64 = double;
using b16 = u16;
using b32 = u32;
using b64 = u64;

#define BITWISE(T)                                                                                 \
  MAP2("and." #T, T, T, T, a& b), MAP2("or." #T, T, T, T, a | b), MAP2("xor." #T, T, T, T, a ^ b), \
      MAP1("mov." #T, T, T, a), MAP3("selp." #T, T, T, T, pred, c ? a : b)
// Sums and products wrap around, also where C++ would not define them.
#define INTEGER(T)                                                                      \
  MAP2("add." #T, T, T, T, u64(a) + u64(b)), MAP2("sub." #T, T, T, T, u64(a) - u64(b)), \
      MAP2("mul.lo." #T, T, T, T, u64(a) * u64(b)),                                     \
      MAP3("mad.lo." #T, T, T, T, T, u64(a) * u64(b) + u64(c)),                         \
      MAP2("min." #T, T, T, T, smaller(a, b)), MAP2("max." #T, T, T, T, larger(a, b)),  \
      MAP2("div." #T, T, T, T, integer_quotient(a, b)),                                 \
      MAP2("rem." #T, T, T, T, integer_remainder(a, b)),                                \
      MAP2("shr." #T, T, T, u32, shifted_right(a, b)), COMPARE(T)
#define COMPARE(T)                                                                     \
  MAP2("setp.eq." #T, pred, T, T, a == b), MAP2("setp.ne." #T, pred, T, T, a != b),    \
      MAP2("setp.lt." #T, pred, T, T, a < b), MAP2("setp.le." #T, pred, T, T, a <= b), \
      MAP2("setp.gt." #T, pred, T, T, a > b), MAP2("setp.ge." #T, pred, T, T, a >= b)
#define WIDE(T, W)                            \
  MAP2("mul.wide." #T, W, T, T, W(a) * W(b)), \
      MAP3("mad.wide." #T, W, T, T, W, u64(W(a) * W(b)) + u64(c))
// Comparisons with NaN hold if they are unordered (ltu), not if they are ordered (lt).
#define FLOATING(T)                                                                            \
  MAP2("add." #T, T, T, T, a + b), MAP2("sub." #T, T, T, T, a - b),                            \
      MAP2("mul." #T, T, T, T, a* b), MAP3("fma." #T, T, T, T, T, std::fma(a, b, c)),          \
      MAP2("div." #T, T, T, T, a / b), MAP2("min." #T, T, T, T, smaller(a, b)),                \
      MAP2("max." #T, T, T, T, larger(a, b)),                                                  \
      MAP2("min.NaN." #T, T, T, T, nan_or(a, b, smaller(a, b))),                               \
      MAP2("max.NaN." #T, T, T, T, nan_or(a, b, larger(a, b))), MAP1("neg." #T, T, T, -a),     \
      MAP1("abs." #T, T, T, std::abs(a)), MAP1("sqrt." #T, T, T, std::sqrt(a)),                \
      MAP1("rcp." #T, T, T, 1 / a), MAP2("copysign." #T, T, T, T, std::copysign(b, a)),        \
      MAP2("setp.eq." #T, pred, T, T, a == b),                                                 \
      MAP2("setp.ne." #T, pred, T, T, a == a && b == b && a != b),                             \
      MAP2("setp.lt." #T, pred, T, T, a < b), MAP2("setp.le." #T, pred, T, T, a <= b),         \
      MAP2("setp.gt." #T, pred, T, T, a > b), MAP2("setp.ge." #T, pred, T, T, a >= b),         \
      MAP2("setp.equ." #T, pred, T, T, a != a || b != b || a == b),                            \
      MAP2("setp.neu." #T, pred, T, T, a != b), MAP2("setp.ltu." #T, pred, T, T, !(a >= b)),   \
      MAP2("setp.leu." #T, pred, T, T, !(a > b)), MAP2("setp.gtu." #T, pred, T, T, !(a <= b)), \
      MAP2("setp.geu." #T, pred, T, T, !(a < b)),                                              \
      MAP2("setp.num." #T, pred, T, T, a == a && b == b),                                      \
      MAP2("setp.nan." #T, pred, T, T, a != a || b != b)
#define CONVERT_TO(T)                                                       \
  MAP1("cvt." #T ".u16", T, u16, a), MAP1("cvt." #T ".s16", T, s16, a),     \
      MAP1("cvt." #T ".u32", T, u32, a), MAP1("cvt." #T ".s32", T, s32, a), \
      MAP1("cvt." #T ".u64", T, u64, a), MAP1("cvt." #T ".s64", T, s64, a)
#define CONVERT_ROUNDED(T, F)                                              \
  MAP1("cvt.rzi." #T "." #F, T, F, (to_integer<T, F>(a, std::trunc))),     \
      MAP1("cvt.rmi." #T "." #F, T, F, (to_integer<T, F>(a, std::floor))), \
      MAP1("cvt.rpi." #T "." #F, T, F, (to_integer<T, F>(a, std::ceil))),  \
      MAP1("cvt.rni." #T "." #F, T, F, (to_integer<T, F>(a, std::nearbyint)))
#define HALF(name, read)                                                    \
  MAP1("cvt.f32." name, f32, u16, read(a)),                                 \
      MAP2("setp.eq." name, pred, u16, u16, read(a) == read(b)),            \
      MAP2("setp.ne." name, pred, u16, u16,                                 \
           read(a) == read(a) && read(b) == read(b) && read(a) != read(b)), \
      MAP2("setp.neu." name, pred, u16, u16, read(a) != read(b))

inline const Opcode kArithmetic[] = {
    BITWISE(b16),
    BITWISE(b32),
    BITWISE(b64),
    BITWISE(pred),
    INTEGER(u16),
    INTEGER(s16),
    INTEGER(u32),
    INTEGER(s32),
    INTEGER(u64),
    INTEGER(s64),
    WIDE(u16, u32),
    WIDE(s16, s32),
    WIDE(u32, u64),
    WIDE(s32, s64),
    COMPARE(b16),
    COMPARE(b32),
    COMPARE(b64),
    MAP1("not.b16", b16, b16, ~a),
    MAP1("not.b32", b32, b32, ~a),
    MAP1("not.b64", b64, b64, ~a),
    MAP1("not.pred", pred, pred, !a),
    MAP1("neg.s16", s16, s16, 0 - u64(a)),
    MAP1("neg.s32", s32, s32, 0 - u64(a)),
    MAP1("neg.s64", s64, s64, 0 - u64(a)),
    MAP1("abs.s32", s32, s32, a < 0 ? 0 - u64(a) : u64(a)),
    MAP1("abs.s64", s64, s64, a < 0 ? 0 - u64(a) : u64(a)),
    MAP2("shl.b16", b16, b16, u32, shifted_left(a, b)),
    MAP2("shl.b32", b32, b32, u32, shifted_left(a, b)),
    MAP2("shl.b64", b64, b64, u32, shifted_left(a, b)),
    MAP2("mul.hi.u32", u32, u32, u32, upper_product(a, b)),
    MAP2("mul.hi.s32", s32, s32, s32, upper_product(a, b)),
    MAP2("mul.hi.u64", u64, u64, u64, upper_product(a, b)),
    MAP2("mul.hi.s64", s64, s64, s64, upper_product(a, b)),
    MAP3("bfe.u32", u32, u32, u32, u32, bit_field(a, b, c)),
    MAP3("bfe.s32", s32, s32, u32, u32, bit_field(a, b, c)),
    MAP3("prmt.b32", b32, b32, b32, b32, permuted(a, b, c)),
    MAP1("popc.b32", u32, b32, __builtin_popcount(a)),
    MAP1("clz.b32", u32, b32, a ? __builtin_clz(a) : 32),
    FLOATING(f32),
    FLOATING(f64),
    HALF("f16", from_half),
    HALF("bf16", from_bfloat),
    MAP3("fma.ftz.f32", f32, f32, f32, f32, flushed(std::fma(flushed(a), flushed(b), flushed(c)))),
    MAP2("add.ftz.f32", f32, f32, f32, flushed(flushed(a) + flushed(b))),
    MAP2("sub.ftz.f32", f32, f32, f32, flushed(flushed(a) - flushed(b))),
    MAP2("mul.ftz.f32", f32, f32, f32, flushed(flushed(a) * flushed(b))),
    MAP1("abs.ftz.f32", f32, f32, flushed(std::abs(a))),
    MAP1("neg.ftz.f32", f32, f32, flushed(-a)),
    MAP1("rcp.approx.f32", f32, f32, reciprocal(a)),
    MAP1("rcp.approx.ftz.f32", f32, f32, flushed(reciprocal(flushed(a)))),
    MAP1("rcp.approx.ftz.f64", f64, f64, rough_reciprocal(a)),
    MAP1("sqrt.approx.f32", f32, f32, square_root(a)),
    MAP1("sqrt.approx.ftz.f32", f32, f32, flushed(square_root(flushed(a)))),
    MAP1("rsqrt.approx.f32", f32, f32, inverse_root(a)),
    MAP1("rsqrt.approx.ftz.f32", f32, f32, flushed(inverse_root(flushed(a)))),
    MAP1("ex2.approx.f32", f32, f32, power_of_2(a)),
    MAP1("ex2.approx.ftz.f32", f32, f32, flushed(power_of_2(flushed(a)))),
    MAP1("lg2.approx.f32", f32, f32, log_2(a)),
    MAP1("lg2.approx.ftz.f32", f32, f32, flushed(log_2(flushed(a)))),
    MAP2("div.full.f32", f32, f32, f32, quotient(a, b)),
    MAP2("div.full.ftz.f32", f32, f32, f32, flushed(quotient(flushed(a), flushed(b)))),
    MAP2("div.approx.f32", f32, f32, f32, fast_quotient(a, b)),
    MAP2("div.approx.ftz.f32", f32, f32, f32, flushed(fast_quotient(flushed(a), flushed(b)))),
    CONVERT_TO(u16),
    CONVERT_TO(s16),
    CONVERT_TO(u32),
    CONVERT_TO(s32),
    CONVERT_TO(u64),
    CONVERT_TO(s64),
    CONVERT_TO(f32),
    CONVERT_TO(f64),
    CONVERT_ROUNDED(s32, f32),
    CONVERT_ROUNDED(u32, f32),
    CONVERT_ROUNDED(s64, f32),
    CONVERT_ROUNDED(s32, f64),
    CONVERT_ROUNDED(s64, f64),
    MAP1("cvt.f64.f32", f64, f32, a),
    MAP1("cvt.f32.f64", f32, f64, a),
    MAP1("cvt.f16.f32", u16, f32, to_half(a)),
    MAP1("cvt.bf16.f32", u16, f32, to_bfloat(a)),
    MAP1("cvt.f16.f64", u16, f64, bits<u16>(static_cast<_Float16>(a))),
    MAP2("cvt.f16x2.f32", u32, f32, f32, u32(to_half(a)) << 16 | to_half(b)),
    MAP2("cvt.bf16x2.f32", u32, f32, f32, u32(to_bfloat(a)) << 16 | to_bfloat(b)),
    MAP2("pack.b16.2", b32, b16, b16, u32(b) << 16 | a),
    MAP2("pack.b32.2", b64, b32, b32, u64(b) << 32 | a),
};

}  // namespace machine
