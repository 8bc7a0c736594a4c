// 2^x for x <= about 1, vectorized.
#pragma once

#include "lanes.h"

GISTKERN_NAMESPACE_BEGIN

constexpr float kLog2E = 1.44269504088896340736f;
constexpr float kLn2 = 0.693147180559945309417f;

// Exactly 0 below 2^-126, -inf included; NaN stays NaN. The polynomial is the minimax fit of 2^f on |f| <= 0.5, found
// by Remez's exchange: relative error 2.6e-9, so that fp32 rounding is what remains.
GISTKERN_INLINE Floats exp2(Floats x) {
  // adding 1.5 * 2^23 rounds to an integer in the low bits; 127 more makes those bits the exponent's
  const float shifter = 12582912.0f + 127.0f;
  const Floats shifted = x + shifter;
  const Floats fraction = x - (shifted - shifter);
  Floats result = broadcast(0.000155946770151f);
  result = result * fraction + 0.00134066438475f;
  result = result * fraction + 0.00961769297614f;
  result = result * fraction + 0.0555031055121f;
  result = result * fraction + 0.240226527829f;
  result = result * fraction + 0.693147214968f;
  result = result * fraction + 1.0f;
  const Floats power = bit_cast<Floats>(bit_cast<Ints>(shifted) << 23);
  const Ints vanishes = x < -126.0f;
  return bit_cast<Floats>(bit_cast<Ints>(result * power) & ~vanishes);
}

GISTKERN_NAMESPACE_END
