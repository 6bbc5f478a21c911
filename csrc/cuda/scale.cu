// `scale` and `clamp` on CUDA: a grid that fills the device once takes the chunks in turn, so that
// a coefficient of 1 costs no more than reading it.
#include <cuda_runtime.h>

#include <algorithm>

#include "batch.h"
#include "device.h"
#include "elements.h"
#include "reduce.h"

namespace gradstat::cuda {
namespace {

// ---- changing the elements of a chunk -----------------------------------------------------------

// The product is taken in double, as on the CPU, and rounded to fp32 and from there to 16 bits.
template <class Type>
struct Scale {
  double factor;
  __device__ Scale(double value) : factor(value) {}
  __device__ __forceinline__ typename Type::Element operator()(typename Type::Element bits) const {
    const double value = __uint_as_float(Type::widen(bits));
    return Type::narrow(static_cast<float>(value * factor));
  }
};

template <>
struct Scale<F64> {
  double factor;
  __device__ Scale(double value) : factor(value) {}
  __device__ __forceinline__ uint64_t operator()(uint64_t bits) const {
    return as_bits(as_double(bits) * factor);
  }
};

template <class Type>
struct Zero {
  __device__ Zero(double) {}
  __device__ __forceinline__ typename Type::Element operator()(typename Type::Element) const {
    return 0;
  }
};

// The limit is rounded to the dtype first, so that every result is exact in it. NaN compares false.
template <class Type>
struct Clamp {
  float low;
  float high;
  __device__ Clamp(double limit)
      : low(rounded(static_cast<float>(-limit))), high(rounded(static_cast<float>(limit))) {}
  static __device__ float rounded(float value) {
    return __uint_as_float(Type::widen(Type::narrow(value)));
  }
  __device__ __forceinline__ typename Type::Element operator()(typename Type::Element bits) const {
    const float value = __uint_as_float(Type::widen(bits));
    return value < low ? Type::narrow(low) : value > high ? Type::narrow(high) : bits;
  }
};

template <>
struct Clamp<F64> {
  double limit;
  __device__ Clamp(double value) : limit(value) {}
  __device__ __forceinline__ uint64_t operator()(uint64_t bits) const {
    const double value = as_double(bits);
    return value < -limit ? as_bits(-limit) : value > limit ? as_bits(limit) : bits;
  }
};

template <class Type, class Change>
__device__ __forceinline__ void change_element(typename Type::Element* at, const Change& change) {
  __stcg(at, change(__ldcg(at)));
}

// Changes the vectors at[0], at[kThreads], ... (kCount of them), all loads before the first use.
template <class Type, int kCount, class Change>
__device__ __forceinline__ void change_vectors(uint4* at, const Change& change) {
  uint4 vectors[kCount];
#pragma unroll
  for (int j = 0; j < kCount; ++j) vectors[j] = __ldcg(at + j * kThreads);
#pragma unroll
  for (int j = 0; j < kCount; ++j) {
    const Vector before = as_vector(vectors[j]);
    Vector after = {};
#pragma unroll
    for (int i = 0; i < kPerVector<Type>; ++i) {
      put_element<Type>(&after, i, change(element_of<Type>(before, i)));
    }
    __stcg(at + j * kThreads,
           make_uint4(after.word[0], after.word[1], after.word[2], after.word[3]));
  }
}

// Elements up to the first 16-byte boundary one by one, then vectors, then the rest one by one.
template <class Type, class Change>
__device__ __forceinline__ void change_chunk(void* data, int64_t size, const Change& change) {
  using Element = typename Type::Element;
  constexpr auto kBytes = static_cast<int>(sizeof(Element));
  constexpr int kUnroll = 4;
  auto* at = static_cast<Element*>(data);
  const auto n = static_cast<int>(size);
  const auto thread = static_cast<int>(threadIdx.x);
  const int to_boundary = static_cast<int>((0 - reinterpret_cast<uintptr_t>(data)) % 16) / kBytes;
  const int head = to_boundary < n ? to_boundary : n;
  const int vectors = (n - head) / kPerVector<Type>;
  const int tail = head + vectors * kPerVector<Type>;
  if (thread < head) change_element<Type>(at + thread, change);
  if (tail + thread < n) change_element<Type>(at + tail + thread, change);
  auto* vectors_at = reinterpret_cast<uint4*>(at + head);
  int v = thread;
#pragma unroll 1
  for (; v + (kUnroll - 1) * kThreads < vectors; v += kUnroll * kThreads) {
    change_vectors<Type, kUnroll>(vectors_at + v, change);
  }
#pragma unroll 1
  for (; v < vectors; v += kThreads) change_vectors<Type, 1>(vectors_at + v, change);
}

template <template <class> class Change>
__device__ void change_any(const TensorRef& tensor, const Chunk& chunk, double value) {
  void* data = static_cast<char*>(tensor.data) + chunk.begin * element_bytes(tensor.dtype);
  switch (tensor.dtype) {
    case DType::kF32:
      return change_chunk<F32>(data, chunk.size, Change<F32>(value));
    case DType::kF16:
      return change_chunk<F16>(data, chunk.size, Change<F16>(value));
    case DType::kBF16:
      return change_chunk<BF16>(data, chunk.size, Change<BF16>(value));
    default:
      return change_chunk<F64>(data, chunk.size, Change<F64>(value));
  }
}

// ---- kernels ------------------------------------------------------------------------------------

struct ScaleParameters {
  Batch batch;
  const double* coefficient;  // of the batch's first tensor
  int64_t stride;
};
static_assert(sizeof(ScaleParameters) <= kMaxParameterBytes, "kBatchTensors is too large");

struct ClampParameters {
  Batch batch;
  double limit;
};

struct Place {
  int index;  // of the tensor in the batch
  TensorRef tensor;
  Chunk chunk;
};

// The place of a chunk, found by one thread for all of the block, in shared memory.
__device__ void find_place(const Batch& batch, uint32_t chunk, Place* place) {
  __syncthreads();  // the last one may still be in use
  if (threadIdx.x == 0) {
    place->index = tensor_of_chunk(batch, chunk);
    place->tensor = tensor_at(batch, place->index);
    place->chunk = chunk_at(plan_chunks(place->tensor), place->tensor.numel,
                            chunk - batch.first_chunk[place->index]);
  }
  __syncthreads();
}

__device__ bool writes_nothing(double factor) { return factor == 1.0 || factor != factor; }

__global__ void __launch_bounds__(kThreads)
    scale_kernel(const ScaleParameters __grid_constant__ p) {
  __shared__ Place place;
  if (p.stride == 0 && writes_nothing(*p.coefficient)) return;
  for (uint32_t chunk = blockIdx.x; chunk < p.batch.chunks; chunk += gridDim.x) {
    find_place(p.batch, chunk, &place);
    const double factor = p.coefficient[place.index * p.stride];
    if (writes_nothing(factor)) continue;
    if (factor == 0.0) {
      change_any<Zero>(place.tensor, place.chunk, factor);
    } else {
      change_any<Scale>(place.tensor, place.chunk, factor);
    }
  }
}

__global__ void __launch_bounds__(kThreads)
    clamp_kernel(const ClampParameters __grid_constant__ p) {
  __shared__ Place place;
  for (uint32_t chunk = blockIdx.x; chunk < p.batch.chunks; chunk += gridDim.x) {
    find_place(p.batch, chunk, &place);
    change_any<Clamp>(place.tensor, place.chunk, p.limit);
  }
}

// Blocks that a device holds at once, at 2048 threads a multiprocessor.
uint32_t blocks_at_once(int device) {
  int multiprocessors = 0;
  check(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device),
        "cudaDeviceGetAttribute");
  return static_cast<uint32_t>(multiprocessors) * (2048 / kThreads);
}

// Calls start(first tensor, blocks) for each batch of the list.
template <class Start>
void for_each_batch(const TensorRef* tensors, int64_t count, int device, Batch* batch,
                    const Start& start) {
  const uint32_t most_blocks = blocks_at_once(device);
  for (int64_t begin = 0; begin < count;) {
    const int64_t end = fill_batch(tensors, count, begin, batch);
    if (batch->chunks > 0) start(begin, dim3(std::min(batch->chunks, most_blocks)));
    begin = end;
  }
}

}  // namespace

void scale(const TensorRef* tensors, int64_t count, const double* coefficient, int64_t stride,
           int device, void* stream) {
  const DeviceGuard guard(device);
  ScaleParameters p;
  p.stride = stride;
  for_each_batch(tensors, count, device, &p.batch, [&](int64_t first, dim3 blocks) {
    p.coefficient = coefficient + first * stride;
    launch(scale_kernel, "scale_kernel", blocks, kThreads, p, static_cast<cudaStream_t>(stream));
  });
}

void clamp(const TensorRef* tensors, int64_t count, double limit, int device, void* stream) {
  const DeviceGuard guard(device);
  ClampParameters p;
  p.limit = limit;
  for_each_batch(tensors, count, device, &p.batch, [&](int64_t, dim3 blocks) {
    launch(clamp_kernel, "clamp_kernel", blocks, kThreads, p, static_cast<cudaStream_t>(stream));
  });
}

}  // namespace gradstat::cuda
