// Vector operations for 64-bit Arm (Advanced SIMD); the set is described in simd_scalar.h.
#pragma once

#include <arm_neon.h>

#include <cstdint>

namespace gradstat::neon {
namespace {

constexpr int kLanes = 4;

using U = uint32x4_t;
using D = float64x2_t;
struct U16Count {
  uint16x8_t negative = vdupq_n_u16(0);
};
struct U32Count {
  uint32x4_t negative = vdupq_n_u32(0);
};
struct F64Count {
  uint64x2_t negative = vdupq_n_u64(0);
};

inline U load_f32(const float* from) { return vreinterpretq_u32_f32(vld1q_f32(from)); }
inline U load_f16(const uint16_t* from) {
  return vreinterpretq_u32_f32(vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(from))));
}
inline U load_bf16(const uint16_t* from) { return vshll_n_u16(vld1_u16(from), 16); }
inline void store_f32(float* to, U u) { vst1q_f32(to, vreinterpretq_f32_u32(u)); }
inline void store_f16(uint16_t* to, U u) {
  vst1_u16(to, vreinterpret_u16_f16(vcvt_f16_f32(vreinterpretq_f32_u32(u))));
}
inline void store_bf16(uint16_t* to, U u) {
  const U odd = vandq_u32(vshrq_n_u32(u, 16), vdupq_n_u32(1));
  const U rounded = vaddq_u32(u, vaddq_u32(odd, vdupq_n_u32(0x7fff)));
  const U is_nan = vcgtq_u32(vandq_u32(u, vdupq_n_u32(0x7fffffffu)), vdupq_n_u32(0x7f800000u));
  const U quiet = vorrq_u32(u, vdupq_n_u32(0x400000));
  vst1_u16(to, vshrn_n_u32(vbslq_u32(is_nan, quiet, rounded), 16));
}

inline U splat_u32(uint32_t v) { return vdupq_n_u32(v); }
inline U splat_f32(float v) { return vreinterpretq_u32_f32(vdupq_n_f32(v)); }
inline U and_u32(U a, U b) { return vandq_u32(a, b); }
inline U sub_u32(U a, U b) { return vsubq_u32(a, b); }
inline U max_u32(U a, U b) { return vmaxq_u32(a, b); }
inline U min_u32(U a, U b) { return vminq_u32(a, b); }
inline U keep_below_u32(U a, U magnitude, U bound) {
  return vandq_u32(a, vcltq_u32(magnitude, bound));
}
inline void count_equal(U32Count* count, U a, U b) {
  count->negative = vaddq_u32(count->negative, vceqq_u32(a, b));
}
inline void count_above(U32Count* count, U a, U b) {
  count->negative = vaddq_u32(count->negative, vcgtq_u32(a, b));
}
inline int64_t total(const U32Count& count) {
  return -vaddlvq_s32(vreinterpretq_s32_u32(count.negative));
}
inline uint32_t reduce_max_u32(U a) { return vmaxvq_u32(a); }
inline uint32_t reduce_min_u32(U a) { return vminvq_u32(a); }
// vmin and vmax return NaN where an operand is NaN.
inline U clamp_f32(U a, U low, U high) {
  const float32x4_t below = vminq_f32(vreinterpretq_f32_u32(a), vreinterpretq_f32_u32(high));
  return vreinterpretq_u32_f32(vmaxq_f32(below, vreinterpretq_f32_u32(low)));
}

inline D low_f64(U a) { return vcvt_f64_f32(vget_low_f32(vreinterpretq_f32_u32(a))); }
inline D high_f64(U a) { return vcvt_high_f64_f32(vreinterpretq_f32_u32(a)); }
inline U narrow_f64(D low, D high) {
  return vreinterpretq_u32_f32(vcvt_high_f32_f64(vcvt_f32_f64(low), high));
}

inline D load_f64(const double* from) { return vld1q_f64(from); }
inline void store_f64(double* to, D a) { vst1q_f64(to, a); }
inline D splat_f64(double v) { return vdupq_n_f64(v); }
inline D abs_f64(D a) { return vabsq_f64(a); }
inline D add_f64(D a, D b) { return vaddq_f64(a, b); }
inline D sub_f64(D a, D b) { return vsubq_f64(a, b); }
inline D mul_f64(D a, D b) { return vmulq_f64(a, b); }
inline D square_add_f64(D a, D sum) { return vfmaq_f64(sum, a, a); }
inline D max_f64(D a, D b) { return vmaxq_f64(a, b); }
inline D min_f64(D a, D b) { return vminq_f64(a, b); }
inline D clamp_f64(D a, D low, D high) { return vmaxq_f64(low, vminq_f64(high, a)); }
inline D infinity_where_zero(D a) {
  return vbslq_f64(vceqzq_f64(a), vdupq_n_f64(__builtin_huge_val()), a);
}
inline D zero_unless_finite(D a) {
  const uint64x2_t finite = vcltq_f64(vabsq_f64(a), vdupq_n_f64(__builtin_huge_val()));
  return vreinterpretq_f64_u64(vandq_u64(vreinterpretq_u64_f64(a), finite));
}
inline void count_equal(F64Count* count, D a, D b) {
  count->negative = vaddq_u64(count->negative, vceqq_f64(a, b));
}
inline void count_nan(F64Count* count, D a) {
  const uint64x2_t number = vceqq_f64(a, a);
  count->negative =
      vaddq_u64(count->negative, vreinterpretq_u64_u32(vmvnq_u32(vreinterpretq_u32_u64(number))));
}
inline int64_t total(const F64Count& count) {
  return -static_cast<int64_t>(vaddvq_u64(count.negative));
}
inline double reduce_add_f64(D a) { return vaddvq_f64(a); }
inline double reduce_max_f64(D a) { return vmaxvq_f64(a); }
inline double reduce_min_f64(D a) { return vminvq_f64(a); }

inline uint32_t count_bytes(const uint8_t* from, int64_t vectors, uint8_t wanted) {
  const uint8x16_t all = vdupq_n_u8(wanted);
  uint32_t total_count = 0;
  for (int64_t v = 0; v < vectors; ++v) {
    uint8x16_t count = vdupq_n_u8(0);
    for (int part = 0; part < 4; ++part) {
      count = vsubq_u8(count, vceqq_u8(vld1q_u8(from + 64 * v + 16 * part), all));
    }
    total_count += vaddvq_u8(count);
  }
  return total_count;
}

inline U load_u16(const uint16_t* from) { return vreinterpretq_u32_u16(vld1q_u16(from)); }
inline void split_bf16(U raw, U* first, U* second) {
  *first = vshlq_n_u32(raw, 16);
  *second = vandq_u32(raw, vdupq_n_u32(0xffff0000u));
}
inline void split_f16(U raw, U* first, U* second) {
  const float16x8_t values = vreinterpretq_f16_u32(raw);
  *first = vreinterpretq_u32_f32(vcvt_f32_f16(vget_low_f16(values)));
  *second = vreinterpretq_u32_f32(vcvt_high_f32_f16(values));
}
inline uint16x8_t as_u16(U a) { return vreinterpretq_u16_u32(a); }
inline U splat_u16(uint16_t v) { return vreinterpretq_u32_u16(vdupq_n_u16(v)); }
inline U sub_u16(U a, U b) { return vreinterpretq_u32_u16(vsubq_u16(as_u16(a), as_u16(b))); }
inline U max_u16(U a, U b) { return vreinterpretq_u32_u16(vmaxq_u16(as_u16(a), as_u16(b))); }
inline U min_u16(U a, U b) { return vreinterpretq_u32_u16(vminq_u16(as_u16(a), as_u16(b))); }
inline void count_zero_u16(U16Count* count, U a) {
  count->negative = vaddq_u16(count->negative, vceqzq_u16(as_u16(a)));
}
inline int64_t total(const U16Count& count) {
  return -vaddlvq_s16(vreinterpretq_s16_u16(count.negative));
}
inline uint16_t reduce_max_u16(U a) { return vmaxvq_u16(as_u16(a)); }
inline uint16_t reduce_min_u16(U a) { return vminvq_u16(as_u16(a)); }

inline U order_u32(U a) {
  const U negative = vreinterpretq_u32_s32(vshrq_n_s32(vreinterpretq_s32_u32(a), 31));
  return veorq_u32(a, vshrq_n_u32(negative, 1));
}
inline U order_u16(U a) {
  const uint16x8_t negative =
      vreinterpretq_u16_s16(vshrq_n_s16(vreinterpretq_s16_u16(as_u16(a)), 15));
  return veorq_u32(a, vreinterpretq_u32_u16(vshrq_n_u16(negative, 1)));
}
using Hits64 = uint64x2_t;
using Hits32 = uint32x4_t;
using Hits16 = uint16x8_t;
using Hits8 = uint8x16_t;
inline Hits32 is_less_u32(U a, U b) { return vcltq_u32(a, b); }
inline Hits16 is_less_u16(U a, U b) { return vcltq_u16(as_u16(a), as_u16(b)); }
inline Hits32 is_less_i32(U a, U b) {
  return vcltq_s32(vreinterpretq_s32_u32(a), vreinterpretq_s32_u32(b));
}
inline Hits16 is_less_i16(U a, U b) {
  return vcltq_s16(vreinterpretq_s16_u32(a), vreinterpretq_s16_u32(b));
}
inline Hits64 is_within_f64(D a, D low, D high) {
  return vandq_u64(vcleq_f64(low, a), vcleq_f64(a, high));
}
inline Hits32 join64(Hits64 first, Hits64 second) {
  return vcombine_u32(vmovn_u64(first), vmovn_u64(second));
}
inline Hits16 join32(Hits32 first, Hits32 second) {
  return vcombine_u16(vmovn_u32(first), vmovn_u32(second));
}
inline Hits8 join16(Hits16 first, Hits16 second) {
  return vcombine_u8(vmovn_u16(first), vmovn_u16(second));
}
inline U load_bytes(const uint8_t* from) { return vreinterpretq_u32_u8(vld1q_u8(from)); }
inline void store_bytes(uint8_t* to, U bytes) { vst1q_u8(to, vreinterpretq_u8_u32(bytes)); }
inline U add_hits(U bytes, Hits8 hits) {
  return vreinterpretq_u32_u8(vsubq_u8(vreinterpretq_u8_u32(bytes), hits));
}

inline U add_f32(U a, U b) {
  return vreinterpretq_u32_f32(vaddq_f32(vreinterpretq_f32_u32(a), vreinterpretq_f32_u32(b)));
}
inline U square_add_f32(U a, U sum) {
  const float32x4_t value = vreinterpretq_f32_u32(a);
  return vreinterpretq_u32_f32(vfmaq_f32(vreinterpretq_f32_u32(sum), value, value));
}

inline void store_exponents(uint8_t* to, U u) {
  const uint16x4_t words = vmovn_u32(vshrq_n_u32(vshlq_n_u32(u, 1), 24));
  const uint8x8_t bytes = vmovn_u16(vcombine_u16(words, words));
  const uint32_t four = vget_lane_u32(vreinterpret_u32_u8(bytes), 0);
  __builtin_memcpy(to, &four, sizeof four);
}

}  // namespace
}  // namespace gradstat::neon
