// How a list of tensors reaches a kernel: packed into the launch's own parameters, so that no copy
// to the device comes first. A list that does not fit takes several launches.
#pragma once

#include <cstdint>
#include <cstring>
#include <stdexcept>

#include "../moments.h"

namespace gradstat::cuda {

// The limit of sm_70 and up since CUDA 12.1.
constexpr size_t kMaxParameterBytes = 32764;

// A tensor of numel == rows * run, both below 2^32. The top bits of `data` hold what kDType...
// below says; user-space addresses have at most 57 bits.
struct Entry {
  uint64_t data;
  uint32_t rows;
  uint32_t run;
};

// A tensor that an Entry cannot describe: too large, or with interleaved rows. Its Entry holds in
// `rows` the position of this in the same array, where it takes the space of two.
struct WideEntry {
  int64_t numel;
  int64_t rows;
  int64_t run;
  int64_t unused;
};
static_assert(sizeof(WideEntry) == 2 * sizeof(Entry), "a WideEntry takes two places");

constexpr int kDTypeShift = 62;
constexpr uint64_t kWideBit = uint64_t{1} << 61;
constexpr uint64_t kMissingBit = uint64_t{1} << 60;
constexpr uint64_t kAddressMask = kMissingBit - 1;

constexpr int kBatchTensors = 1600;
// One chunk is one block, and a grid has at most 2^31 - 1 of them (one more holds no chunk).
constexpr int64_t kMaxChunks = (int64_t{1} << 31) - 2;

// Consecutive tensors of a list. Wide entries are stored from the end of `entries` downwards.
struct Batch {
  int32_t tensors;
  uint32_t chunks;
  uint32_t first_chunk[kBatchTensors + 2];  // [tensors] is `chunks`
  Entry entries[kBatchTensors];
};

GRADSTAT_HD static inline TensorRef tensor_at(const Batch& batch, int index) {
  const Entry& entry = batch.entries[index];
  TensorRef tensor;
  tensor.data = reinterpret_cast<void*>(static_cast<uintptr_t>(entry.data & kAddressMask));
  tensor.dtype = static_cast<DType>(entry.data >> kDTypeShift);
  if (entry.data & kMissingBit) {
    tensor.numel = kMissing;
    tensor.rows = tensor.run = 0;
  } else if (entry.data & kWideBit) {
    WideEntry wide;
    memcpy(&wide, &batch.entries[entry.rows], sizeof wide);
    tensor.numel = wide.numel;
    tensor.rows = wide.rows;
    tensor.run = wide.run;
  } else {
    tensor.numel = static_cast<int64_t>(entry.rows) * entry.run;
    tensor.rows = entry.rows;
    tensor.run = entry.run;
  }
  return tensor;
}

GRADSTAT_HD static inline uint32_t chunks_of(const Batch& batch, int index) {
  return batch.first_chunk[index + 1] - batch.first_chunk[index];
}

// The tensor that a chunk of the batch belongs to: the last one that starts at or before it (one
// without chunks starts where the next one does).
GRADSTAT_HD static inline int tensor_of_chunk(const Batch& batch, uint32_t chunk) {
  int low = 0;
  int high = batch.tensors - 1;
  while (low < high) {
    const int middle = (low + high + 1) / 2;
    if (batch.first_chunk[middle] <= chunk) {
      low = middle;
    } else {
      high = middle - 1;
    }
  }
  return low;
}

// Packs as many tensors as fit, beginning with tensors[begin]; returns the first that did not.
// Throws where that is tensors[begin] itself: no device holds so large a tensor.
static inline int64_t fill_batch(const TensorRef* tensors, int64_t count, int64_t begin,
                                 Batch* batch) {
  batch->tensors = 0;
  batch->chunks = 0;
  batch->first_chunk[0] = 0;
  int end_of_space = kBatchTensors;
  int64_t i = begin;
  for (; i < count; ++i) {
    const TensorRef& tensor = tensors[i];
    const bool missing = tensor.numel == kMissing;
    const bool wide = !missing && (!rows_are_contiguous(tensor) || tensor.rows > UINT32_MAX ||
                                   tensor.run > UINT32_MAX);
    const int64_t chunks = batch->chunks + plan_chunks(tensor).count;
    if (batch->tensors + (wide ? 3 : 1) > end_of_space || chunks > kMaxChunks) break;
    const auto address = reinterpret_cast<uintptr_t>(tensor.data);
    if ((address & ~kAddressMask) != 0) {
      throw std::runtime_error("a tensor's address must have at most 60 bits");
    }
    Entry& entry = batch->entries[batch->tensors++];
    entry.data = address | static_cast<uint64_t>(tensor.dtype) << kDTypeShift |
                 (wide ? kWideBit : 0) | (missing ? kMissingBit : 0);
    entry.rows = missing ? 0 : static_cast<uint32_t>(tensor.rows);
    entry.run = missing ? 0 : static_cast<uint32_t>(tensor.run);
    if (wide) {
      const WideEntry full = {tensor.numel, tensor.rows, tensor.run, 0};
      end_of_space -= 2;
      memcpy(static_cast<void*>(&batch->entries[end_of_space]), &full, sizeof full);
      entry.rows = static_cast<uint32_t>(end_of_space);
    }
    batch->chunks = static_cast<uint32_t>(chunks);
    batch->first_chunk[batch->tensors] = batch->chunks;
  }
  if (i == begin && begin < count) throw std::runtime_error("a tensor must have < 2^46 elements");
  return i;
}

}  // namespace gradstat::cuda
