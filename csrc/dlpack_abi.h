// The part of the DLPack C ABI through which tensors reach the kernels.
//
// Layout of DLPack 1.3 (https://github.com/dmlc/dlpack, include/dlpack/dlpack.h), major version 1.
// torch >= 2.10 publishes a DLPackExchangeAPI as the capsule "dlpack_exchange_api" under the type
// attribute `__dlpack_c_exchange_api__`; a different major version must be refused.
#pragma once

#include <cstddef>
#include <cstdint>

namespace gradstat::dlpack {

constexpr uint32_t kMajorVersion = 1;
constexpr char kCapsuleName[] = "dlpack_exchange_api";
constexpr char kTypeAttribute[] = "__dlpack_c_exchange_api__";

enum DeviceType : int32_t { kCpu = 1, kCuda = 2, kCudaHost = 3 };
enum DTypeCode : uint8_t { kFloat = 2, kBfloat = 4 };

struct Version {
  uint32_t major;
  uint32_t minor;
};

// A borrowed view: `shape` and `strides` (in elements) point into the tensor.
struct Tensor {
  void* data;
  int32_t device_type;
  int32_t device_id;
  int32_t ndim;
  uint8_t dtype_code;
  uint8_t dtype_bits;
  uint16_t dtype_lanes;
  int64_t* shape;
  int64_t* strides;
  uint64_t byte_offset;
};

struct ExchangeApi {
  Version version;
  const ExchangeApi* prev_api;
  void* managed_tensor_allocator;
  void* managed_tensor_from_py_object_no_sync;
  void* managed_tensor_to_py_object_no_sync;
  int (*dltensor_from_py_object_no_sync)(void* py_object, Tensor* out);
  int (*current_work_stream)(int32_t device_type, int32_t device_id, void** out_stream);
};

static_assert(sizeof(Tensor) == 48 && offsetof(Tensor, byte_offset) == 40, "DLTensor ABI");
static_assert(sizeof(ExchangeApi) == 56, "DLPackExchangeAPI ABI");

}  // namespace gradstat::dlpack
