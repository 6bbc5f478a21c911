// Vector operations for AVX2, FMA and F16C; the set is described in simd_scalar.h.
#pragma once

#include <immintrin.h>

#include <cstdint>

namespace gradstat::avx2 {
namespace {

constexpr int kLanes = 8;

using U = __m256i;
using D = __m256d;
// Minus the number of hits, lane by lane.
struct U16Count {
  __m256i negative = _mm256_setzero_si256();
};
struct U32Count {
  __m256i negative = _mm256_setzero_si256();
};
struct F64Count {
  __m256i negative = _mm256_setzero_si256();
};

inline U load_u32(const void* from) {
  return _mm256_loadu_si256(static_cast<const __m256i*>(from));
}
inline U load_f32(const float* from) { return load_u32(from); }
inline U load_f16(const uint16_t* from) {
  return _mm256_castps_si256(
      _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from))));
}
inline U load_bf16(const uint16_t* from) {
  const __m128i half = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
  return _mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16);
}
inline void store_f32(float* to, U u) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), u); }
inline void store_f16(uint16_t* to, U u) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to),
                   _mm256_cvtps_ph(_mm256_castsi256_ps(u), _MM_FROUND_TO_NEAREST_INT));
}
inline void store_bf16(uint16_t* to, U u) {
  const U odd = _mm256_and_si256(_mm256_srli_epi32(u, 16), _mm256_set1_epi32(1));
  const U rounded = _mm256_add_epi32(u, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
  const U is_nan = _mm256_cmpgt_epi32(_mm256_and_si256(u, _mm256_set1_epi32(0x7fffffff)),
                                      _mm256_set1_epi32(0x7f800000));
  const U quiet = _mm256_or_si256(u, _mm256_set1_epi32(0x400000));
  const U out = _mm256_srli_epi32(_mm256_blendv_epi8(rounded, quiet, is_nan), 16);
  const U packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(out, out), 0x08);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm256_castsi256_si128(packed));
}

inline U splat_u32(uint32_t v) { return _mm256_set1_epi32(static_cast<int>(v)); }
inline U splat_f32(float v) { return _mm256_castps_si256(_mm256_set1_ps(v)); }
inline U and_u32(U a, U b) { return _mm256_and_si256(a, b); }
inline U sub_u32(U a, U b) { return _mm256_sub_epi32(a, b); }
inline U max_u32(U a, U b) { return _mm256_max_epu32(a, b); }
inline U min_u32(U a, U b) { return _mm256_min_epu32(a, b); }
// The compares are signed: magnitudes have their sign bit clear.
inline U keep_below_u32(U a, U magnitude, U bound) {
  return _mm256_and_si256(a, _mm256_cmpgt_epi32(bound, magnitude));
}
inline void count_equal(U32Count* count, U a, U b) {
  count->negative = _mm256_add_epi32(count->negative, _mm256_cmpeq_epi32(a, b));
}
inline void count_above(U32Count* count, U a, U b) {
  count->negative = _mm256_add_epi32(count->negative, _mm256_cmpgt_epi32(a, b));
}
inline int64_t total(const U32Count& count) {
  alignas(32) int32_t lane[8];
  _mm256_store_si256(reinterpret_cast<__m256i*>(lane), count.negative);
  int64_t sum = 0;
  for (int i = 0; i < 8; ++i) sum -= lane[i];
  return sum;
}
inline uint32_t reduce_max_u32(U a) {
  alignas(32) uint32_t lane[8];
  _mm256_store_si256(reinterpret_cast<__m256i*>(lane), a);
  uint32_t result = lane[0];
  for (int i = 1; i < 8; ++i) result = lane[i] > result ? lane[i] : result;
  return result;
}
inline uint32_t reduce_min_u32(U a) {
  alignas(32) uint32_t lane[8];
  _mm256_store_si256(reinterpret_cast<__m256i*>(lane), a);
  uint32_t result = lane[0];
  for (int i = 1; i < 8; ++i) result = lane[i] < result ? lane[i] : result;
  return result;
}
inline U clamp_f32(U a, U low, U high) {
  // min and max return their second operand where one is NaN.
  const __m256 below = _mm256_min_ps(_mm256_castsi256_ps(high), _mm256_castsi256_ps(a));
  return _mm256_castps_si256(_mm256_max_ps(_mm256_castsi256_ps(low), below));
}

inline D low_f64(U a) { return _mm256_cvtps_pd(_mm_castsi128_ps(_mm256_castsi256_si128(a))); }
inline D high_f64(U a) { return _mm256_cvtps_pd(_mm_castsi128_ps(_mm256_extracti128_si256(a, 1))); }
inline U narrow_f64(D low, D high) {
  return _mm256_castps_si256(_mm256_set_m128(_mm256_cvtpd_ps(high), _mm256_cvtpd_ps(low)));
}

inline D load_f64(const double* from) { return _mm256_loadu_pd(from); }
inline void store_f64(double* to, D a) { _mm256_storeu_pd(to, a); }
inline D splat_f64(double v) { return _mm256_set1_pd(v); }
inline D abs_f64(D a) { return _mm256_andnot_pd(_mm256_set1_pd(-0.0), a); }
inline D add_f64(D a, D b) { return _mm256_add_pd(a, b); }
inline D sub_f64(D a, D b) { return _mm256_sub_pd(a, b); }
inline D mul_f64(D a, D b) { return _mm256_mul_pd(a, b); }
inline D square_add_f64(D a, D sum) { return _mm256_fmadd_pd(a, a, sum); }
inline D max_f64(D a, D b) { return _mm256_max_pd(a, b); }
inline D min_f64(D a, D b) { return _mm256_min_pd(a, b); }
inline D clamp_f64(D a, D low, D high) { return _mm256_max_pd(low, _mm256_min_pd(high, a)); }
inline D infinity_where_zero(D a) {
  return _mm256_blendv_pd(a, _mm256_set1_pd(__builtin_huge_val()),
                          _mm256_cmp_pd(a, _mm256_setzero_pd(), _CMP_EQ_OQ));
}
inline D zero_unless_finite(D a) {
  return _mm256_and_pd(a,
                       _mm256_cmp_pd(abs_f64(a), _mm256_set1_pd(__builtin_huge_val()), _CMP_LT_OQ));
}
inline void count_mask(F64Count* count, D mask) {
  count->negative = _mm256_add_epi64(count->negative, _mm256_castpd_si256(mask));
}
inline void count_equal(F64Count* count, D a, D b) {
  count_mask(count, _mm256_cmp_pd(a, b, _CMP_EQ_OQ));
}
inline void count_nan(F64Count* count, D a) {
  count_mask(count, _mm256_cmp_pd(a, a, _CMP_UNORD_Q));
}
inline int64_t total(const F64Count& count) {
  alignas(32) int64_t lane[4];
  _mm256_store_si256(reinterpret_cast<__m256i*>(lane), count.negative);
  return -(lane[0] + lane[1] + lane[2] + lane[3]);
}
inline double reduce_add_f64(D a) {
  alignas(32) double lane[4];
  _mm256_store_pd(lane, a);
  return (lane[0] + lane[1]) + (lane[2] + lane[3]);
}
inline double reduce_max_f64(D a) {
  alignas(32) double lane[4];
  _mm256_store_pd(lane, a);
  double result = lane[0];
  for (int i = 1; i < 4; ++i) result = lane[i] > result ? lane[i] : result;
  return result;
}
inline double reduce_min_f64(D a) {
  alignas(32) double lane[4];
  _mm256_store_pd(lane, a);
  double result = lane[0];
  for (int i = 1; i < 4; ++i) result = lane[i] < result ? lane[i] : result;
  return result;
}

inline uint32_t count_bytes(const uint8_t* from, int64_t vectors, uint8_t wanted) {
  const U all = _mm256_set1_epi8(static_cast<char>(wanted));
  U count[2] = {_mm256_setzero_si256(), _mm256_setzero_si256()};  // at most 64 a byte
  for (int64_t v = 0; v < vectors; ++v) {
    count[0] = _mm256_sub_epi8(count[0], _mm256_cmpeq_epi8(load_u32(from + 64 * v), all));
    count[1] = _mm256_sub_epi8(count[1], _mm256_cmpeq_epi8(load_u32(from + 64 * v + 32), all));
  }
  const U sums = _mm256_sad_epu8(_mm256_add_epi8(count[0], count[1]), _mm256_setzero_si256());
  alignas(32) uint64_t lane[4];
  _mm256_store_si256(reinterpret_cast<__m256i*>(lane), sums);
  return static_cast<uint32_t>(lane[0] + lane[1] + lane[2] + lane[3]);
}

inline U load_u16(const uint16_t* from) { return load_u32(from); }
inline void split_bf16(U raw, U* first, U* second) {
  *first = _mm256_slli_epi32(raw, 16);
  *second = _mm256_and_si256(raw, _mm256_set1_epi32(static_cast<int>(0xffff0000u)));
}
inline void split_f16(U raw, U* first, U* second) {
  *first = _mm256_castps_si256(_mm256_cvtph_ps(_mm256_castsi256_si128(raw)));
  *second = _mm256_castps_si256(_mm256_cvtph_ps(_mm256_extracti128_si256(raw, 1)));
}
inline U splat_u16(uint16_t v) { return _mm256_set1_epi16(static_cast<int16_t>(v)); }
inline U sub_u16(U a, U b) { return _mm256_sub_epi16(a, b); }
inline U max_u16(U a, U b) { return _mm256_max_epu16(a, b); }
inline U min_u16(U a, U b) { return _mm256_min_epu16(a, b); }
inline void count_zero_u16(U16Count* count, U a) {
  count->negative =
      _mm256_add_epi16(count->negative, _mm256_cmpeq_epi16(a, _mm256_setzero_si256()));
}
inline int64_t total(const U16Count& count) {
  alignas(32) int16_t lane[16];
  _mm256_store_si256(reinterpret_cast<__m256i*>(lane), count.negative);
  int64_t sum = 0;
  for (int i = 0; i < 16; ++i) sum -= lane[i];
  return sum;
}
inline uint16_t reduce_max_u16(U a) {
  alignas(32) uint16_t lane[16];
  _mm256_store_si256(reinterpret_cast<__m256i*>(lane), a);
  uint16_t result = lane[0];
  for (int i = 1; i < 16; ++i) result = lane[i] > result ? lane[i] : result;
  return result;
}
inline uint16_t reduce_min_u16(U a) {
  alignas(32) uint16_t lane[16];
  _mm256_store_si256(reinterpret_cast<__m256i*>(lane), a);
  uint16_t result = lane[0];
  for (int i = 1; i < 16; ++i) result = lane[i] < result ? lane[i] : result;
  return result;
}

inline U order_u32(U a) {
  return _mm256_xor_si256(a, _mm256_srli_epi32(_mm256_srai_epi32(a, 31), 1));
}
inline U order_u16(U a) {
  return _mm256_xor_si256(a, _mm256_srli_epi16(_mm256_srai_epi16(a, 15), 1));
}
// All bits of a lane. Packing works within halves of 128 bits: a permutation restores the order.
using Hits64 = D;
using Hits32 = U;
using Hits16 = U;
using Hits8 = U;
// Less without a sign is less with the top bits flipped.
inline Hits32 is_less_u32(U a, U b) {
  const U top = _mm256_set1_epi32(INT32_MIN);
  return _mm256_cmpgt_epi32(_mm256_xor_si256(b, top), _mm256_xor_si256(a, top));
}
inline Hits16 is_less_u16(U a, U b) {
  const U top = _mm256_set1_epi16(INT16_MIN);
  return _mm256_cmpgt_epi16(_mm256_xor_si256(b, top), _mm256_xor_si256(a, top));
}
inline Hits32 is_less_i32(U a, U b) { return _mm256_cmpgt_epi32(b, a); }
inline Hits16 is_less_i16(U a, U b) { return _mm256_cmpgt_epi16(b, a); }
inline Hits64 is_within_f64(D a, D low, D high) {
  return _mm256_and_pd(_mm256_cmp_pd(low, a, _CMP_LE_OQ), _mm256_cmp_pd(a, high, _CMP_LE_OQ));
}
inline U in_order(U packed) { return _mm256_permute4x64_epi64(packed, 0xd8); }
inline Hits32 join64(Hits64 first, Hits64 second) {
  return in_order(_mm256_castps_si256(
      _mm256_shuffle_ps(_mm256_castpd_ps(first), _mm256_castpd_ps(second), 0x88)));
}
inline Hits16 join32(Hits32 first, Hits32 second) {
  return in_order(_mm256_packs_epi32(first, second));
}
inline Hits8 join16(Hits16 first, Hits16 second) {
  return in_order(_mm256_packs_epi16(first, second));
}
inline U load_bytes(const uint8_t* from) { return load_u32(from); }
inline void store_bytes(uint8_t* to, U bytes) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), bytes);
}
inline U add_hits(U bytes, Hits8 hits) { return _mm256_sub_epi8(bytes, hits); }

inline U add_f32(U a, U b) {
  return _mm256_castps_si256(_mm256_add_ps(_mm256_castsi256_ps(a), _mm256_castsi256_ps(b)));
}
inline U square_add_f32(U a, U sum) {
  const __m256 value = _mm256_castsi256_ps(a);
  return _mm256_castps_si256(_mm256_fmadd_ps(value, value, _mm256_castsi256_ps(sum)));
}

inline void store_exponents(uint8_t* to, U u) {
  const U exponents = _mm256_and_si256(_mm256_srli_epi32(u, 23), _mm256_set1_epi32(0xff));
  const __m128i words =
      _mm_packus_epi32(_mm256_castsi256_si128(exponents), _mm256_extracti128_si256(exponents, 1));
  _mm_storel_epi64(reinterpret_cast<__m128i*>(to), _mm_packus_epi16(words, words));
}

}  // namespace
}  // namespace gradstat::avx2
