// Reductions in a fixed order: over the lanes of a warp, then over the warps of a block.
#pragma once

#include <cuda_runtime.h>

#include "../moments.h"

namespace gradstat::cuda {

constexpr int kThreads = 256;
constexpr int kWarpSize = 32;
constexpr int kWarps = kThreads / kWarpSize;
constexpr unsigned kAllLanes = 0xffffffffu;

static __device__ __forceinline__ int lane_index() {
  return static_cast<int>(threadIdx.x) % kWarpSize;
}
static __device__ __forceinline__ int warp_index() {
  return static_cast<int>(threadIdx.x) / kWarpSize;
}

// Each of these gives its result to lane 0; all lanes of the warp must call it.

template <class T>
__device__ __forceinline__ T warp_sum(T value) {
  for (int offset = kWarpSize / 2; offset > 0; offset /= 2) {
    value += __shfl_down_sync(kAllLanes, value, offset);
  }
  return value;
}

static __device__ __forceinline__ uint32_t warp_max(uint32_t value) {
  for (int offset = kWarpSize / 2; offset > 0; offset /= 2) {
    const uint32_t other = __shfl_down_sync(kAllLanes, value, offset);
    value = other > value ? other : value;
  }
  return value;
}

static __device__ __forceinline__ uint32_t warp_min(uint32_t value) { return ~warp_max(~value); }

static __device__ inline Moments warp_merge(Moments m) {
#pragma unroll 1  // rarely run, and five copies would be long
  for (int offset = kWarpSize / 2; offset > 0; offset /= 2) {
    Moments other;
    other.zeros = __shfl_down_sync(kAllLanes, m.zeros, offset);
    other.nans = __shfl_down_sync(kAllLanes, m.nans, offset);
    other.infs = __shfl_down_sync(kAllLanes, m.infs, offset);
    other.dead_rows = __shfl_down_sync(kAllLanes, m.dead_rows, offset);
    other.sum = __shfl_down_sync(kAllLanes, m.sum, offset);
    other.abs_sum = __shfl_down_sync(kAllLanes, m.abs_sum, offset);
    for (int range = 0; range < kNumRanges; ++range) {
      other.sq_sum[range] = __shfl_down_sync(kAllLanes, m.sq_sum[range], offset);
    }
    other.abs_max = __shfl_down_sync(kAllLanes, m.abs_max, offset);
    other.abs_min = __shfl_down_sync(kAllLanes, m.abs_min, offset);
    merge(&m, other);
  }
  return m;
}

// Merges what lane 0 of each warp brings, into of_warps[0] for all threads to read. `of_warps` is
// shared memory; all threads of the block must call this.
static __device__ inline void block_merge(const Moments& of_warp, Moments* of_warps) {
  __syncthreads();  // of_warps may still be read from the call before
  if (lane_index() == 0) of_warps[warp_index()] = of_warp;
  __syncthreads();
  if (threadIdx.x == 0) {
    Moments merged = of_warps[0];
#pragma unroll 1
    for (int warp = 1; warp < kWarps; ++warp) merge(&merged, of_warps[warp]);
    of_warps[0] = merged;
  }
  __syncthreads();
}

// Reads what another block wrote in this launch: past the L1 cache, which does not see that.
static __device__ inline Moments load_moments(const Moments* from) {
  Moments m;
  m.zeros = __ldcg(&from->zeros);
  m.nans = __ldcg(&from->nans);
  m.infs = __ldcg(&from->infs);
  m.dead_rows = __ldcg(&from->dead_rows);
  m.sum = __ldcg(&from->sum);
  m.abs_sum = __ldcg(&from->abs_sum);
  for (int range = 0; range < kNumRanges; ++range) m.sq_sum[range] = __ldcg(&from->sq_sum[range]);
  m.abs_max = __ldcg(&from->abs_max);
  m.abs_min = __ldcg(&from->abs_min);
  return m;
}

// Merges `count` moments that other blocks wrote, into of_warps[0].
static __device__ inline void merge_all(const Moments* from, int64_t count, Moments* of_warps) {
  Moments mine = empty_moments();
#pragma unroll 1
  for (int64_t i = threadIdx.x; i < count; i += kThreads) merge(&mine, load_moments(from + i));
  __syncwarp();
  block_merge(warp_merge(mine), of_warps);
}

// Counts this block's arrival at a counter that began at 0. True, for all its threads, in the last
// of `expected` blocks, which then sees everything that the others wrote before they arrived.
// `is_last` is shared memory.
static __device__ inline bool arrive_last(uint32_t* counter, uint32_t expected, bool* is_last) {
  __syncthreads();
  if (threadIdx.x == 0) {
    __threadfence();
    *is_last = atomicAdd(counter, 1u) + 1 == expected;
  }
  __syncthreads();
  if (*is_last) __threadfence();
  return *is_last;
}

}  // namespace gradstat::cuda
