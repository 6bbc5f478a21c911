#include "tensor_list.h"

#include <algorithm>
#include <stdexcept>
#include <string>

namespace py = pybind11;

namespace gradstat {
namespace {

// What is known of a registered type.
struct TensorType {
  PyTypeObject* type;
  const dlpack::ExchangeApi* api;
};

// Everything here is set once, under the GIL, and never freed: it belongs to types that live as
// long as the interpreter.
std::vector<TensorType> g_types;
PyCFunction g_is_neg = nullptr;
PyGetSetDef* g_grad = nullptr;

const dlpack::ExchangeApi* exchange_api(const py::handle& type) {
  if (!py::hasattr(type, dlpack::kTypeAttribute)) {
    throw std::runtime_error(
        "torch must provide the DLPack C exchange API (torch.Tensor.__dlpack_c_exchange_api__), "
        "which this one lacks; install torch >= 2.10");
  }
  const py::object capsule = type.attr(dlpack::kTypeAttribute);
  auto* api = static_cast<const dlpack::ExchangeApi*>(
      PyCapsule_GetPointer(capsule.ptr(), dlpack::kCapsuleName));
  if (api == nullptr) throw py::error_already_set();
  while (api != nullptr && api->version.major != dlpack::kMajorVersion) api = api->prev_api;
  if (api == nullptr || api->dltensor_from_py_object_no_sync == nullptr) {
    throw std::runtime_error("torch must provide DLPack " + std::to_string(dlpack::kMajorVersion) +
                             ".x, which this one does not; install a newer gradstat");
  }
  return api;
}

const TensorType* find_type(PyObject* object) {
  for (const TensorType& candidate : g_types) {
    if (Py_TYPE(object) == candidate.type) return &candidate;
  }
  return nullptr;
}

// A lazy negation leaves the memory as it was, and DLPack does not tell of it. Asking torch costs
// 52 ns, more than all else that is done for a small tensor, so in long lists only those are asked
// that can have one: it comes from the `imag` of a lazy conjugate, whose elements lie two apart, so
// that a dense tensor has it only with a single element (or from torch._neg_view, which is
// private).
constexpr size_t kShortList = 256;

bool may_be_neg(int64_t numel, size_t list_size) { return numel == 1 || list_size <= kShortList; }

bool is_neg(PyObject* tensor) {
  const py::object answer = py::reinterpret_steal<py::object>(g_is_neg(tensor, nullptr));
  if (!answer) throw py::error_already_set();
  return answer.ptr() == Py_True;
}

// A tensor's `.grad`. Where or_itself, a tensor that is no parameter is itself taken as a gradient.
// What is no tensor at all is passed on, for read() to turn down.
py::object grad_of(PyObject* item, bool or_itself) {
  PyTypeObject* tensor_type = g_types[0].type;
  if (!PyType_IsSubtype(Py_TYPE(item), tensor_type)) {
    return py::reinterpret_borrow<py::object>(item);
  }
  auto grad = py::reinterpret_steal<py::object>(find_type(item) != nullptr
                                                    ? g_grad->get(item, g_grad->closure)
                                                    : PyObject_GetAttrString(item, "grad"));
  if (!grad) throw py::error_already_set();
  if (or_itself && grad.is_none() && !PyType_IsSubtype(Py_TYPE(item), g_types[1].type) &&
      !py::handle(item).attr("requires_grad").cast<bool>()) {
    return py::reinterpret_borrow<py::object>(item);
  }
  return grad;
}

// The pointers seen so far, by open addressing: std::unordered_set would cost as much as the rest.
class PointerSet {
 public:
  explicit PointerSet(size_t count) {
    while (size_ < 2 * count) size_ *= 2;
    slots_.resize(size_);
  }

  // Whether the pointer is new.
  bool insert(const void* pointer) {
    size_t slot = (reinterpret_cast<uintptr_t>(pointer) >> 4) * 0x9e3779b97f4a7c15u >> 20;
    for (;; ++slot) {
      const void*& at = slots_[slot & (size_ - 1)];
      if (at == pointer) return false;
      if (at == nullptr) return at = pointer, true;
    }
  }

 private:
  size_t size_ = 16;
  std::vector<const void*> slots_;
};

bool dtype_of(const dlpack::Tensor& tensor, DType* dtype) {
  if (tensor.dtype_lanes != 1) return false;
  if (tensor.dtype_code == dlpack::kFloat) {
    if (tensor.dtype_bits == 32) return *dtype = DType::kF32, true;
    if (tensor.dtype_bits == 16) return *dtype = DType::kF16, true;
    if (tensor.dtype_bits == 64) return *dtype = DType::kF64, true;
  }
  return tensor.dtype_code == dlpack::kBfloat && tensor.dtype_bits == 16 &&
         (*dtype = DType::kBF16, true);
}

bool is_contiguous(const dlpack::Tensor& tensor) {
  int64_t expected = 1;
  for (int32_t dim = tensor.ndim - 1; dim >= 0; --dim) {
    if (tensor.shape[dim] != 1 && tensor.strides[dim] != expected) return false;
    expected *= tensor.shape[dim];
  }
  return true;
}

// Whether the elements fill one stretch of memory without gaps or overlaps, in any order of
// dimensions.
bool is_dense(const dlpack::Tensor& tensor) {
  std::vector<std::pair<int64_t, int64_t>> dims;  // stride, size
  for (int32_t dim = 0; dim < tensor.ndim; ++dim) {
    if (tensor.shape[dim] != 1) dims.emplace_back(tensor.strides[dim], tensor.shape[dim]);
  }
  std::sort(dims.begin(), dims.end());
  int64_t expected = 1;
  for (const auto& [stride, size] : dims) {
    if (stride != expected) return false;
    expected *= size;
  }
  return true;
}

}  // namespace

void register_tensor_types(const py::sequence& types) {
  std::vector<TensorType> found;
  for (const py::handle type : types) {
    found.push_back({reinterpret_cast<PyTypeObject*>(type.ptr()), exchange_api(type)});
  }
  // The C functions behind torch.Tensor.is_neg and .grad: for a registered type, calling them
  // directly gives the same answer without the attribute look-up.
  const py::object is_neg_method = types[0].attr("is_neg");
  const py::object grad_property = types[0].attr("grad");
  if (!PyObject_TypeCheck(is_neg_method.ptr(), &PyMethodDescr_Type) ||
      !PyObject_TypeCheck(grad_property.ptr(), &PyGetSetDescr_Type)) {
    throw std::runtime_error("torch.Tensor.is_neg and .grad must be attributes written in C");
  }
  const PyMethodDef* is_neg_def =
      reinterpret_cast<PyMethodDescrObject*>(is_neg_method.ptr())->d_method;
  if (is_neg_def->ml_flags != METH_NOARGS) {
    throw std::runtime_error("torch.Tensor.is_neg must take no arguments");
  }
  g_is_neg = is_neg_def->ml_meth;
  g_grad = reinterpret_cast<PyGetSetDescrObject*>(grad_property.ptr())->d_getset;
  g_types = std::move(found);
}

TensorList::TensorList(const py::sequence& tensors, bool take_grad, bool or_itself) {
  const py::object fast = py::reinterpret_steal<py::object>(
      PySequence_Fast(tensors.ptr(), "tensors must be a sequence"));
  if (!fast) throw py::error_already_set();
  const Py_ssize_t count = PySequence_Fast_GET_SIZE(fast.ptr());
  refs_.resize(static_cast<size_t>(count));
  objects_.reserve(static_cast<size_t>(count));
  PointerSet seen(take_grad ? static_cast<size_t>(count) : 0);
  for (Py_ssize_t i = 0; i < count; ++i) {
    PyObject* item = PySequence_Fast_GET_ITEM(fast.ptr(), i);
    objects_.push_back(take_grad ? grad_of(item, or_itself)
                                 : py::reinterpret_borrow<py::object>(item));
    if (take_grad && !seen.insert(item)) repeated_.push_back(i);
    TensorRef* ref = &refs_[static_cast<size_t>(i)];
    *ref = {nullptr, kMissing, 0, 0, DType::kF32};
    if (objects_.back().is_none()) continue;
    ++present_;
    if (!read(objects_.back().ptr(), ref)) irregular_.push_back(i);
  }
}

bool TensorList::read(PyObject* object, TensorRef* ref) {
  const TensorType* type = find_type(object);
  if (type == nullptr) return false;
  dlpack::Tensor tensor;
  if (type->api->dltensor_from_py_object_no_sync(object, &tensor) != 0) {
    PyErr_Clear();  // sparse, meta, quantised, ...: the caller looks at the tensor and says it
    return false;
  }
  if (tensor.device_type != dlpack::kCpu && tensor.device_type != dlpack::kCuda) return false;
  if (!dtype_of(tensor, &ref->dtype)) return false;
  int64_t numel = 1;
  for (int32_t dim = 0; dim < tensor.ndim; ++dim) numel *= tensor.shape[dim];
  if (numel > 0 && tensor.data == nullptr) return false;  // its storage was freed
  // The strides of a tensor without elements say nothing.
  const bool contiguous = numel == 0 || is_contiguous(tensor);
  if (!contiguous && !is_dense(tensor)) return false;
  if (may_be_neg(numel, refs_.size()) && is_neg(object)) return false;
  if (device_type_ < 0) {
    device_type_ = tensor.device_type;
    device_id_ = tensor.device_id;
  } else if (tensor.device_type != device_type_ || tensor.device_id != device_id_) {
    return false;
  }
  if (ref->dtype == DType::kF64) has_f64_ = true;
  ref->data = static_cast<char*>(tensor.data) + tensor.byte_offset;
  ref->numel = numel;
  ref->rows = tensor.ndim == 0 ? 1 : tensor.shape[0];
  ref->run = ref->rows == 0 ? 0 : numel / ref->rows;
  if (!contiguous && ref->rows > 1) ref->run = tensor.strides[0];
  return true;
}

std::vector<TensorRef> TensorList::distinct() const {
  std::vector<TensorRef> result = refs_;
  PointerSet seen(result.size());
  for (TensorRef& ref : result) {
    if (ref.numel > 0 && !seen.insert(ref.data)) ref.numel = kMissing;
  }
  return result;
}

void* TensorList::current_stream() const {
  void* stream = nullptr;
  if (on_cuda() &&
      g_types.front().api->current_work_stream(dlpack::kCuda, device_id_, &stream) != 0) {
    throw py::error_already_set();
  }
  return stream;
}

py::list TensorList::objects() const {
  py::list result;
  for (const py::object& object : objects_) result.append(object);
  return result;
}

void* output_memory(const py::object& object, const char* name, const TensorList& beside,
                    uint8_t dtype_code, uint8_t dtype_bits, int64_t at_least) {
  const TensorType* type = find_type(object.ptr());
  dlpack::Tensor tensor;
  if (type == nullptr) {
    throw std::invalid_argument(std::string(name) + " must be a torch.Tensor");
  }
  if (type->api->dltensor_from_py_object_no_sync(object.ptr(), &tensor) != 0) {
    throw py::error_already_set();
  }
  int64_t numel = 1;
  for (int32_t dim = 0; dim < tensor.ndim; ++dim) numel *= tensor.shape[dim];
  const bool right_device =
      tensor.device_type == beside.device_type() &&
      (tensor.device_type == dlpack::kCpu || tensor.device_id == beside.device_id());
  if (!right_device || tensor.dtype_code != dtype_code || tensor.dtype_bits != dtype_bits ||
      numel < at_least || (numel > 0 && !is_contiguous(tensor))) {
    throw std::invalid_argument(std::string(name) +
                                " must be contiguous, on the tensors' device, "
                                "of the documented dtype, with at least " +
                                std::to_string(at_least) + " elements");
  }
  return static_cast<char*>(tensor.data) + tensor.byte_offset;
}

}  // namespace gradstat
