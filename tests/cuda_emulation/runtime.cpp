// The emulated CUDA runtime: devices and errors as a test sets them, and memory that is the host's.
#include <cuda_runtime.h>

#include <cstring>

#include "emulation.h"

using emulation::g_state;

cudaError_t cudaGetLastError() {
  ++g_state.cleared_errors;
  return cudaSuccess;
}
const char* cudaGetErrorName(cudaError_t) { return "cudaErrorEmulated"; }
const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaErrorLaunchFailure ? g_state.error_text.c_str() : "emulated error";
}
cudaError_t cudaGetDevice(int* device) {
  *device = g_state.device;
  return cudaSuccess;
}
cudaError_t cudaSetDevice(int device) {
  ++g_state.set_device_calls;
  if (device >= g_state.devices) return cudaErrorInvalidDevice;
  g_state.device = device;
  return cudaSuccess;
}
cudaError_t cudaGetDeviceCount(int* count) {
  *count = g_state.devices;
  return g_state.driver == 0 ? cudaErrorInsufficientDriver : cudaSuccess;
}
cudaError_t cudaDriverGetVersion(int* version) {
  *version = g_state.driver;
  return cudaSuccess;
}
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int) {
  *value = 1;  // few blocks, so that a grid-stride loop takes several turns
  return cudaSuccess;
}
cudaError_t cudaMemsetAsync(void* at, int value, size_t bytes, cudaStream_t) {
  std::memset(at, value, bytes);
  return cudaSuccess;
}
