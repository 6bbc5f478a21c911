// Stands in for CUDA's header of this name, so that a plain C++ compiler builds csrc/cuda/*.cu as
// they are and emulation.cpp runs their kernels on the CPU. Only what those files use is here.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __shared__ static    // blocks run one after another
#define __grid_constant__ &  // 32 KB for each of 256 threads would be slow to copy
#define threadIdx (::emulation::thread_index())
#define blockIdx (::emulation::g_block_index)
#define gridDim (::emulation::g_grid_size)

// ---- types and runtime --------------------------------------------------------------------------

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }

enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorInvalidConfiguration = 9,
  cudaErrorInsufficientDriver = 35,
  cudaErrorInvalidDevice = 101,
  cudaErrorLaunchFailure = 719,
};
enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount = 16 };
using cudaStream_t = struct CUstream_st*;

cudaError_t cudaGetLastError();
const char* cudaGetErrorName(cudaError_t error);
const char* cudaGetErrorString(cudaError_t error);
cudaError_t cudaGetDevice(int* device);
cudaError_t cudaSetDevice(int device);
cudaError_t cudaGetDeviceCount(int* count);
cudaError_t cudaDriverGetVersion(int* version);
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device);
cudaError_t cudaMemsetAsync(void* at, int value, size_t bytes, cudaStream_t stream);

namespace emulation {

extern dim3 g_block_index;
extern dim3 g_grid_size;

const dim3& thread_index();

// Runs body(context) as a thread of each block. False, and no more blocks, where threads wait for
// each other in vain.
cudaError_t run_grid(dim3 blocks, dim3 threads, size_t parameter_bytes, void (*body)(void* context),
                     void* context);

// Waits for all threads of the block; returns how many brought a value other than 0.
int wait_for_block(int value);

// Lets the lanes of `mask`, which must be the same for all of them, exchange a value. Returns the
// values by lane, good until the lane's next but one exchange.
const uint64_t* exchange(unsigned mask, uint64_t value);
int lane();

// Lets other threads run, or not: the seed decides.
void perhaps_yield();

template <class To, class From>
To bits_as(From from) {
  static_assert(sizeof(To) == sizeof(From), "same size");
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}

}  // namespace emulation

template <class Parameters>
cudaError_t cudaLaunchKernel(void (*kernel)(const Parameters&), dim3 blocks, dim3 threads,
                             void** arguments, size_t, cudaStream_t) {
  struct Call {
    void (*kernel)(const Parameters&);
    Parameters parameters;  // a copy, as for a launch: the caller may change its own at once
  };
  auto* call = new Call{kernel, *static_cast<const Parameters*>(arguments[0])};
  const cudaError_t error = emulation::run_grid(
      blocks, threads, sizeof(Parameters),
      [](void* context) {
        auto* each = static_cast<Call*>(context);
        each->kernel(each->parameters);
      },
      call);
  delete call;
  return error;
}

// ---- the language's functions -------------------------------------------------------------------

inline void __syncthreads() { emulation::wait_for_block(0); }
inline int __syncthreads_or(int value) { return emulation::wait_for_block(value) > 0; }
inline void __syncwarp() { emulation::exchange(0xffffffffu, 0); }
inline void __threadfence() { emulation::perhaps_yield(); }

template <class T>
T __shfl_down_sync(unsigned mask, T value, int offset) {
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof value);
  const uint64_t* all = emulation::exchange(mask, bits);
  const int from = emulation::lane() + offset;
  T result = value;
  if (from < 32) std::memcpy(&result, &all[from], sizeof result);
  return result;
}
inline unsigned __ballot_sync(unsigned mask, int value) {
  const uint64_t* all = emulation::exchange(mask, value != 0);
  unsigned result = 0;
  for (int i = 0; i < 32; ++i) {
    if ((mask >> i & 1u) != 0 && all[i] != 0) result |= 1u << i;
  }
  return result;
}
inline int __any_sync(unsigned mask, int value) { return __ballot_sync(mask, value) != 0; }
inline int __all_sync(unsigned mask, int value) { return __ballot_sync(mask, value) == mask; }

template <class T>
T atomicAdd(T* at, T value) {
  emulation::perhaps_yield();
  const T before = *at;
  *at = before + value;
  return before;
}
template <class T>
T __ldg(const T* at) {
  return *at;
}
template <class T>
T __ldcg(const T* at) {
  return *at;
}
template <class T>
void __stcg(T* at, T value) {
  *at = value;
}

inline unsigned __float_as_uint(float v) { return emulation::bits_as<unsigned>(v); }
inline float __uint_as_float(unsigned v) { return emulation::bits_as<float>(v); }
inline long long __double_as_longlong(double v) { return emulation::bits_as<long long>(v); }
inline double __longlong_as_double(long long v) { return emulation::bits_as<double>(v); }
inline int __popc(unsigned v) { return __builtin_popcount(v); }
inline int __ffs(int v) { return __builtin_ffs(v); }
inline unsigned __vimax3_u32(unsigned a, unsigned b, unsigned c) {
  const unsigned larger = a > b ? a : b;
  return larger > c ? larger : c;
}
inline unsigned __vimin3_u32(unsigned a, unsigned b, unsigned c) {
  const unsigned smaller = a < b ? a : b;
  return smaller < c ? smaller : c;
}
