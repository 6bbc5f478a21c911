// Vector operations in plain C++: the reference that every other simd_*.h is tested against.
//
// Each simd_*.h gives the same set. U: kLanes fp32 values or their bits, or 2 * kLanes 16-bit ones.
// D: kLanes / 2 fp64 values. U16Count, U32Count, F64Count: how many lanes met a condition so far
// (at most 2^15 a lane).
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

namespace gradstat::scalar {
namespace {

constexpr int kLanes = 2;

struct U {
  uint32_t lane[2];
};
using D = double;
using U16Count = int64_t;
using U32Count = int64_t;
using F64Count = int64_t;

inline float as_float(uint32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}
inline uint32_t as_bits(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  return bits;
}

// IEEE half to single: exact, by moving the exponent and letting one multiplication normalise.
inline uint32_t half_to_bits(uint16_t half) {
  const uint32_t sign = static_cast<uint32_t>(half & 0x8000u) << 16;
  const uint32_t magnitude = static_cast<uint32_t>(half & 0x7fffu) << 13;
  if (magnitude >= 0x0f800000u) return sign | magnitude | 0x7f800000u;
  return sign | as_bits(as_float(magnitude) * 0x1p+112f);
}

// Single to half, to nearest even. Below the smallest normal half, adding 0.5f makes the adder
// round at the last bit of a subnormal half, 2^-24; above, half a last bit (less one, if even) is
// added.
inline uint16_t bits_to_half(uint32_t bits) {
  const uint16_t sign = static_cast<uint16_t>(bits >> 16 & 0x8000u);
  const uint32_t magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return sign | 0x7e00u;
  if (magnitude >= 0x477ff000u) return sign | 0x7c00u;  // 65520 and above round to infinity
  if (magnitude < 0x38800000u) {                        // below 2^-14: a subnormal half
    return sign | static_cast<uint16_t>(as_bits(as_float(magnitude) + 0.5f) - 0x3f000000u);
  }
  const uint32_t rounded = magnitude + 0xfffu + (magnitude >> 13 & 1u);
  return sign | static_cast<uint16_t>((rounded - 0x38000000u) >> 13);
}

inline uint16_t bits_to_bf16(uint32_t bits) {
  if ((bits & 0x7fffffffu) > 0x7f800000u) return static_cast<uint16_t>(bits >> 16 | 0x40u);
  return static_cast<uint16_t>((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
}

inline U load_f32(const float* from) {
  U u;
  memcpy(&u, from, sizeof u);
  return u;
}
inline U load_f16(const uint16_t* from) { return {{half_to_bits(from[0]), half_to_bits(from[1])}}; }
inline U load_bf16(const uint16_t* from) {
  return {{static_cast<uint32_t>(from[0]) << 16, static_cast<uint32_t>(from[1]) << 16}};
}
inline void store_f32(float* to, U u) { memcpy(to, &u, sizeof u); }
inline void store_f16(uint16_t* to, U u) {
  for (int i = 0; i < 2; ++i) to[i] = bits_to_half(u.lane[i]);
}
inline void store_bf16(uint16_t* to, U u) {
  for (int i = 0; i < 2; ++i) to[i] = bits_to_bf16(u.lane[i]);
}

inline U splat_u32(uint32_t v) { return {{v, v}}; }
inline U splat_f32(float v) { return splat_u32(as_bits(v)); }
inline U and_u32(U a, U b) { return {{a.lane[0] & b.lane[0], a.lane[1] & b.lane[1]}}; }
inline U sub_u32(U a, U b) { return {{a.lane[0] - b.lane[0], a.lane[1] - b.lane[1]}}; }
inline uint32_t larger(uint32_t a, uint32_t b) { return a > b ? a : b; }
inline U max_u32(U a, U b) {
  return {{larger(a.lane[0], b.lane[0]), larger(a.lane[1], b.lane[1])}};
}
inline uint32_t smaller(uint32_t a, uint32_t b) { return a < b ? a : b; }
inline U min_u32(U a, U b) {
  return {{smaller(a.lane[0], b.lane[0]), smaller(a.lane[1], b.lane[1])}};
}
// `a` where magnitude < bound, else 0.
inline U keep_below_u32(U a, U magnitude, U bound) {
  for (int i = 0; i < 2; ++i) a.lane[i] = magnitude.lane[i] < bound.lane[i] ? a.lane[i] : 0;
  return a;
}
inline void count_equal(U32Count* count, U a, U b) {
  for (int i = 0; i < 2; ++i) *count += a.lane[i] == b.lane[i];
}
inline void count_above(U32Count* count, U a, U b) {
  for (int i = 0; i < 2; ++i) *count += a.lane[i] > b.lane[i];
}
inline int64_t total(U32Count count) { return count; }
inline uint32_t reduce_max_u32(U a) { return larger(a.lane[0], a.lane[1]); }
inline uint32_t reduce_min_u32(U a) { return smaller(a.lane[0], a.lane[1]); }
// Clamps to [low, high]; NaN stays.
inline U clamp_f32(U a, U low, U high) {
  for (int i = 0; i < 2; ++i) {
    const float value = as_float(a.lane[i]);
    if (value < as_float(low.lane[i])) a.lane[i] = low.lane[i];
    if (value > as_float(high.lane[i])) a.lane[i] = high.lane[i];
  }
  return a;
}

inline D low_f64(U a) { return as_float(a.lane[0]); }
inline D high_f64(U a) { return as_float(a.lane[1]); }
inline U narrow_f64(D low, D high) {
  return {{as_bits(static_cast<float>(low)), as_bits(static_cast<float>(high))}};
}

inline D load_f64(const double* from) { return *from; }
inline void store_f64(double* to, D a) { *to = a; }
inline D splat_f64(double v) { return v; }
inline D abs_f64(D a) { return fabs(a); }
inline D add_f64(D a, D b) { return a + b; }
inline D sub_f64(D a, D b) { return a - b; }
inline D mul_f64(D a, D b) { return a * b; }
inline D square_add_f64(D a, D sum) { return sum + a * a; }
inline D max_f64(D a, D b) { return a > b ? a : b; }
inline D min_f64(D a, D b) { return a < b ? a : b; }
inline D clamp_f64(D a, D low, D high) { return a < low ? low : a > high ? high : a; }
inline D infinity_where_zero(D a) { return a == 0 ? HUGE_VAL : a; }
inline D zero_unless_finite(D a) { return fabs(a) < HUGE_VAL ? a : 0; }
inline void count_equal(F64Count* count, D a, D b) { *count += a == b; }
inline void count_nan(F64Count* count, D a) { *count += a != a; }
inline double reduce_add_f64(D a) { return a; }
inline double reduce_max_f64(D a) { return a; }
inline double reduce_min_f64(D a) { return a; }

// How many of 64 * vectors bytes equal `wanted`.
inline uint32_t count_bytes(const uint8_t* from, int64_t vectors, uint8_t wanted) {
  uint32_t count = 0;
  for (int64_t i = 0; i < 64 * vectors; ++i) count += from[i] == wanted;
  return count;
}

// The same register as 2 * kLanes values of 16 bits.
struct Halves {
  uint16_t lane[4];
};
inline Halves halves(U u) {
  Halves h;
  memcpy(&h, &u, sizeof h);
  return h;
}
inline U from_halves(Halves h) {
  U u;
  memcpy(&u, &h, sizeof u);
  return u;
}
inline U load_u16(const uint16_t* from) {
  U u;
  memcpy(&u, from, sizeof u);
  return u;
}
// The values as fp32, in any order.
inline void split_bf16(U raw, U* first, U* second) {
  const Halves h = halves(raw);
  *first = load_bf16(h.lane);
  *second = load_bf16(h.lane + 2);
}
inline void split_f16(U raw, U* first, U* second) {
  const Halves h = halves(raw);
  *first = load_f16(h.lane);
  *second = load_f16(h.lane + 2);
}
inline U splat_u16(uint16_t v) { return from_halves({{v, v, v, v}}); }
inline U sub_u16(U a, U b) {
  Halves x = halves(a), y = halves(b);
  for (int i = 0; i < 4; ++i) x.lane[i] = static_cast<uint16_t>(x.lane[i] - y.lane[i]);
  return from_halves(x);
}
inline U max_u16(U a, U b) {
  Halves x = halves(a), y = halves(b);
  for (int i = 0; i < 4; ++i) x.lane[i] = x.lane[i] > y.lane[i] ? x.lane[i] : y.lane[i];
  return from_halves(x);
}
inline U min_u16(U a, U b) {
  Halves x = halves(a), y = halves(b);
  for (int i = 0; i < 4; ++i) x.lane[i] = x.lane[i] < y.lane[i] ? x.lane[i] : y.lane[i];
  return from_halves(x);
}
inline void count_zero_u16(U16Count* count, U a) {
  const Halves h = halves(a);
  for (int i = 0; i < 4; ++i) *count += h.lane[i] == 0;
}
inline uint16_t reduce_max_u16(U a) {
  const Halves h = halves(a);
  uint16_t result = h.lane[0];
  for (int i = 1; i < 4; ++i) result = h.lane[i] > result ? h.lane[i] : result;
  return result;
}
inline uint16_t reduce_min_u16(U a) {
  const Halves h = halves(a);
  uint16_t result = h.lane[0];
  for (int i = 1; i < 4; ++i) result = h.lane[i] < result ? h.lane[i] : result;
  return result;
}

// The bits of values as integers in the order of the values: the magnitude of negative ones is
// inverted.
inline U order_u32(U a) {
  for (int i = 0; i < 2; ++i) a.lane[i] ^= a.lane[i] >> 31 != 0 ? 0x7fffffffu : 0;
  return a;
}
inline U order_u16(U a) {
  Halves h = halves(a);
  for (int i = 0; i < 4; ++i) h.lane[i] ^= h.lane[i] >> 15 != 0 ? 0x7fff : 0;
  return from_halves(h);
}
// Which elements of a register meet a condition, by their width in bits; here a bit each. Two of
// them join to one of as many elements of half the width, first to last.
using Hits64 = unsigned;
using Hits32 = unsigned;
using Hits16 = unsigned;
using Hits8 = unsigned;
// a < b, both without a sign.
inline Hits32 is_less_u32(U a, U b) {
  return (a.lane[0] < b.lane[0] ? 1u : 0u) | (a.lane[1] < b.lane[1] ? 2u : 0u);
}
inline Hits16 is_less_u16(U a, U b) {
  const Halves x = halves(a), y = halves(b);
  Hits16 hits = 0;
  for (int i = 0; i < 4; ++i) hits |= static_cast<unsigned>(x.lane[i] < y.lane[i]) << i;
  return hits;
}
// The same with a sign.
inline U flip_signs(U a, uint32_t signs) { return {{a.lane[0] ^ signs, a.lane[1] ^ signs}}; }
inline Hits32 is_less_i32(U a, U b) {
  return is_less_u32(flip_signs(a, 0x80000000u), flip_signs(b, 0x80000000u));
}
inline Hits16 is_less_i16(U a, U b) {
  return is_less_u16(flip_signs(a, 0x80008000u), flip_signs(b, 0x80008000u));
}
// low <= a <= high.
inline Hits64 is_within_f64(D a, D low, D high) { return low <= a && a <= high ? 1 : 0; }
inline Hits32 join64(Hits64 first, Hits64 second) { return first | second << 1; }
inline Hits16 join32(Hits32 first, Hits32 second) { return first | second << 2; }
inline Hits8 join16(Hits16 first, Hits16 second) { return first | second << 4; }
// The same register as 4 * kLanes bytes.
inline U load_bytes(const uint8_t* from) {
  U u;
  memcpy(&u, from, sizeof u);
  return u;
}
inline void store_bytes(uint8_t* to, U bytes) { memcpy(to, &bytes, sizeof bytes); }
// 1 more in each byte that is hit.
inline U add_hits(U bytes, Hits8 hits) {
  uint8_t count[8];
  store_bytes(count, bytes);
  for (int i = 0; i < 8; ++i) count[i] = static_cast<uint8_t>(count[i] + (hits >> i & 1u));
  return load_bytes(count);
}

inline U add_f32(U a, U b) {
  for (int i = 0; i < 2; ++i) a.lane[i] = as_bits(as_float(a.lane[i]) + as_float(b.lane[i]));
  return a;
}
inline U square_add_f32(U a, U sum) {
  for (int i = 0; i < 2; ++i) {
    const float value = as_float(a.lane[i]);
    sum.lane[i] = as_bits(as_float(sum.lane[i]) + value * value);
  }
  return sum;
}

// The byte exponents of kLanes fp32 values, in order.
inline void store_exponents(uint8_t* to, U u) {
  for (int i = 0; i < 2; ++i) to[i] = static_cast<uint8_t>(u.lane[i] >> 23);
}

}  // namespace
}  // namespace gradstat::scalar
