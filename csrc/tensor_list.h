// A Python sequence of tensors, unpacked once for any number of kernels.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <vector>

#include "dlpack_abi.h"
#include "kernels.h"

namespace gradstat {

// Only tensors of exactly the registered types are read: a subclass may carry no memory at all (a
// FakeTensor exports a wrong pointer without complaint). Call once, with torch.Tensor and
// torch.nn.Parameter.
void register_tensor_types(const pybind11::sequence& types);

class TensorList {
 public:
  // Takes the tensors, or the `.grad` of each where take_grad. Where or_itself, a tensor that is no
  // parameter (no torch.nn.Parameter, requires no grad, has no `.grad`) is itself taken as a
  // gradient. None stands for a missing gradient.
  // A tensor that no kernel can read as it is gets an entry in irregular() and must be replaced:
  // another type, dtype, layout or device than the first one's, memory with gaps or overlaps or
  // none at all, or a lazy negation.
  TensorList(const pybind11::sequence& tensors, bool take_grad, bool or_itself = false);

  const std::vector<TensorRef>& refs() const { return refs_; }
  const std::vector<int64_t>& irregular() const { return irregular_; }
  // Positions of items that stand earlier in the list too; found only where take_grad.
  const std::vector<int64_t>& repeated() const { return repeated_; }
  bool has_f64() const { return has_f64_; }
  int64_t present() const { return present_; }  // how many are not missing
  int64_t size() const { return static_cast<int64_t>(refs_.size()); }

  // The tensors to write to: where several share their memory (one gradient of two parameters), the
  // first stands for all and the others are missing, or two threads would change it at once.
  std::vector<TensorRef> distinct() const;

  // Device of the first readable tensor; the CPU where there is none.
  bool on_cuda() const { return device_type_ == dlpack::kCuda; }
  int device_type() const { return device_type_ < 0 ? dlpack::kCpu : device_type_; }
  int device_id() const { return device_id_; }

  // The stream that torch would use on this device now.
  void* current_stream() const;

  pybind11::list objects() const;

 private:
  bool read(PyObject* object, TensorRef* ref);

  std::vector<pybind11::object> objects_;
  std::vector<TensorRef> refs_;
  std::vector<int64_t> irregular_;
  std::vector<int64_t> repeated_;
  bool has_f64_ = false;
  int64_t present_ = 0;
  int device_type_ = -1;
  int device_id_ = 0;
};

// Memory of a contiguous tensor that a kernel writes results to. Throws std::invalid_argument
// where it is not on the device, or has another dtype or fewer elements than asked for.
void* output_memory(const pybind11::object& tensor, const char* name, const TensorList& beside,
                    uint8_t dtype_code, uint8_t dtype_bits, int64_t at_least);

}  // namespace gradstat
