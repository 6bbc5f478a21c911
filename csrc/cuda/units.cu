// `units` on CUDA: one block a chunk, whose counts it adds to the window's as integers. The last
// block to finish merges the moments of all chunks, in order, into the window's row.
#include <cuda_runtime.h>

#include <algorithm>
#include <stdexcept>

#include "../units.h"
#include "accumulate.h"
#include "device.h"

namespace gradstat::cuda {
namespace {

struct UnitsParameters {
  TensorRef activation;
  UnitPlan plan;
  UnitBands bands;
  int64_t* counts;
  double* row;
  Moments* of_chunks;
  uint32_t* counter;
};

// Runs that a chunk of long runs may touch.
constexpr int kMaxRuns = kChunkElements / kLongRun + 2;

struct Shared {
  uint32_t of_runs[kNumUnitCounts][kMaxRuns];
  Moments of_warps[kWarps];
  bool is_last;
};

// An element's place in the order of values; see Band.
static __device__ __forceinline__ int key_of(uint16_t bits) {
  const int key = static_cast<int16_t>(bits);
  return key ^ (key >> 15 & 0x7fff);
}
static __device__ __forceinline__ int key_of(uint32_t bits) {
  const int key = static_cast<int>(bits);
  return key ^ (key >> 31 & 0x7fffffff);
}
static __device__ __forceinline__ int64_t key_of(uint64_t bits) {
  const auto key = static_cast<int64_t>(bits);
  return key ^ (key >> 63 & 0x7fffffffffffffff);
}

// The bands in the width of a dtype's keys.
template <class Type>
class Conditions {
 public:
  using Key = decltype(key_of(typename Type::Element{}));

  explicit __device__ Conditions(const UnitBands& bands)
      : active_(bands.active),
        low_(bands.low),
        high_(bands.high),
        numbers_(bands.numbers),
        outside_(bands.active_outside) {}

  // Adds 1 to those of the counts that an element meets the condition of.
  __device__ __forceinline__ void count(typename Type::Element element,
                                        uint32_t (&counts)[kNumUnitCounts]) const {
    const Key key = key_of(element);
    counts[kActive] += active_.holds(key) != outside_ && numbers_.holds(key);
    counts[kLow] += low_.holds(key);
    counts[kHigh] += high_.holds(key);
  }

 private:
  struct Limits {
    Key from;
    Key to;
    __device__ explicit Limits(const Band& band)
        : from(static_cast<Key>(band.from)), to(static_cast<Key>(band.to)) {}
    __device__ __forceinline__ bool holds(Key key) const { return from <= key && key <= to; }
  };
  Limits active_;
  Limits low_;
  Limits high_;
  Limits numbers_;
  bool outside_;
};

__device__ void add_to_unit(const UnitsParameters& p, int what, int64_t unit, uint32_t count) {
  if (count == 0) return;
  auto* at = reinterpret_cast<unsigned long long*>(p.counts + what * p.activation.rows + unit);
  atomicAdd(at, static_cast<unsigned long long>(count));
}

// Adds the moments of a vector that was read.
template <class Type, class Sums>
__device__ __forceinline__ void add_moments(const ChunkReader<Type>& chunk, int v,
                                            const Vector& vector, Sums* sums) {
  const Bins<false> bins{nullptr};
  if (add_vector<Type>(vector, sums, bins)) return;
#pragma unroll 1  // rarely run
  for (int i = 0; i < kPerVector<Type>; ++i) {
    add_element<Type>(chunk.element(v * kPerVector<Type> + i), sums, bins);
  }
}

template <class Type>
__device__ ChunkReader<Type> reader_of(const UnitsParameters& p, int64_t begin, int64_t columns) {
  const int64_t left = p.activation.numel - begin;
  return ChunkReader<Type>(static_cast<const typename Type::Element*>(p.activation.data) + begin,
                           columns < left ? columns : left);
}

// ---- short runs: a thread keeps the counts of the columns that it reads -------------------------

template <class Type, class Sums>
__device__ void count_columns(const UnitsParameters& p, const UnitChunk& chunk, Sums* sums) {
  constexpr int kPer = kPerVector<Type>;
  const Conditions<Type> conditions(p.bands);
  const auto unit_at = [&](int column) {
    return (chunk.column + column) / p.activation.run % p.activation.rows;
  };
  const auto row_reader = [&](int64_t row) {
    return reader_of<Type>(p, chunk.begin + row * p.plan.stride, chunk.columns);
  };
  const int vectors = static_cast<int>(chunk.columns) / kPer;
#pragma unroll 1
  for (int v = static_cast<int>(threadIdx.x); v < vectors; v += kThreads) {
    uint32_t counts[kPer][kNumUnitCounts] = {};
#pragma unroll 1
    for (int64_t row = 0; row < chunk.rows; row += kUnroll) {
      Vector read[kUnroll][1];
#pragma unroll
      for (int j = 0; j < kUnroll; ++j) {
        if (row + j >= chunk.rows) break;
        const ChunkReader<Type> reader = row_reader(row + j);
        if (v < reader.vectors()) reader.read(v, read[j]);
      }
#pragma unroll
      for (int j = 0; j < kUnroll; ++j) {
        if (row + j >= chunk.rows) break;
        const ChunkReader<Type> reader = row_reader(row + j);
        if (v >= reader.vectors()) continue;
        add_moments<Type>(reader, v, read[j][0], sums);
#pragma unroll
        for (int i = 0; i < kPer; ++i) conditions.count(element_of<Type>(read[j][0], i), counts[i]);
      }
    }
#pragma unroll
    for (int i = 0; i < kPer; ++i) {
      const int64_t unit = unit_at(v * kPer + i);
      for (int what = 0; what < kNumUnitCounts; ++what) add_to_unit(p, what, unit, counts[i][what]);
    }
  }
  // The columns that fill no vector; of a last row that is shorter, others than above.
#pragma unroll 1
  for (int64_t row = 0; row < chunk.rows; ++row) {
    const ChunkReader<Type> reader = row_reader(row);
    const int column = reader.vectors() * kPer + static_cast<int>(threadIdx.x);
    if (column >= reader.size()) continue;
    uint32_t counts[kNumUnitCounts] = {};
    add_element<Type>(reader.element(column), sums, Bins<false>{nullptr});
    conditions.count(reader.element(column), counts);
    for (int what = 0; what < kNumUnitCounts; ++what) {
      add_to_unit(p, what, unit_at(column), counts[what]);
    }
  }
}

// ---- long runs: a warp keeps the counts of the run that it is in
// ---------------------------------

// Where a warp reads: the run, counted from the chunk's first one, and the element in it.
struct Place {
  int run;
  int64_t inside;

  __device__ __forceinline__ void move_on(int64_t elements, int64_t run_size) {
    for (inside += elements; inside >= run_size; inside -= run_size) ++run;
  }
};

// Gives the sums over the warp's lanes to the run, and starts again.
__device__ __forceinline__ void flush(uint32_t (&counts)[kNumUnitCounts], int run, Shared* shared) {
#pragma unroll
  for (int what = 0; what < kNumUnitCounts; ++what) {
    const uint32_t sum = warp_sum(counts[what]);
    if (lane_index() == 0 && sum != 0) atomicAdd(&shared->of_runs[what][run], sum);
    counts[what] = 0;
  }
}

template <class Type>
__device__ void count_one(const Conditions<Type>& conditions, typename Type::Element element,
                          Place place, int64_t run_size, Shared* shared) {
  uint32_t counts[kNumUnitCounts] = {};
  conditions.count(element, counts);
  place.move_on(0, run_size);
  for (int what = 0; what < kNumUnitCounts; ++what) {
    if (counts[what] != 0) atomicAdd(&shared->of_runs[what][place.run], counts[what]);
  }
}

template <class Type, class Sums>
__device__ void count_runs(const UnitsParameters& p, const UnitChunk& chunk, Sums* sums,
                           Shared* shared) {
  constexpr int kPer = kPerVector<Type>;
  constexpr int kWarpElements = kWarpSize * kPer;
  const int64_t run_size = p.activation.run;
  const Conditions<Type> conditions(p.bands);
  const ChunkReader<Type> reader = reader_of<Type>(p, chunk.begin, chunk.rows * p.plan.stride);
  const int lane = lane_index();
  uint32_t counts[kNumUnitCounts] = {};
  const int first = warp_index() * kWarpSize;
  const Place at_begin = {0, chunk.begin % run_size};
  Place place = at_begin;
  place.move_on(static_cast<int64_t>(first) * kPer, run_size);
  int counted = place.run;  // the run that `counts` are of
#pragma unroll 1
  for (int base = first; base < reader.vectors(); base += kUnroll * kThreads) {
    Vector read[kUnroll][1];
#pragma unroll
    for (int j = 0; j < kUnroll; ++j) {
      const int v = base + j * kThreads + lane;
      if (v < reader.vectors()) reader.read(v, read[j]);
    }
#pragma unroll
    for (int j = 0; j < kUnroll; ++j) {
      const int v = base + j * kThreads + lane;
      const bool is_there = v < reader.vectors();
      if (is_there) add_moments<Type>(reader, v, read[j][0], sums);
      if (place.run != counted) {
        flush(counts, counted, shared);
        counted = place.run;
      }
      if (!is_there) {
        // Only in the chunk's last vectors; the other lanes may go on.
      } else if (place.inside + kWarpElements <= run_size) {
#pragma unroll
        for (int i = 0; i < kPer; ++i) conditions.count(element_of<Type>(read[j][0], i), counts);
      } else {
#pragma unroll 1
        for (int i = 0; i < kPer; ++i) {
          const Place at = {place.run, place.inside + lane * kPer + i};
          count_one(conditions, reader.element(v * kPer + i), at, run_size, shared);
        }
      }
      __syncwarp();
      place.move_on(kThreads * kPer, run_size);
    }
  }
  flush(counts, counted, shared);
  const int rest = reader.vectors() * kPer + static_cast<int>(threadIdx.x);
  if (rest < reader.size()) {
    add_element<Type>(reader.element(rest), sums, Bins<false>{nullptr});
    const Place at = {at_begin.run, at_begin.inside + rest};
    count_one(conditions, reader.element(rest), at, run_size, shared);
  }
}

// ---- kernel -------------------------------------------------------------------------------------

template <class Type, class Sums>
__device__ void run_chunk(const UnitsParameters& p, Shared* shared) {
  const UnitChunk chunk = unit_chunk_at(p.plan, blockIdx.x);
  Sums sums;
  if (p.plan.by_runs) {
    for (int i = static_cast<int>(threadIdx.x); i < kNumUnitCounts * kMaxRuns; i += kThreads) {
      shared->of_runs[i / kMaxRuns][i % kMaxRuns] = 0;
    }
    __syncthreads();
    count_runs<Type>(p, chunk, &sums, shared);
    __syncthreads();
    const int64_t first_run = chunk.begin / p.activation.run;
    for (int i = static_cast<int>(threadIdx.x); i < kNumUnitCounts * kMaxRuns; i += kThreads) {
      const int64_t unit = (first_run + i % kMaxRuns) % p.activation.rows;
      add_to_unit(p, i / kMaxRuns, unit, shared->of_runs[i / kMaxRuns][i % kMaxRuns]);
    }
  } else {
    count_columns<Type>(p, chunk, &sums);
  }
  __syncwarp();
  block_merge(warp_moments(sums), shared->of_warps);
  if (threadIdx.x == 0) p.of_chunks[blockIdx.x] = shared->of_warps[0];
}

template <class Type, class Sums>
__global__ void __launch_bounds__(kThreads)
    units_kernel(const UnitsParameters __grid_constant__ p) {
  __shared__ Shared shared;
  if (p.plan.chunks > 0) run_chunk<Type, Sums>(p, &shared);
  if (!arrive_last(p.counter, gridDim.x, &shared.is_last)) return;
  merge_all(p.of_chunks, p.plan.chunks, shared.of_warps);
  if (threadIdx.x == 0) {
    merge_into_row(shared.of_warps[0], static_cast<double>(p.activation.numel),
                   static_cast<double>(p.activation.rows), p.row);
    *p.counter = 0;
  }
}

}  // namespace

int64_t units_workspace_bytes(const TensorRef& activation) {
  return plan_units(activation).chunks * static_cast<int64_t>(sizeof(Moments));
}

void units(const TensorRef& activation, const UnitRule& rule, int64_t* counts, double* row,
           void* workspace, uint32_t* counter, int device, void* stream) {
  if (reinterpret_cast<uintptr_t>(workspace) % alignof(Moments) != 0) {
    throw std::runtime_error("workspace must be aligned to 8 bytes");
  }
  const DeviceGuard guard(device);
  const UnitsParameters p = {activation,
                             plan_units(activation),
                             bands_of(activation.dtype, rule),
                             counts,
                             row,
                             static_cast<Moments*>(workspace),
                             counter};
  if (p.plan.chunks > INT32_MAX) throw std::runtime_error("a tensor must have < 2^46 elements");
  auto* kernel = activation.dtype == DType::kF32    ? &units_kernel<F32, Sums32>
                 : activation.dtype == DType::kF16  ? &units_kernel<F16, Sums32>
                 : activation.dtype == DType::kBF16 ? &units_kernel<BF16, Sums32>
                                                    : &units_kernel<F64, Sums64>;
  const dim3 blocks(static_cast<unsigned>(std::max<int64_t>(p.plan.chunks, 1)));
  launch(kernel, "units_kernel", blocks, kThreads, p, static_cast<cudaStream_t>(stream));
}

}  // namespace gradstat::cuda
