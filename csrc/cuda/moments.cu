// `moments` on CUDA: one block a chunk. The last block of a tensor merges the tensor's chunks and
// writes its row; the last block of the last launch merges all tensors into the totals.
#include <cuda_runtime.h>

#include <algorithm>
#include <stdexcept>

#include "../policy.h"
#include "accumulate.h"
#include "batch.h"
#include "dead_rows.h"
#include "device.h"
#include "interleaved.h"

namespace gradstat::cuda {
namespace {

// Blocks a multiprocessor must hold at least: 1024 threads are what sm_75 has.
constexpr int kMinBlocks = 4;

struct MomentsParameters {
  Batch batch;
  int64_t first_tensor;  // of the batch, in the whole list
  int64_t count;         // tensors of the whole list
  double total_numel;
  double total_rows;
  double* table;
  int64_t* histogram;
  Moments* of_chunks;   // [chunks of the batch]
  Moments* of_tensors;  // [count]
  uint32_t* arrivals;   // [count], 0 where a tensor has several chunks
  uint32_t* counter;
  ClipRequest clip;
  // Blocks that arrive at the counter in the last launch: one a tensor with chunks, and the block
  // that holds none. 0 in the other launches.
  uint32_t expected;
};
static_assert(sizeof(MomentsParameters) <= kMaxParameterBytes, "kBatchTensors is too large");

// What a block is to do, found by one thread: the divisions would take all of them long.
struct Task {
  TensorRef tensor;
  ChunkPlan plan;
  Chunk chunk;
  int index;  // of the tensor in the batch
};

struct Shared {
  Task task;
  Moments of_warps[kWarps];     // [0] becomes the block's result
  double sum_of_warps[kWarps];  // of BlockGroup
  uint32_t dead_rows;
  bool is_last;
};

__device__ Task find_task(const Batch& batch, uint32_t chunk) {
  Task task;
  task.index = tensor_of_chunk(batch, chunk);
  task.tensor = tensor_at(batch, task.index);
  task.plan = plan_chunks(task.tensor);
  task.chunk = chunk_at(task.plan, task.tensor.numel, chunk - batch.first_chunk[task.index]);
  return task;
}

template <bool kHistogram>
__device__ Moments chunk_moments(const Task& task, Bins<kHistogram> bins) {
  const auto bytes = element_bytes(task.tensor.dtype);
  const void* data = static_cast<const char*>(task.tensor.data) + task.chunk.begin * bytes;
  const int64_t n = task.chunk.size;
  switch (task.tensor.dtype) {
    case DType::kF32:
      return add_chunk<F32, Sums32>(data, n, bins);
    case DType::kF16:
      return add_chunk<F16, Sums32>(data, n, bins);
    case DType::kBF16:
      return add_chunk<BF16, Sums32>(data, n, bins);
    default:
      return add_chunk<F64, Sums64>(data, n, bins);
  }
}

__device__ void clear_bins(uint32_t* counts) {
  for (int i = static_cast<int>(threadIdx.x); i < kHistogramBins * kHistogramCopies;
       i += kThreads) {
    counts[i] = 0;
  }
}

// Adds the block's histogram to two rows of the result.
__device__ void add_bins(const uint32_t* counts, int64_t* of_tensor, int64_t* totals) {
  static_assert(kThreads == kHistogramBins, "one thread a bin");
  const int bin = static_cast<int>(threadIdx.x);
  unsigned long long sum = 0;
  for (int copy = 0; copy < kHistogramCopies; ++copy) sum += counts[bin * kHistogramCopies + copy];
  if (sum == 0) return;
  atomicAdd(reinterpret_cast<unsigned long long*>(of_tensor + bin), sum);
  atomicAdd(reinterpret_cast<unsigned long long*>(totals + bin), sum);
}

// Dead rows of a chunk of whole rows; all threads call it and get the result.
__device__ int64_t dead_rows_of_chunk(Shared* shared) {
  const Task& task = shared->task;
  const int64_t run = task.tensor.run;
  const int64_t zeros = shared->of_warps[0].zeros;
  const bool whole_rows = rows_are_contiguous(task.tensor) && task.plan.parts_per_row == 1;
  if (!whole_rows || zeros < run) return 0;
  if (run == 1) return zeros;
  const auto bytes = static_cast<int>(element_bytes(task.tensor.dtype));
  const char* at = static_cast<const char*>(task.tensor.data) + task.chunk.begin * bytes;
  count_dead_rows(at, task.chunk.size / run, run, bytes, &shared->dead_rows);
  return shared->dead_rows;
}

// The same for a tensor whose rows are longer than a chunk.
__device__ int64_t dead_rows_of_long_rows(const Moments* chunks, Shared* shared) {
  const Task& task = shared->task;
  if (!rows_are_contiguous(task.tensor) || task.plan.parts_per_row == 1) return 0;
  if (shared->of_warps[0].zeros < task.tensor.run) return 0;
  count_dead_long_rows(chunks, task.tensor.rows, task.plan, &shared->dead_rows);
  return shared->dead_rows;
}

__device__ void write_tensor(const MomentsParameters& p, int index, const TensorRef& tensor,
                             const Moments& moments) {
  const int64_t at = p.first_tensor + index;
  p.of_tensors[at] = moments;
  write_row(moments, static_cast<double>(tensor.numel), static_cast<double>(tensor.rows),
            p.table + at * kNumColumns);
}

// Takes the block's chunk, and its tensor if this chunk is the last one done. Returns whether it
// was.
template <bool kHistogram>
__device__ bool run_chunk(const MomentsParameters& p, uint32_t* bins, Shared* shared) {
  if (threadIdx.x == 0) shared->task = find_task(p.batch, blockIdx.x);
  if (kHistogram) clear_bins(bins);
  __syncthreads();
  const Task& task = shared->task;
  Moments* result = &shared->of_warps[0];

  block_merge(chunk_moments(task, Bins<kHistogram>{bins}), shared->of_warps);
  const int64_t tensor = p.first_tensor + task.index;
  if (kHistogram) {
    add_bins(bins, p.histogram + tensor * kHistogramBins, p.histogram + p.count * kHistogramBins);
  }
  int64_t dead_rows = dead_rows_of_chunk(shared);
  if (threadIdx.x == 0) result->dead_rows = dead_rows;

  if (task.plan.count > 1) {
    Moments* chunks = p.of_chunks + p.batch.first_chunk[task.index];
    if (threadIdx.x == 0) p.of_chunks[blockIdx.x] = *result;
    const auto count = static_cast<uint32_t>(task.plan.count);
    if (!arrive_last(p.arrivals + tensor, count, &shared->is_last)) return false;
    merge_all(chunks, task.plan.count, shared->of_warps);
    dead_rows = dead_rows_of_long_rows(chunks, shared);
    if (threadIdx.x == 0) result->dead_rows += dead_rows;
  }
  if (threadIdx.x == 0) write_tensor(p, task.index, task.tensor, *result);
  return true;
}

// The rows of tensors that have no chunks: missing and empty ones.
__device__ void write_rows_without_chunks(const MomentsParameters& p) {
  for (int i = static_cast<int>(threadIdx.x); i < p.batch.tensors; i += kThreads) {
    if (chunks_of(p.batch, i) > 0) continue;
    const TensorRef tensor = tensor_at(p.batch, i);
    write_tensor(p, i, tensor, empty_moments());
    if (tensor.numel == kMissing) {
      write_missing_row(p.table + (p.first_tensor + i) * kNumColumns);
    }
  }
}

// The block as the group that runs a clip program.
class BlockGroup {
 public:
  explicit __device__ BlockGroup(Shared* shared) : shared_(shared) {}
  __device__ int rank() const { return static_cast<int>(threadIdx.x); }
  __device__ int size() const { return kThreads; }
  __device__ void sync() const { __syncthreads(); }
  __device__ double sum(double value) const {
    value = warp_sum(value);
    __syncthreads();  // sum_of_warps may still be read from the call before
    if (lane_index() == 0) shared_->sum_of_warps[warp_index()] = value;
    __syncthreads();
    double total = 0;
    for (int warp = 0; warp < kWarps; ++warp) total += shared_->sum_of_warps[warp];
    return total;
  }

 private:
  Shared* shared_;
};

__device__ void write_totals(const MomentsParameters& p, Shared* shared) {
  merge_all(p.of_tensors, p.count, shared->of_warps);
  const Moments& totals = shared->of_warps[0];
  if (threadIdx.x == 0) {
    write_row(totals, p.total_numel, p.total_rows, p.table + p.count * kNumColumns);
    *p.counter = 0;
  }
  // Rows that other blocks wrote are in sight since arrive_last.
  if (p.clip.out != nullptr) run_program(p.clip, p.table, p.count, totals, BlockGroup(shared));
}

template <bool kHistogram>
__global__ void __launch_bounds__(kThreads, kMinBlocks)
    moments_kernel(const MomentsParameters __grid_constant__ p) {
  __shared__ Shared shared;
  __shared__ uint32_t bins[kHistogram ? kHistogramBins * kHistogramCopies : 1];
  if (blockIdx.x == p.batch.chunks) {
    write_rows_without_chunks(p);
  } else if (!run_chunk<kHistogram>(p, bins, &shared)) {
    return;
  }
  if (p.expected != 0 && arrive_last(p.counter, p.expected, &shared.is_last)) {
    write_totals(p, &shared);
  }
}

// Where in the workspace what lies.
struct Layout {
  int64_t chunks = 0;
  bool has_long_tensor = false;  // one of several chunks
  int64_t of_tensors = 0;        // bytes from the start, which is where of_chunks lies
  int64_t arrivals = 0;
  int64_t bytes = 0;
};

Layout plan_workspace(const TensorRef* tensors, int64_t count) {
  Layout layout;
  for (int64_t i = 0; i < count; ++i) {
    const int64_t chunks = plan_chunks(tensors[i]).count;
    layout.chunks += chunks;
    layout.has_long_tensor |= chunks > 1;
  }
  constexpr auto kEach = static_cast<int64_t>(sizeof(Moments));
  layout.of_tensors = layout.chunks * kEach;
  layout.arrivals = layout.of_tensors + count * kEach;
  layout.bytes = layout.arrivals + count * static_cast<int64_t>(sizeof(uint32_t));
  return layout;
}

// Sums up on the host what the host knows.
void count_totals(const TensorRef* tensors, int64_t count, MomentsParameters* p) {
  for (int64_t i = 0; i < count; ++i) {
    if (tensors[i].numel == kMissing) continue;
    p->total_numel += static_cast<double>(tensors[i].numel);
    p->total_rows += static_cast<double>(tensors[i].rows);
  }
}

// Blocks of the batch's launch: one a chunk, and one for the tensors without any (or for none, so
// that the totals are written).
uint32_t plan_blocks(MomentsParameters* p, bool is_last_launch) {
  uint32_t with_chunks = 0;
  for (int i = 0; i < p->batch.tensors; ++i) with_chunks += chunks_of(p->batch, i) > 0;
  const bool extra = with_chunks == 0 || with_chunks < static_cast<uint32_t>(p->batch.tensors);
  p->expected = is_last_launch ? with_chunks + extra : 0;
  return p->batch.chunks + extra;
}

}  // namespace

int64_t moments_workspace_bytes(const TensorRef* tensors, int64_t count) {
  return plan_workspace(tensors, count).bytes;
}

void moments(const TensorRef* tensors, int64_t count, double* table, int64_t* histogram,
             const ClipRequest& clip, void* workspace, uint32_t* counter, int device,
             void* stream) {
  if (reinterpret_cast<uintptr_t>(workspace) % alignof(Moments) != 0) {
    throw std::runtime_error("workspace must be aligned to 8 bytes");
  }
  const DeviceGuard guard(device);
  auto* cuda_stream = static_cast<cudaStream_t>(stream);
  const Layout layout = plan_workspace(tensors, count);
  auto* bytes = static_cast<char*>(workspace);

  MomentsParameters p = {};
  p.count = count;
  p.table = table;
  p.histogram = histogram;
  p.of_chunks = reinterpret_cast<Moments*>(bytes);
  p.of_tensors = reinterpret_cast<Moments*>(bytes + layout.of_tensors);
  p.arrivals = reinterpret_cast<uint32_t*>(bytes + layout.arrivals);
  p.counter = counter;
  p.clip = clip;
  count_totals(tensors, count, &p);

  if (layout.has_long_tensor) {
    const auto size = static_cast<size_t>(count) * sizeof *p.arrivals;
    check(cudaMemsetAsync(p.arrivals, 0, size, cuda_stream), "cudaMemsetAsync");
  }
  if (histogram != nullptr) {
    const auto size = static_cast<size_t>(count + 1) * kHistogramBins * sizeof *histogram;
    check(cudaMemsetAsync(histogram, 0, size, cuda_stream), "cudaMemsetAsync");
  }
  auto* kernel = histogram != nullptr ? &moments_kernel<true> : &moments_kernel<false>;
  do {
    const int64_t end = fill_batch(tensors, count, p.first_tensor, &p.batch);
    const uint32_t blocks = plan_blocks(&p, end == count);
    launch(kernel, "moments_kernel", dim3(blocks), kThreads, p, cuda_stream);
    p.first_tensor = end;
  } while (p.first_tensor < count);
  count_interleaved_dead_rows(tensors, count, p.of_tensors, table, counter, cuda_stream);
}

}  // namespace gradstat::cuda
