#include "bind_direct.hpp"

#include <pybind11/stl.h>

#include <algorithm>
#include <cstdint>
#include <utility>
#include <vector>

namespace py = pybind11;

namespace moeyard {
namespace {

// Looks at torch through its Python functions alone: this module is not linked to torch, so that one build serves many
// versions of it.
class PlainCalls {
 public:
  using Types = std::vector<py::type>;
  using KeySets = std::vector<uint64_t>;

  PlainCalls(std::vector<Types> allowed, Types tensors, py::function keys_of, KeySets plain, py::function keys_added,
             KeySets no_mode)
      : allowed_(std::move(allowed)),
        tensors_(std::move(tensors)),
        keys_of_(std::move(keys_of)),
        keys_added_(std::move(keys_added)),
        plain_(std::move(plain)),
        no_mode_(std::move(no_mode)) {}

  /// Whether a tensor among the arguments requires a gradient; None unless all arguments and this thread are plain.
  py::object operator()(const py::tuple& args) const {
    if (args.size() != allowed_.size() || !is_one_of(PyObject_CallNoArgs(keys_added_.ptr()), no_mode_))
      return py::none();
    bool gradient = false;
    for (size_t i = 0; i < args.size(); ++i) {
      PyObject* const value = PyTuple_GET_ITEM(args.ptr(), py::ssize_t(i));
      if (!is_of(value, allowed_[i])) return py::none();
      if (PyLong_CheckExact(value)) {
        int overflow = 0;
        PyLong_AsLongLongAndOverflow(value, &overflow);
        if (overflow) return py::none();
      } else if (is_of(value, tensors_)) {
        if (!is_one_of(PyObject_CallOneArg(keys_of_.ptr(), value), plain_)) return py::none();
        gradient = gradient || py::object(py::handle(value).attr(requires_grad_)).ptr() == Py_True;
      }
    }
    return py::bool_(gradient);
  }

 private:
  static bool is_of(PyObject* value, const Types& types) {
    const auto* const type = reinterpret_cast<PyObject*>(Py_TYPE(value));
    return std::any_of(types.begin(), types.end(), [&](const py::type& t) { return t.ptr() == type; });
  }

  // `new_keys` is a torch.DispatchKeySet that a call has returned.
  bool is_one_of(PyObject* new_keys, const KeySets& sets) const {
    const auto keys = owned(new_keys);
    const auto bits = owned(PyObject_CallMethodNoArgs(keys.ptr(), raw_repr_.ptr()));
    const uint64_t word = PyLong_AsUnsignedLongLong(bits.ptr());
    if (PyErr_Occurred()) throw py::error_already_set();
    return std::find(sets.begin(), sets.end(), word) != sets.end();
  }

  // Python finds attributes faster by the one copy of a name that it uses itself.
  static py::str interned(const char* name) { return py::reinterpret_steal<py::str>(PyUnicode_InternFromString(name)); }

  static py::object owned(PyObject* result) {
    if (!result) throw py::error_already_set();
    return py::reinterpret_steal<py::object>(result);
  }

  std::vector<Types> allowed_;  // of each argument, as exact types
  Types tensors_;
  py::function keys_of_, keys_added_;
  KeySets plain_, no_mode_;
  py::str requires_grad_ = interned("requires_grad"), raw_repr_ = interned("raw_repr");
};

}  // namespace

void bind_direct(py::module_& m) {
  using Types = PlainCalls::Types;
  using KeySets = PlainCalls::KeySets;
  py::class_<PlainCalls>(m, "PlainCalls")
      .def(py::init<std::vector<Types>, Types, py::function, KeySets, py::function, KeySets>(), py::arg("allowed"),
           py::arg("tensors"), py::arg("keys_of"), py::arg("plain"), py::arg("keys_added"), py::arg("no_mode"))
      .def("__call__", &PlainCalls::operator(), py::arg("args"));
}

}  // namespace moeyard
