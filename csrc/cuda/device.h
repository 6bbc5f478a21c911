// What every CUDA file needs around its kernels: checked calls, checked launches, the device guard.
#pragma once

#include <cuda_runtime.h>

namespace gradstat::cuda {

// Throws std::runtime_error, saying what failed and why, unless `error` is cudaSuccess.
void check(cudaError_t error, const char* what);

// Makes `device` current while it lives. Switches only where another one is: cudaSetDevice creates
// a context on a device that has none.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device);
  ~DeviceGuard();
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int previous_ = 0;
  bool switched_ = false;
};

// Starts kernel(parameters) and checks that it started.
template <class Kernel, class Parameters>
void launch(Kernel* kernel, const char* name, dim3 blocks, int threads,
            const Parameters& parameters, cudaStream_t stream) {
  void* arguments[] = {const_cast<Parameters*>(&parameters)};
  check(
      cudaLaunchKernel(kernel, blocks, dim3(static_cast<unsigned>(threads)), arguments, 0, stream),
      name);
}

}  // namespace gradstat::cuda
