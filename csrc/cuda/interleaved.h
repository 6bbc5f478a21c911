// Dead rows of tensors whose rows are interleaved in memory (dimension 0 not outermost). Their rows
// cross all chunks, so a second kernel reads those again whose zeros suffice for a row.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>

#include "batch.h"
#include "dead_rows.h"
#include "device.h"

namespace gradstat::cuda {

constexpr int kInterleavedTensors = 512;
// A launch of one tensor fills any device; of many, each tensor gets a share, and most blocks find
// that the zeros do not suffice and leave.
constexpr int64_t kInterleavedBlocks = 4096;
constexpr int64_t kLeastBlocksPerTensor = 64;

struct InterleavedTensor {
  TensorRef tensor;
  int64_t index;  // in the whole list
};

struct InterleavedParameters {
  InterleavedTensor items[kInterleavedTensors];
  int32_t size;
  int64_t count;        // tensors of the whole list
  Moments* of_tensors;  // [count], as moments_kernel left them
  double* table;
  uint32_t* counter;
};
static_assert(sizeof(InterleavedParameters) <= kMaxParameterBytes, "too many tensors a launch");

// Whether a row is dead, for a whole block.
static __device__ inline bool block_finds_zeros(const TensorRef& tensor, int64_t row) {
  const auto bytes = static_cast<int>(element_bytes(tensor.dtype));
  const int64_t size = tensor.numel / tensor.rows;
  const int64_t period = tensor.run * tensor.rows;
  constexpr int kLoads = 4;
  for (int64_t base = 0; base < size; base += kLoads * kThreads) {
    bool lives = false;
    for (int load = 0; load < kLoads; ++load) {
      const int64_t i = base + load * kThreads + threadIdx.x;
      if (i >= size) break;
      const int64_t at = i / tensor.run * period + row * tensor.run + i % tensor.run;
      lives = lives || !is_zero(tensor.data, at, bytes);
    }
    if (__syncthreads_or(lives)) return false;
  }
  return true;
}

// Block (x, y) takes the rows x, x + gridDim.x, ... of tensor y; a row is read by a whole block.
static __global__ void __launch_bounds__(kThreads)
    interleaved_dead_rows_kernel(const InterleavedParameters __grid_constant__ p) {
  __shared__ unsigned long long total;
  __shared__ bool is_last;
  const TensorRef& tensor = p.items[blockIdx.y].tensor;
  Moments* moments = p.of_tensors + p.items[blockIdx.y].index;
  if (moments->zeros >= tensor.numel / tensor.rows) {
    unsigned long long dead = 0;
    for (int64_t row = blockIdx.x; row < tensor.rows; row += gridDim.x) {
      dead += block_finds_zeros(tensor, row);
    }
    if (threadIdx.x == 0 && dead > 0) {
      atomicAdd(reinterpret_cast<unsigned long long*>(&moments->dead_rows), dead);
    }
  }
  if (threadIdx.x == 0) total = 0;
  if (!arrive_last(p.counter, gridDim.x * gridDim.y, &is_last)) return;
  for (int i = static_cast<int>(threadIdx.x); i < p.size; i += kThreads) {
    const int64_t index = p.items[i].index;
    const int64_t dead = __ldcg(&p.of_tensors[index].dead_rows);
    p.table[index * kNumColumns + kDeadRows] = static_cast<double>(dead);
    atomicAdd(&total, static_cast<unsigned long long>(dead));
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    p.table[p.count * kNumColumns + kDeadRows] += static_cast<double>(total);
    *p.counter = 0;
  }
}

// Completes what moments_kernel left for all of these tensors.
static inline void count_interleaved_dead_rows(const TensorRef* tensors, int64_t count,
                                               Moments* of_tensors, double* table,
                                               uint32_t* counter, cudaStream_t stream) {
  InterleavedParameters p = {};
  p.count = count;
  p.of_tensors = of_tensors;
  p.table = table;
  p.counter = counter;
  int64_t most_rows = 0;
  for (int64_t i = 0; i <= count; ++i) {
    if (p.size == kInterleavedTensors || (i == count && p.size > 0)) {
      const int64_t share = std::max(kLeastBlocksPerTensor, kInterleavedBlocks / p.size);
      const dim3 blocks(static_cast<unsigned>(std::min(most_rows, share)),
                        static_cast<unsigned>(p.size));
      launch(interleaved_dead_rows_kernel, "interleaved_dead_rows_kernel", blocks, kThreads, p,
             stream);
      p.size = 0;
      most_rows = 0;
    }
    if (i == count || tensors[i].numel <= 0 || rows_are_contiguous(tensors[i])) continue;
    p.items[p.size++] = {tensors[i], i};
    most_rows = std::max(most_rows, tensors[i].rows);
  }
}

}  // namespace gradstat::cuda
