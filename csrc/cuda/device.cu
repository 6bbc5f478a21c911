// Devices and errors: the only file that asks the CUDA runtime about the machine.
#include <stdexcept>
#include <string>

#include "../kernels.h"
#include "device.h"

namespace gradstat::cuda {

void check(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // or the next call that asks for the last error would see this one again
  throw std::runtime_error(std::string("CUDA must not fail in ") + what + ", got " +
                           cudaGetErrorName(error) + ": " + cudaGetErrorString(error));
}

DeviceGuard::DeviceGuard(int device) {
  check(cudaGetDevice(&previous_), "cudaGetDevice");
  if (previous_ == device) return;
  check(cudaSetDevice(device), "cudaSetDevice");
  switched_ = true;
}

DeviceGuard::~DeviceGuard() {
  if (switched_) cudaSetDevice(previous_);
}

bool is_built() { return true; }

int device_count(const char** reason) {
  int count = 0;
  const cudaError_t error = cudaGetDeviceCount(&count);
  const char* why = "";
  if (error != cudaSuccess) {
    cudaGetLastError();
    int driver = 0;
    // Without any driver the error is the one for a driver that is too old.
    const bool has_driver = cudaDriverGetVersion(&driver) == cudaSuccess && driver > 0;
    why = has_driver ? cudaGetErrorString(error) : "no CUDA driver is installed";
    count = 0;
  } else if (count == 0) {
    why = "no CUDA device is visible";
  }
  if (reason != nullptr) *reason = why;
  return count;
}

}  // namespace gradstat::cuda
