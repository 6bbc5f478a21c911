// The Python face of the kernels: unpack tensors, release the GIL, call, convert. Nothing else.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <iterator>
#include <memory>
#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "cpu/copies.h"
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

// Memory of an output that may be left out.
void* optional_memory(const py::object& tensor, const char* name, const TensorList& beside,
                      uint8_t code, uint8_t bits, int64_t at_least) {
  return tensor.is_none() ? nullptr : output_memory(tensor, name, beside, code, bits, at_least);
}

// What `moments` needs for clipping, as Python hands it over: one object for all steps of a run.
struct ClipArguments {
  Program program;
  py::object out;
  py::object state;
  py::object coefficients;
  py::object grad_scale;
  py::object norm_f32;
  py::object found_inf;
};

using StepTuple = std::tuple<int, std::vector<double>, int64_t>;

Program make_program(int norm_kind, int nonfinite, const std::vector<StepTuple>& steps) {
  if (steps.size() > kMaxPolicySteps) throw std::invalid_argument("too many policies");
  Program program = {};
  program.count = static_cast<int>(steps.size());
  program.norm_kind = static_cast<NormKind>(norm_kind);
  program.nonfinite = static_cast<Nonfinite>(nonfinite);
  for (size_t i = 0; i < steps.size(); ++i) {
    const auto& [kind, parameters, offset] = steps[i];
    PolicyStep& step = program.step[i];
    if (parameters.size() > std::size(step.param)) {
      throw std::invalid_argument("too many parameters of a policy");
    }
    step.kind = static_cast<PolicyKind>(kind);
    step.state = offset;
    std::copy(parameters.begin(), parameters.end(), step.param);
  }
  return program;
}

bool has_per_tensor_step(const Program& program) {
  return std::any_of(program.step, program.step + program.count, [](const PolicyStep& step) {
    return step.kind == PolicyKind::kPerLayer || step.kind == PolicyKind::kAdaGc;
  });
}

ClipRequest clip_request(const ClipArguments& clip, const TensorList& tensors, int64_t count) {
  const auto memory = [&](const py::object& tensor, const char* name, uint8_t bits, int64_t least) {
    return optional_memory(tensor, name, tensors, dlpack::kFloat, bits, least);
  };
  const ClipRequest request = {
      clip.program,
      static_cast<double*>(memory(clip.out, "out", 64, kNumClipOut)),
      static_cast<double*>(memory(clip.state, "state", 64, kNumClipCounters)),
      static_cast<double*>(memory(clip.coefficients, "coefficients", 64, count)),
      static_cast<const float*>(memory(clip.grad_scale, "grad_scale", 32, 1)),
      static_cast<float*>(memory(clip.norm_f32, "norm_f32", 32, 1)),
      static_cast<float*>(memory(clip.found_inf, "found_inf", 32, 1))};
  if (has_per_tensor_step(clip.program) && request.coefficients == nullptr) {
    throw std::invalid_argument("coefficients must be given for a policy of each tensor");
  }
  return request;
}

void moments(const TensorList& tensors, const py::object& table, const py::object& histogram,
             const ClipArguments* clip_arguments, const py::object& workspace,
             const py::object& counter, int threads) {
  require_regular(tensors);
  const int64_t rows = tensors.size() + 1;
  auto* table_at = static_cast<double*>(
      output_memory(table, "table", tensors, dlpack::kFloat, 64, rows * kNumColumns));
  auto* histogram_at = static_cast<int64_t*>(
      optional_memory(histogram, "histogram", tensors, kInt, 64, rows * kHistogramBins));
  const ClipRequest clip = clip_arguments != nullptr
                               ? clip_request(*clip_arguments, tensors, tensors.size())
                               : ClipRequest{};
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

// Rows of a window on the CPU that ordinary steps are measured into, checked once for all of them.
struct WindowRows {
  py::object tables;
  py::object decisions;
  ClipArguments clip;  // these three hold the memory that the rest points to
  ClipRequest request;
  double* tables_at;
  double* decisions_at;
  int64_t places;
  int64_t count;
};

constexpr char kWindowRows[] = "gradstat.WindowRows";

// Whether the gradients are measured. They are not, and nothing is written, where they lie
// elsewhere than on the CPU, or somebody has to look at one.
bool measure(const WindowRows& rows, PyObject* parameters, int64_t place, int threads) {
  const TensorList gradients(py::reinterpret_borrow<py::sequence>(parameters), true);
  if (gradients.size() != rows.count || gradients.present() == 0 || gradients.on_cuda() ||
      !gradients.irregular().empty() || !gradients.repeated().empty()) {
    return false;
  }
  if (place < 0 || place >= rows.places) throw std::invalid_argument("the window has no such row");
  ClipRequest request = rows.request;
  request.out = rows.decisions_at + place * kNumClipOut;
  double* table = rows.tables_at + place * (rows.count + 1) * kNumColumns;
  const py::gil_scoped_release_simple no_gil;
  cpu::moments(gradients.refs().data(), rows.count, table, nullptr, request, threads);
  return true;
}

PyObject* measure_from_python(PyObject* rows, PyObject* const* arguments, Py_ssize_t count) {
  try {
    if (count != 3) throw std::invalid_argument("measure takes parameters, place and threads");
    const Py_ssize_t place = PyLong_AsSsize_t(arguments[1]);
    const auto threads = static_cast<int>(PyLong_AsLong(arguments[2]));
    if (PyErr_Occurred() != nullptr) return nullptr;
    const auto* at = static_cast<WindowRows*>(PyCapsule_GetPointer(rows, kWindowRows));
    return PyBool_FromLong(measure(*at, arguments[0], place, threads));
  } catch (py::error_already_set& error) {
    error.restore();
  } catch (const std::exception& error) {
    PyErr_SetString(PyExc_RuntimeError, error.what());
  }
  return nullptr;
}

// A function of (parameters, place, threads) that measures gradients into these rows. It is plain C
// with its rows bound to it: once a training step has emptied the caches, pybind11's search for the
// types of its arguments takes as long as the moments of a small layer.
py::object measurer(const py::object& tables, const py::object& decisions,
                    const ClipArguments& clip) {
  static PyMethodDef method = {
      "measure", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(measure_from_python)),
      METH_FASTCALL, nullptr};
  const auto places = tables.attr("size")(0).cast<int64_t>();
  const auto n_rows = tables.attr("size")(1).cast<int64_t>();
  const TensorList on_cpu(py::list(), false);  // no tensors: what goes with them is on the CPU
  auto rows = std::make_unique<WindowRows>(
      WindowRows{tables, decisions, clip, {}, nullptr, nullptr, places, n_rows - 1});
  rows->clip.out = decisions;
  rows->clip.grad_scale = rows->clip.found_inf = py::none();
  rows->request = clip_request(rows->clip, on_cpu, rows->count);
  rows->tables_at = static_cast<double*>(
      output_memory(tables, "tables", on_cpu, dlpack::kFloat, 64, places * n_rows * kNumColumns));
  rows->decisions_at = static_cast<double*>(
      output_memory(decisions, "decisions", on_cpu, dlpack::kFloat, 64, places * kNumClipOut));
  const py::capsule holder(rows.get(), kWindowRows, [](PyObject* capsule) {
    delete static_cast<WindowRows*>(PyCapsule_GetPointer(capsule, kWindowRows));
  });
  rows.release();
  return py::reinterpret_steal<py::object>(PyCFunction_New(&method, holder.ptr()));
}

// The same decision from a finished table on the CPU, for tensors that no kernel reads.
void run_clip(const py::object& table, const ClipArguments& clip_arguments, int64_t count) {
  const TensorList on_cpu(py::list(), false);
  auto* table_at = static_cast<double*>(
      output_memory(table, "table", on_cpu, dlpack::kFloat, 64, (count + 1) * kNumColumns));
  cpu::run_clip(table_at, count, clip_request(clip_arguments, on_cpu, count));
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

void units(const TensorList& tensors, int active, double low_from, double low_to, double high_from,
           const py::object& counts, const py::object& row, const py::object& workspace,
           const py::object& counter, int threads) {
  require_regular(tensors);
  if (tensors.size() != 1) throw std::invalid_argument("units are counted of one tensor at a time");
  const TensorRef activation = tensors.refs().front();
  const UnitRule rule = {static_cast<ActiveRule>(active), low_from, low_to, high_from};
  auto* counts_at = static_cast<int64_t*>(
      output_memory(counts, "counts", tensors, kInt, 64, kNumUnitCounts * activation.rows));
  auto* row_at =
      static_cast<double*>(output_memory(row, "row", tensors, dlpack::kFloat, 64, kNumColumns));
  if (!tensors.on_cuda()) {
    const py::gil_scoped_release no_gil;
    cpu::units(activation, rule, counts_at, row_at, threads);
    return;
  }
  void* workspace_at = output_memory(workspace, "workspace", tensors, kUInt, 8,
                                     cuda::units_workspace_bytes(activation));
  auto* counter_at =
      static_cast<uint32_t*>(output_memory(counter, "counter", tensors, kInt, 32, 1));
  void* stream = tensors.current_stream();
  const py::gil_scoped_release no_gil;
  cuda::units(activation, rule, counts_at, row_at, workspace_at, counter_at, tensors.device_id(),
              stream);
}

int64_t units_workspace_bytes(const TensorList& tensors) {
  return tensors.on_cuda() ? cuda::units_workspace_bytes(tensors.refs().front()) : 0;
}

// Copies of tensors; null where their change can only be told with torch.
std::unique_ptr<cpu::Copies> copies(const py::sequence& tensors) {
  const TensorList list(tensors, false);
  if (list.on_cuda() || !list.irregular().empty() || !cpu::Copies::can_hold(list.refs())) {
    return nullptr;
  }
  return std::make_unique<cpu::Copies>(list.refs());
}

bool changes(cpu::Copies& copies, const py::sequence& tensors, const py::object& table,
             int threads) {
  const TensorList now(tensors, false);
  if (now.on_cuda() || !now.irregular().empty()) return false;
  auto* table_at = static_cast<double*>(
      output_memory(table, "table", now, dlpack::kFloat, 64, (2 * now.size() + 1) * kNumColumns));
  const py::gil_scoped_release no_gil;
  return copies.changes(now.refs(), table_at, threads);
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
      .def_property_readonly("n_present", &TensorList::present)
      .def_property_readonly("on_cuda", &TensorList::on_cuda)
      .def_property_readonly("device_index", &TensorList::device_id)
      .def_property_readonly("objects", &TensorList::objects);

  py::class_<ClipArguments>(module, "Clip")
      .def(py::init([](int norm_kind, int nonfinite, const std::vector<StepTuple>& steps) {
             const py::none none;
             return ClipArguments{
                 make_program(norm_kind, nonfinite, steps), none, none, none, none, none, none};
           }),
           py::arg("norm_kind"), py::arg("nonfinite"), py::arg("steps"))
      .def_readwrite("out", &ClipArguments::out)
      .def_readwrite("state", &ClipArguments::state)
      .def_readwrite("coefficients", &ClipArguments::coefficients)
      .def_readwrite("grad_scale", &ClipArguments::grad_scale)
      .def_readwrite("norm_f32", &ClipArguments::norm_f32)
      .def_readwrite("found_inf", &ClipArguments::found_inf);

  py::class_<cpu::Copies>(module, "Copies")
      .def("changes", &changes, py::arg("tensors"), py::arg("table"), py::arg("threads"));
  module.def("copies", &copies, py::arg("tensors"));

  module.def("register_tensor_types", &register_tensor_types, py::arg("types"));
  module.def("moments", &moments, py::arg("tensors"), py::arg("table"),
             py::arg("histogram") = py::none(), py::arg("clip") = py::none(),
             py::arg("workspace") = py::none(), py::arg("counter") = py::none(),
             py::arg("threads") = 1);
  module.def("measurer", &measurer, py::arg("tables"), py::arg("decisions"), py::arg("clip"));
  module.def("run_clip", &run_clip, py::arg("table"), py::arg("clip"), py::arg("count"));
  module.def("moments_workspace_bytes", &moments_workspace_bytes, py::arg("tensors"));
  module.def("scale", &scale, py::arg("tensors"), py::arg("coefficient"), py::arg("per_tensor"),
             py::arg("threads") = 1);
  module.def("clamp", &clamp, py::arg("tensors"), py::arg("limit"), py::arg("threads") = 1);

  module.def("units", &units, py::arg("tensors"), py::arg("active"), py::arg("low_from"),
             py::arg("low_to"), py::arg("high_from"), py::arg("counts"), py::arg("row"),
             py::arg("workspace") = py::none(), py::arg("counter") = py::none(),
             py::arg("threads") = 1);
  module.def("units_workspace_bytes", &units_workspace_bytes, py::arg("tensors"));

  module.def("cpu_variants", &cpu_variants);
  module.def("cpu_variant", [] { return std::string(cpu::variant().name); });
  module.def("cpu_variant_reason", [] { return std::string(cpu::variant_reason()); });
  module.def("use_cpu_variant", &cpu::use_variant, py::arg("name"));
  module.def("thread_source", [] { return std::string(cpu::thread_source()); });
  module.def("cuda_is_built", &cuda::is_built);
  module.def("cuda_devices", &cuda_devices);
  module.attr("cuda_reason") = GRADSTAT_CUDA_REASON;
  module.attr("NUM_CLIP_OUT") = static_cast<int>(kNumClipOut);
  module.attr("NUM_CLIP_COUNTERS") = static_cast<int>(kNumClipCounters);
  module.attr("NUM_COLUMNS") = static_cast<int>(kNumColumns);
  module.attr("HISTOGRAM_BINS") = kHistogramBins;
}
