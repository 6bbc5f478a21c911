// Counting rows that hold nothing but zeros, once the count of zeros says that there may be any.
#pragma once

#include <cuda_runtime.h>

#include "../moments.h"
#include "reduce.h"

namespace gradstat::cuda {

// Elements of a row that one thread looks at before its warp reads the whole row: most living rows
// show it at the first, and a row this short needs no warp.
constexpr int64_t kProbe = 32;

// A zero of either sign.
static __device__ __forceinline__ bool is_zero(const void* data, int64_t index, int bytes) {
  if (bytes == 2) return (__ldg(static_cast<const uint16_t*>(data) + index) & 0x7fffu) == 0;
  if (bytes == 4) return (__ldg(static_cast<const uint32_t*>(data) + index) & 0x7fffffffu) == 0;
  return __ldg(static_cast<const uint64_t*>(data) + index) << 1 == 0;
}

// Whether n elements are all zero, for a whole warp.
static __device__ inline bool warp_finds_zeros(const char* at, int64_t n, int bytes) {
  const int lane = lane_index();
  // Elements up to the first 16-byte boundary, then vectors, then what is left.
  int64_t head = static_cast<int64_t>((0 - reinterpret_cast<uintptr_t>(at)) % 16) / bytes;
  if (head > n) head = n;
  const int64_t vectors = (n - head) * bytes / 16;
  const int64_t tail = head + vectors * 16 / bytes;
  bool zero = true;
  if (lane < head) zero = is_zero(at, lane, bytes);
  if (tail + lane < n) zero = zero && is_zero(at, tail + lane, bytes);  // tail and head: < 8
  if (__any_sync(kAllLanes, !zero)) return false;
  const uint32_t even_mask = bytes == 2 ? 0x7fff7fffu : bytes == 4 ? 0x7fffffffu : 0xffffffffu;
  const uint32_t odd_mask = bytes == 2 ? 0x7fff7fffu : 0x7fffffffu;
  const auto* from = reinterpret_cast<const uint4*>(at + head * bytes);
  constexpr int kLoads = 4;
  for (int64_t base = 0; base < vectors; base += kLoads * kWarpSize) {
    uint32_t seen = 0;
#pragma unroll
    for (int load = 0; load < kLoads; ++load) {
      const int64_t v = base + load * kWarpSize + lane;
      if (v < vectors) {
        const uint4 words = __ldg(from + v);
        seen |= ((words.x | words.z) & even_mask) | ((words.y | words.w) & odd_mask);
      }
    }
    if (__any_sync(kAllLanes, seen != 0)) return false;
  }
  return true;
}

// Dead rows among the `rows` rows of `run` elements that begin at `at`, for a whole block. The
// result, in *total (shared memory), is good for all threads.
static __device__ inline void count_dead_rows(const char* at, int64_t rows, int64_t run, int bytes,
                                              uint32_t* total) {
  if (threadIdx.x == 0) *total = 0;
  __syncthreads();
  const int64_t probe = run < kProbe ? run : kProbe;
  for (int64_t base = warp_index() * kWarpSize; base < rows; base += kThreads) {
    const int64_t row = base + lane_index();
    bool dead = row < rows;
#pragma unroll 1
    for (int64_t i = 0; dead && i < probe; ++i) dead = is_zero(at, row * run + i, bytes);
    __syncwarp();
    uint32_t candidates = __ballot_sync(kAllLanes, dead);
    if (run > kProbe) {
      for (uint32_t left = candidates; left != 0; left &= left - 1) {
        const int lane = __ffs(static_cast<int>(left)) - 1;
        const char* candidate = at + (base + lane) * run * bytes;
        if (!warp_finds_zeros(candidate, run, bytes)) candidates &= ~(1u << lane);
      }
    }
    if (lane_index() == 0 && candidates != 0) {
      atomicAdd(total, static_cast<uint32_t>(__popc(candidates)));
    }
  }
  __syncthreads();
}

// The same for rows that are cut into several chunks each, from the zeros of those chunks.
static __device__ inline void count_dead_long_rows(const Moments* chunks, int64_t rows,
                                                   const ChunkPlan& plan, uint32_t* total) {
  if (threadIdx.x == 0) *total = 0;
  __syncthreads();
  for (int64_t row = warp_index(); row < rows; row += kWarps) {
    const Moments* parts = chunks + row * plan.parts_per_row;
    bool dead = true;
    for (int64_t base = 0; dead && base < plan.parts_per_row; base += kWarpSize) {
      const int64_t part = base + lane_index();
      bool zero = true;
      if (part < plan.parts_per_row) {
        const int64_t left = plan.row_size - part * plan.size;
        zero = __ldcg(&parts[part].zeros) == (left < plan.size ? left : plan.size);
      }
      dead = __all_sync(kAllLanes, zero);
    }
    if (lane_index() == 0 && dead) atomicAdd(total, 1u);
  }
  __syncthreads();
}

}  // namespace gradstat::cuda
