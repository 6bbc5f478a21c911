// The Python face of the kernels: unpack tensors, release the GIL, call, convert. Nothing else.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <limits>
#include <optional>
#include <utility>
#include <vector>

#include "cpu/dispatch.h"
#include "cpu/parallel.h"
#include "kernels.h"
#include "tensor_list.h"

namespace py = pybind11;

namespace gradstat {
namespace {

constexpr uint8_t kInt = 0;
constexpr uint8_t kUInt = 1;

void require_regular(const TensorList& tensors) {
  if (!tensors.irregular().empty()) {
    throw std::invalid_argument("irregular tensors must be replaced before a kernel is called");
  }
}

void moments(const TensorList& tensors, const py::object& table, const py::object& histogram,
             const py::object& clip_out, double max_norm, int norm_kind,
             const py::object& workspace, const py::object& counter, int threads) {
  require_regular(tensors);
  const int64_t rows = tensors.size() + 1;
  const auto output = [&](const py::object& tensor, const char* name, uint8_t code, uint8_t bits,
                          int64_t at_least) -> void* {
    return tensor.is_none() ? nullptr : output_memory(tensor, name, tensors, code, bits, at_least);
  };
  auto* table_at = static_cast<double*>(
      output_memory(table, "table", tensors, dlpack::kFloat, 64, rows * kNumColumns));
  auto* histogram_at =
      static_cast<int64_t*>(output(histogram, "histogram", kInt, 64, rows * kHistogramBins));
  const ClipRequest clip = {
      max_norm, static_cast<NormKind>(norm_kind),
      static_cast<double*>(output(clip_out, "clip_out", dlpack::kFloat, 64, 2))};
  const TensorRef* refs = tensors.refs().data();
  if (!tensors.on_cuda()) {
    const py::gil_scoped_release no_gil;
    cpu::moments(refs, tensors.size(), table_at, histogram_at, clip, threads);
    return;
  }
  void* workspace_at = output_memory(workspace, "workspace", tensors, kUInt, 8,
                                     cuda::moments_workspace_bytes(refs, tensors.size()));
  auto* counter_at =
      static_cast<uint32_t*>(output_memory(counter, "counter", tensors, kInt, 32, 1));
  void* stream = tensors.current_stream();
  const py::gil_scoped_release no_gil;
  cuda::moments(refs, tensors.size(), table_at, histogram_at, clip, workspace_at, counter_at,
                tensors.device_id(), stream);
}

int64_t moments_workspace_bytes(const TensorList& tensors) {
  return tensors.on_cuda() ? cuda::moments_workspace_bytes(tensors.refs().data(), tensors.size())
                           : 0;
}

void scale(const TensorList& tensors, const py::object& coefficient, bool per_tensor, int threads) {
  require_regular(tensors);
  const auto* coefficient_at = static_cast<const double*>(output_memory(
      coefficient, "coefficient", tensors, dlpack::kFloat, 64, per_tensor ? tensors.size() : 1));
  const int64_t stride = per_tensor ? 1 : 0;
  void* stream = tensors.current_stream();
  const std::vector<TensorRef> refs = tensors.distinct();
  const py::gil_scoped_release no_gil;
  if (tensors.on_cuda()) {
    cuda::scale(refs.data(), tensors.size(), coefficient_at, stride, tensors.device_id(), stream);
  } else {
    cpu::scale(refs.data(), tensors.size(), coefficient_at, stride, threads);
  }
}

void clamp(const TensorList& tensors, double limit, int threads) {
  require_regular(tensors);
  void* stream = tensors.current_stream();
  const std::vector<TensorRef> refs = tensors.distinct();
  const py::gil_scoped_release no_gil;
  if (tensors.on_cuda()) {
    cuda::clamp(refs.data(), tensors.size(), limit, tensors.device_id(), stream);
  } else {
    cpu::clamp(refs.data(), tensors.size(), limit, threads);
  }
}

// Name and whether this processor runs it, best first.
std::vector<std::pair<std::string, bool>> cpu_variants() {
  int count = 0;
  const cpu::Variant* all = cpu::variants(&count);
  std::vector<std::pair<std::string, bool>> result;
  for (int i = 0; i < count; ++i) result.emplace_back(all[i].name, all[i].is_supported());
  return result;
}

std::pair<int, std::string> cuda_devices() {
  const char* reason = "";
  const int count = cuda::device_count(&reason);
  return {count, reason};
}

}  // namespace
}  // namespace gradstat

PYBIND11_MODULE(_native, module) {
  using namespace gradstat;
  module.doc() = "Compiled kernels of gradstat; gradstat._kernels is the only importer.";

  py::class_<TensorList>(module, "TensorList")
      .def(py::init<const py::sequence&, bool, bool>(), py::arg("tensors"), py::arg("take_grad"),
           py::arg("or_itself") = false)
      .def("__len__", &TensorList::size)
      .def_property_readonly("irregular", &TensorList::irregular)
      .def_property_readonly("repeated", &TensorList::repeated)
      .def_property_readonly("has_f64", &TensorList::has_f64)
      .def_property_readonly("on_cuda", &TensorList::on_cuda)
      .def_property_readonly("device_index", &TensorList::device_id)
      .def_property_readonly("objects", &TensorList::objects);

  module.def("register_tensor_types", &register_tensor_types, py::arg("types"));
  module.def("moments", &moments, py::arg("tensors"), py::arg("table"),
             py::arg("histogram") = py::none(), py::arg("clip_out") = py::none(),
             py::arg("max_norm") = std::numeric_limits<double>::infinity(),
             py::arg("norm_kind") = static_cast<int>(NormKind::kL2),
             py::arg("workspace") = py::none(), py::arg("counter") = py::none(),
             py::arg("threads") = 1);
  module.def("moments_workspace_bytes", &moments_workspace_bytes, py::arg("tensors"));
  module.def("scale", &scale, py::arg("tensors"), py::arg("coefficient"), py::arg("per_tensor"),
             py::arg("threads") = 1);
  module.def("clamp", &clamp, py::arg("tensors"), py::arg("limit"), py::arg("threads") = 1);

  module.def("cpu_variants", &cpu_variants);
  module.def("cpu_variant", [] { return std::string(cpu::variant().name); });
  module.def("cpu_variant_reason", [] { return std::string(cpu::variant_reason()); });
  module.def("use_cpu_variant", &cpu::use_variant, py::arg("name"));
  module.def("thread_source", [] { return std::string(cpu::thread_source()); });
  module.def("cuda_is_built", &cuda::is_built);
  module.def("cuda_devices", &cuda_devices);
  module.attr("cuda_reason") = GRADSTAT_CUDA_REASON;
  module.attr("NUM_COLUMNS") = static_cast<int>(kNumColumns);
  module.attr("HISTOGRAM_BINS") = kHistogramBins;
}
