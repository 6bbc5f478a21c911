// How each dtype is read and written: as bits of an fp32 (fp64 stays what it is).
#pragma once

#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

#include "../kernels.h"

namespace gradstat::cuda {

// Squares of 8 magnitudes sum without overflow below kGroupBelow, and what their squares lose to
// underflow cannot matter where the largest is at least kGroupFrom. Bits of fp32, as on the CPU.
constexpr uint32_t kGroupFrom = 0x24800000u;   // 2^-54
constexpr uint32_t kGroupBelow = 0x5d800000u;  // 2^60
constexpr uint32_t kMagnitudeMask = 0x7fffffffu;
constexpr uint32_t kInfinityBits = 0x7f800000u;

// Whether neighbours whose largest magnitude is this may be summed in fp32.
static __device__ __forceinline__ bool fits_groups(uint32_t max_bits) {
  return max_bits - kGroupFrom < kGroupBelow - kGroupFrom || max_bits == 0;
}

struct F32 {
  using Element = uint32_t;
  static constexpr bool kSumInDouble = true;
  static __device__ __forceinline__ uint32_t widen(Element bits) { return bits; }
  static __device__ __forceinline__ Element narrow(float value) { return __float_as_uint(value); }
  static __device__ __forceinline__ bool fits(uint32_t max_bits) { return fits_groups(max_bits); }
};

struct F16 {
  using Element = uint16_t;
  static constexpr bool kSumInDouble = false;
  static __device__ __forceinline__ uint32_t widen(Element bits) {
    return __float_as_uint(__half2float(__ushort_as_half(bits)));
  }
  static __device__ __forceinline__ Element narrow(float value) {
    return __half_as_ushort(__float2half_rn(value));
  }
  // Its finite squares reach from 2^-48 to 2^32.
  static __device__ __forceinline__ bool fits(uint32_t max_bits) {
    return max_bits < kInfinityBits;
  }
};

struct BF16 {
  using Element = uint16_t;
  static constexpr bool kSumInDouble = false;
  static __device__ __forceinline__ uint32_t widen(Element bits) {
    return static_cast<uint32_t>(bits) << 16;
  }
  // To nearest even, as the processor would from sm_80 on.
  static __device__ __forceinline__ Element narrow(float value) {
    const uint32_t bits = __float_as_uint(value);
    if ((bits & kMagnitudeMask) > kInfinityBits) return static_cast<Element>(bits >> 16 | 0x40u);
    return static_cast<Element>((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
  }
  static __device__ __forceinline__ bool fits(uint32_t max_bits) { return fits_groups(max_bits); }
};

struct F64 {
  using Element = uint64_t;
};

static __device__ __forceinline__ double as_double(uint64_t bits) {
  return __longlong_as_double(static_cast<long long>(bits));
}
static __device__ __forceinline__ uint64_t as_bits(double value) {
  return static_cast<uint64_t>(__double_as_longlong(value));
}

// 16 bytes of elements.
struct Vector {
  uint32_t word[4];
};

static __device__ __forceinline__ Vector as_vector(uint4 v) { return {{v.x, v.y, v.z, v.w}}; }

template <class Type>
__device__ __forceinline__ typename Type::Element element_of(const Vector& vector, int i) {
  if constexpr (sizeof(typename Type::Element) == 8) {
    return static_cast<uint64_t>(vector.word[2 * i + 1]) << 32 | vector.word[2 * i];
  } else if constexpr (sizeof(typename Type::Element) == 4) {
    return vector.word[i];
  } else {
    return static_cast<uint16_t>(vector.word[i / 2] >> (i % 2 * 16));
  }
}

// Puts an element into a vector that holds zeros there.
template <class Type>
__device__ __forceinline__ void put_element(Vector* vector, int i, typename Type::Element element) {
  if constexpr (sizeof(typename Type::Element) == 8) {
    vector->word[2 * i] = static_cast<uint32_t>(element);
    vector->word[2 * i + 1] = static_cast<uint32_t>(element >> 32);
  } else if constexpr (sizeof(typename Type::Element) == 4) {
    vector->word[i] = element;
  } else {
    vector->word[i / 2] |= static_cast<uint32_t>(element) << (i % 2 * 16);
  }
}

template <class Type>
constexpr int kPerVector = 16 / sizeof(typename Type::Element);

}  // namespace gradstat::cuda
