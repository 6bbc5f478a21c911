// The loop over a chunk: each thread's sums, then the sums of its warp. Numerics: see kernels.h.
#pragma once

#include "chunk_reader.h"
#include "reduce.h"

namespace gradstat::cuda {

// Loads in flight per thread: 4 of 16 bytes, with 1024 threads, are 64 KB a multiprocessor.
constexpr int kUnroll = 4;

// A histogram in shared memory, in copies that neighbouring lanes take in turn: the elements of a
// gradient crowd into few bins, and lanes that add to one word wait for each other.
constexpr int kHistogramCopies = 8;

template <bool kHistogram>
struct Bins {
  uint32_t* counts;  // [kHistogramBins][kHistogramCopies]

  __device__ __forceinline__ void add(int bin) const {
    if (kHistogram) {
      const int copy = static_cast<int>(threadIdx.x) % kHistogramCopies;
      atomicAdd(counts + bin * kHistogramCopies + copy, 1u);
    }
  }
};

// ---- fp32, fp16, bf16 ---------------------------------------------------------------------------

struct Sums32 {
  double sum = 0;
  double abs_sum = 0;
  double sq_sum = 0;
  uint32_t max_bits = 0;
  uint32_t min_bits_less_1 = 0xffffffffu;  // a zero less 1 wraps to the largest and never wins
  uint32_t zeros = 0;
  uint32_t nans = 0;
  uint32_t infs = 0;
};

// Adds the elements of one vector by sums in fp32. Where their range or a NaN or Inf forbids that,
// it returns false and adds nothing.
template <class Type, bool kHistogram>
__device__ __forceinline__ bool add_vector(const Vector& vector, Sums32* sums,
                                           Bins<kHistogram> bins) {
  uint32_t bits[kPerVector<Type>];
  uint32_t max_bits = 0;
  uint32_t min_bits_less_1 = 0xffffffffu;
  uint32_t zeros = 0;
  float sum = 0;
  float abs_sum = 0;
  float sq_sum = 0;
#pragma unroll
  for (int i = 0; i < kPerVector<Type>; i += 2) {
    bits[i] = Type::widen(element_of<Type>(vector, i));
    bits[i + 1] = Type::widen(element_of<Type>(vector, i + 1));
    const uint32_t first = bits[i] & kMagnitudeMask;
    const uint32_t second = bits[i + 1] & kMagnitudeMask;
    max_bits = __vimax3_u32(max_bits, first, second);
    min_bits_less_1 = __vimin3_u32(min_bits_less_1, first - 1, second - 1);
    zeros += ((first - 1) >> 31) + ((second - 1) >> 31);
    const float a = __uint_as_float(bits[i]);
    const float b = __uint_as_float(bits[i + 1]);
    // Not 0 + a: with its rule for -0 the compiler could not leave that out.
    if (!Type::kSumInDouble) sum = i == 0 ? a + b : sum + (a + b);
    abs_sum = i == 0 ? fabsf(a) + fabsf(b) : abs_sum + (fabsf(a) + fabsf(b));
    sq_sum = fmaf(b, b, i == 0 ? a * a : fmaf(a, a, sq_sum));
  }
  if (!Type::fits(max_bits)) return false;
  sums->zeros += zeros;
  sums->max_bits = max_bits > sums->max_bits ? max_bits : sums->max_bits;
  sums->min_bits_less_1 =
      min_bits_less_1 < sums->min_bits_less_1 ? min_bits_less_1 : sums->min_bits_less_1;
  if constexpr (Type::kSumInDouble) {
    const double low = static_cast<double>(__uint_as_float(bits[0])) + __uint_as_float(bits[1]);
    const double high = static_cast<double>(__uint_as_float(bits[2])) + __uint_as_float(bits[3]);
    sums->sum += low + high;
  } else {
    sums->sum += sum;
  }
  sums->abs_sum += abs_sum;
  sums->sq_sum += sq_sum;
  if (kHistogram) {
#pragma unroll
    for (int i = 0; i < kPerVector<Type>; ++i) {
      const uint32_t magnitude = bits[i] & kMagnitudeMask;
      if (magnitude != 0) bins.add(static_cast<int>(magnitude >> 23));
    }
  }
  return true;
}

// Adds one element of any value.
template <class Type, bool kHistogram>
__device__ __forceinline__ void add_element(typename Type::Element element, Sums32* sums,
                                            Bins<kHistogram> bins) {
  const uint32_t bits = Type::widen(element);
  const uint32_t magnitude = bits & kMagnitudeMask;
  if (magnitude == 0) {
    ++sums->zeros;
  } else if (magnitude < kInfinityBits) {
    const double value = __uint_as_float(bits);
    sums->sum += value;
    sums->abs_sum += fabs(value);
    sums->sq_sum += value * value;
    sums->max_bits = magnitude > sums->max_bits ? magnitude : sums->max_bits;
    sums->min_bits_less_1 =
        magnitude - 1 < sums->min_bits_less_1 ? magnitude - 1 : sums->min_bits_less_1;
    bins.add(static_cast<int>(magnitude >> 23));
  } else if (magnitude == kInfinityBits) {
    ++sums->infs;
  } else {
    ++sums->nans;
  }
}

// Lane 0 gets the warp's moments.
static __device__ inline Moments warp_moments(const Sums32& sums) {
  Moments m = empty_moments();
  m.sum = warp_sum(sums.sum);
  m.abs_sum = warp_sum(sums.abs_sum);
  m.sq_sum[kMiddle] = warp_sum(sums.sq_sum);
  m.zeros = warp_sum(sums.zeros);
  m.nans = warp_sum(sums.nans);
  m.infs = warp_sum(sums.infs);
  m.abs_max = __uint_as_float(warp_max(sums.max_bits));
  const uint32_t min_bits_less_1 = warp_min(sums.min_bits_less_1);
  if (min_bits_less_1 != 0xffffffffu) m.abs_min = __uint_as_float(min_bits_less_1 + 1);
  return m;
}

// ---- fp64 ---------------------------------------------------------------------------------------

// The high words of the limits of range_of: 2^-450 and 2^480.
constexpr uint32_t kMiddleFromHigh = (1023u - 450u) << 20;
constexpr uint32_t kMiddleBelowHigh = (1023u + 480u) << 20;
static_assert(kSmallBelow == 0x1p-450 && kLargeFrom == 0x1p+480, "keep the words above in step");

struct Sums64 {
  double sum = 0;
  double abs_sum = 0;
  double sq_sum[kNumRanges] = {0, 0, 0};
  double abs_max = 0;
  double abs_min = HUGE_VAL;
  uint32_t zeros = 0;
  uint32_t nans = 0;
  uint32_t infs = 0;
};

static __device__ __forceinline__ void add_magnitude(double magnitude, Sums64* sums) {
  sums->abs_sum += magnitude;
  sums->abs_max = magnitude > sums->abs_max ? magnitude : sums->abs_max;
  if (magnitude == 0) {
    ++sums->zeros;
  } else if (magnitude < sums->abs_min) {
    sums->abs_min = magnitude;
  }
}

// As above: the vector's larger magnitude decides the range of both squares, and only the middle
// one is taken here.
template <class Type, bool kHistogram>
__device__ __forceinline__ bool add_vector(const Vector& vector, Sums64* sums,
                                           Bins<kHistogram> bins) {
  const uint32_t first_high = vector.word[1] & kMagnitudeMask;
  const uint32_t second_high = vector.word[3] & kMagnitudeMask;
  const uint32_t max_high = first_high > second_high ? first_high : second_high;
  if (max_high - kMiddleFromHigh >= kMiddleBelowHigh - kMiddleFromHigh) return false;
  const double a = as_double(element_of<Type>(vector, 0));
  const double b = as_double(element_of<Type>(vector, 1));
  sums->sum += a + b;
  sums->sq_sum[kMiddle] += a * a + b * b;
  add_magnitude(fabs(a), sums);
  add_magnitude(fabs(b), sums);
  if (kHistogram) {
    if (a != 0) bins.add(histogram_bin(element_of<Type>(vector, 0)));
    if (b != 0) bins.add(histogram_bin(element_of<Type>(vector, 1)));
  }
  return true;
}

template <class Type, bool kHistogram>
__device__ __forceinline__ void add_element(uint64_t bits, Sums64* sums, Bins<kHistogram> bins) {
  const double value = as_double(bits);
  const double magnitude = fabs(value);
  if (magnitude < HUGE_VAL) {
    sums->sum += value;
    add_magnitude(magnitude, sums);
    const Range range = range_of(magnitude);
    const double scaled = value * range_scale(range);
#pragma unroll  // a register array takes no index that is unknown
    for (int r = 0; r < kNumRanges; ++r) sums->sq_sum[r] += r == range ? scaled * scaled : 0.0;
    if (magnitude != 0) bins.add(histogram_bin(bits));
  } else if (value != value) {
    ++sums->nans;
  } else {
    ++sums->infs;
  }
}

static __device__ inline Moments warp_moments(const Sums64& sums) {
  Moments m = {sums.zeros,   sums.nans, sums.infs,    0,           sums.sum,
               sums.abs_sum, {0, 0, 0}, sums.abs_max, sums.abs_min};
  for (int range = 0; range < kNumRanges; ++range) m.sq_sum[range] = sums.sq_sum[range];
  return warp_merge(m);
}

// ---- the loop -----------------------------------------------------------------------------------

// Adds the vectors v, v + kThreads, ... (kCount of them).
template <class Type, int kCount, class Sums, bool kHistogram>
__device__ __forceinline__ void add_vectors(const ChunkReader<Type>& chunk, int v, Sums* sums,
                                            Bins<kHistogram> bins) {
  Vector vectors[kCount];
  chunk.read(v, vectors);
  uint32_t left_over = 0;
#pragma unroll
  for (int j = 0; j < kCount; ++j) {
    if (!add_vector<Type>(vectors[j], sums, bins)) left_over |= 1u << j;
  }
#pragma unroll 1  // one copy of the careful code: it is rarely run
  while (left_over != 0) {
    const int j = __ffs(static_cast<int>(left_over)) - 1;
    left_over &= left_over - 1;
    const int first = (v + j * kThreads) * kPerVector<Type>;
#pragma unroll 1
    for (int i = 0; i < kPerVector<Type>; ++i) {
      add_element<Type>(chunk.element(first + i), sums, bins);
    }
  }
}

// The moments of a chunk, warp by warp: lane 0 of each warp gets those of its part.
template <class Type, class Sums, bool kHistogram>
__device__ __forceinline__ Moments add_chunk(const void* data, int64_t n, Bins<kHistogram> bins) {
  const ChunkReader<Type> chunk(data, n);
  Sums sums;
  const int vectors = chunk.vectors();
  int v = static_cast<int>(threadIdx.x);
#pragma unroll 1
  for (; v + (kUnroll - 1) * kThreads < vectors; v += kUnroll * kThreads) {
    add_vectors<Type, kUnroll>(chunk, v, &sums, bins);
  }
#pragma unroll 1
  for (; v < vectors; v += kThreads) add_vectors<Type, 1>(chunk, v, &sums, bins);
  const int rest = vectors * kPerVector<Type> + static_cast<int>(threadIdx.x);
  if (rest < chunk.size()) add_element<Type>(chunk.element(rest), &sums, bins);
  __syncwarp();
  return warp_moments(sums);
}

}  // namespace gradstat::cuda
