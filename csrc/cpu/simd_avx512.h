// Vector operations for AVX-512 F, BW, DQ, VL; the set is described in simd_scalar.h.
#pragma once

#include <immintrin.h>

#include <cstdint>

namespace gradstat::GRADSTAT_VARIANT {
namespace {

constexpr int kLanes = 16;

using U = __m512i;
using D = __m512d;
using U16Count = int64_t;
using U32Count = int64_t;
using F64Count = int64_t;

inline U load_f32(const float* from) { return _mm512_loadu_si512(from); }
inline U load_f16(const uint16_t* from) {
  return _mm512_castps_si512(
      _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from))));
}
inline U load_bf16(const uint16_t* from) {
  const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
  return _mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16);
}
inline void store_f32(float* to, U u) { _mm512_storeu_si512(to, u); }
inline void store_f16(uint16_t* to, U u) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to),
                      _mm512_cvtps_ph(_mm512_castsi512_ps(u), _MM_FROUND_TO_NEAREST_INT));
}
inline void store_bf16(uint16_t* to, U u) {
  const U odd = _mm512_and_si512(_mm512_srli_epi32(u, 16), _mm512_set1_epi32(1));
  const U rounded = _mm512_add_epi32(u, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  const __mmask16 is_nan = _mm512_cmpgt_epu32_mask(
      _mm512_and_si512(u, _mm512_set1_epi32(0x7fffffff)), _mm512_set1_epi32(0x7f800000));
  const U quiet = _mm512_or_si512(u, _mm512_set1_epi32(0x400000));
  const U out = _mm512_srli_epi32(_mm512_mask_mov_epi32(rounded, is_nan, quiet), 16);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm512_cvtepi32_epi16(out));
}

inline U splat_u32(uint32_t v) { return _mm512_set1_epi32(static_cast<int>(v)); }
inline U splat_f32(float v) { return _mm512_castps_si512(_mm512_set1_ps(v)); }
inline U and_u32(U a, U b) { return _mm512_and_si512(a, b); }
inline U sub_u32(U a, U b) { return _mm512_sub_epi32(a, b); }
inline U max_u32(U a, U b) { return _mm512_max_epu32(a, b); }
inline U min_u32(U a, U b) { return _mm512_min_epu32(a, b); }
inline U keep_below_u32(U a, U magnitude, U bound) {
  return _mm512_maskz_mov_epi32(_mm512_cmplt_epu32_mask(magnitude, bound), a);
}
inline void count_equal(U32Count* count, U a, U b) {
  *count += _mm_popcnt_u32(_mm512_cmpeq_epi32_mask(a, b));
}
inline void count_above(U32Count* count, U a, U b) {
  *count += _mm_popcnt_u32(_mm512_cmpgt_epu32_mask(a, b));
}
inline int64_t total(int64_t count) { return count; }
inline uint32_t reduce_max_u32(U a) { return _mm512_reduce_max_epu32(a); }
inline uint32_t reduce_min_u32(U a) { return _mm512_reduce_min_epu32(a); }
inline U clamp_f32(U a, U low, U high) {
  // min and max return their second operand where one is NaN.
  const __m512 below = _mm512_min_ps(_mm512_castsi512_ps(high), _mm512_castsi512_ps(a));
  return _mm512_castps_si512(_mm512_max_ps(_mm512_castsi512_ps(low), below));
}

inline D low_f64(U a) { return _mm512_cvtps_pd(_mm256_castsi256_ps(_mm512_castsi512_si256(a))); }
inline D high_f64(U a) {
  return _mm512_cvtps_pd(_mm256_castsi256_ps(_mm512_extracti64x4_epi64(a, 1)));
}
inline U narrow_f64(D low, D high) {
  const __m256 low_f32 = _mm512_cvtpd_ps(low);
  const __m256 high_f32 = _mm512_cvtpd_ps(high);
  return _mm512_inserti64x4(_mm512_castsi256_si512(_mm256_castps_si256(low_f32)),
                            _mm256_castps_si256(high_f32), 1);
}

inline D load_f64(const double* from) { return _mm512_loadu_pd(from); }
inline void store_f64(double* to, D a) { _mm512_storeu_pd(to, a); }
inline D splat_f64(double v) { return _mm512_set1_pd(v); }
inline D abs_f64(D a) { return _mm512_abs_pd(a); }
inline D add_f64(D a, D b) { return _mm512_add_pd(a, b); }
inline D sub_f64(D a, D b) { return _mm512_sub_pd(a, b); }
inline D mul_f64(D a, D b) { return _mm512_mul_pd(a, b); }
inline D square_add_f64(D a, D sum) { return _mm512_fmadd_pd(a, a, sum); }
inline D max_f64(D a, D b) { return _mm512_max_pd(a, b); }
inline D min_f64(D a, D b) { return _mm512_min_pd(a, b); }
inline D clamp_f64(D a, D low, D high) { return _mm512_max_pd(low, _mm512_min_pd(high, a)); }
inline D infinity_where_zero(D a) {
  return _mm512_mask_mov_pd(a, _mm512_cmp_pd_mask(a, _mm512_setzero_pd(), _CMP_EQ_OQ),
                            _mm512_set1_pd(__builtin_huge_val()));
}
inline D zero_unless_finite(D a) {
  return _mm512_maskz_mov_pd(
      _mm512_cmp_pd_mask(_mm512_abs_pd(a), _mm512_set1_pd(__builtin_huge_val()), _CMP_LT_OQ), a);
}
inline void count_equal(F64Count* count, D a, D b) {
  *count += _mm_popcnt_u32(_mm512_cmp_pd_mask(a, b, _CMP_EQ_OQ));
}
inline void count_nan(F64Count* count, D a) {
  *count += _mm_popcnt_u32(_mm512_cmp_pd_mask(a, a, _CMP_UNORD_Q));
}
inline double reduce_add_f64(D a) { return _mm512_reduce_add_pd(a); }
inline double reduce_max_f64(D a) { return _mm512_reduce_max_pd(a); }
inline double reduce_min_f64(D a) { return _mm512_reduce_min_pd(a); }

inline uint32_t count_bytes(const uint8_t* from, int64_t vectors, uint8_t wanted) {
  const U all = _mm512_set1_epi8(static_cast<char>(wanted));
  uint64_t count = 0;
  for (int64_t v = 0; v < vectors; ++v) {
    count += static_cast<uint64_t>(
        _mm_popcnt_u64(_mm512_cmpeq_epi8_mask(_mm512_loadu_si512(from + 64 * v), all)));
  }
  return static_cast<uint32_t>(count);
}

inline U load_u16(const uint16_t* from) { return _mm512_loadu_si512(from); }
inline void split_bf16(U raw, U* first, U* second) {
  *first = _mm512_slli_epi32(raw, 16);
  *second = _mm512_and_si512(raw, _mm512_set1_epi32(static_cast<int>(0xffff0000u)));
}
inline void split_f16(U raw, U* first, U* second) {
  *first = _mm512_castps_si512(_mm512_cvtph_ps(_mm512_castsi512_si256(raw)));
  *second = _mm512_castps_si512(_mm512_cvtph_ps(_mm512_extracti64x4_epi64(raw, 1)));
}
inline U splat_u16(uint16_t v) { return _mm512_set1_epi16(static_cast<int16_t>(v)); }
inline U sub_u16(U a, U b) { return _mm512_sub_epi16(a, b); }
inline U max_u16(U a, U b) { return _mm512_max_epu16(a, b); }
inline U min_u16(U a, U b) { return _mm512_min_epu16(a, b); }
inline void count_zero_u16(U16Count* count, U a) {
  *count += _mm_popcnt_u32(_mm512_testn_epi16_mask(a, a));
}
inline uint16_t reduce_max_u16(U a) {
  const U odd = _mm512_srli_epi32(a, 16);
  return static_cast<uint16_t>(_mm512_reduce_max_epu32(
      _mm512_max_epu32(odd, _mm512_and_si512(a, _mm512_set1_epi32(0xffff)))));
}
inline uint16_t reduce_min_u16(U a) {
  const U odd = _mm512_srli_epi32(a, 16);
  return static_cast<uint16_t>(_mm512_reduce_min_epu32(
      _mm512_min_epu32(odd, _mm512_and_si512(a, _mm512_set1_epi32(0xffff)))));
}

// a ^ (b & c) is 0x78 in the table of ternary operations.
inline U order_u32(U a) {
  return _mm512_ternarylogic_epi32(a, _mm512_srai_epi32(a, 31), _mm512_set1_epi32(0x7fffffff),
                                   0x78);
}
inline U order_u16(U a) {
  return _mm512_ternarylogic_epi32(a, _mm512_srai_epi16(a, 15), _mm512_set1_epi16(0x7fff), 0x78);
}
using Hits64 = __mmask8;
using Hits32 = __mmask16;
using Hits16 = __mmask32;
using Hits8 = __mmask64;
inline Hits32 is_less_u32(U a, U b) { return _mm512_cmplt_epu32_mask(a, b); }
inline Hits16 is_less_u16(U a, U b) { return _mm512_cmplt_epu16_mask(a, b); }
inline Hits32 is_less_i32(U a, U b) { return _mm512_cmplt_epi32_mask(a, b); }
inline Hits16 is_less_i16(U a, U b) { return _mm512_cmplt_epi16_mask(a, b); }
inline Hits64 is_within_f64(D a, D low, D high) {
  return _mm512_mask_cmp_pd_mask(_mm512_cmp_pd_mask(low, a, _CMP_LE_OQ), a, high, _CMP_LE_OQ);
}
inline Hits32 join64(Hits64 first, Hits64 second) { return _mm512_kunpackb(second, first); }
inline Hits16 join32(Hits32 first, Hits32 second) { return _mm512_kunpackw(second, first); }
inline Hits8 join16(Hits16 first, Hits16 second) { return _mm512_kunpackd(second, first); }
inline U load_bytes(const uint8_t* from) { return _mm512_loadu_si512(from); }
inline void store_bytes(uint8_t* to, U bytes) { _mm512_storeu_si512(to, bytes); }
inline U add_hits(U bytes, Hits8 hits) {
  return _mm512_mask_add_epi8(bytes, hits, bytes, _mm512_set1_epi8(1));
}

inline U add_f32(U a, U b) {
  return _mm512_castps_si512(_mm512_add_ps(_mm512_castsi512_ps(a), _mm512_castsi512_ps(b)));
}
inline U square_add_f32(U a, U sum) {
  const __m512 value = _mm512_castsi512_ps(a);
  return _mm512_castps_si512(_mm512_fmadd_ps(value, value, _mm512_castsi512_ps(sum)));
}

#ifdef __AVX512BF16__
#define GRADSTAT_HAS_DOT_BF16
// sum + a[0] * b[0] + a[1] * b[1] of each 32-bit lane's bf16, in fp32; subnormals count as 0.
inline U dot_bf16(U sum, U a, U b) {
  return _mm512_castps_si512(_mm512_dpbf16_ps(
      _mm512_castsi512_ps(sum), reinterpret_cast<__m512bh>(a), reinterpret_cast<__m512bh>(b)));
}
#endif

inline void store_exponents(uint8_t* to, U u) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm512_cvtepi32_epi8(_mm512_srli_epi32(u, 23)));
}

}  // namespace
}  // namespace gradstat::GRADSTAT_VARIANT
