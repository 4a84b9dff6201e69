#pragma once
// How an operator's launches become functions of the module: structures are filled in the order of the arguments.
#include <pybind11/pybind11.h>

#include <string>
#include <tuple>
#include <type_traits>

#include "portable.h"

namespace genfuse {

// The memory of a tensor, or null for None. Nothing here depends on the version of PyTorch: a tensor is whatever has
// the methods data_ptr() and numel(). The caller keeps it alive.
struct Array {
  void* data = nullptr;

  template <class T>
  operator T*() const {
    return static_cast<T*>(data);
  }
};

#ifdef GENFUSE_CUDA
// Makes `device` current for as long as it lives: a launch goes to the current device, whatever its pointers.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device);
  ~DeviceGuard();

 private:
  int device_, previous_;
};
#endif

// Runs an operator on the CPU (device -1) or on a GPU, without the interpreter's lock.
template <class Problem, class Out>
void run(const Problem& problem, const Out& out, [[maybe_unused]] int device, [[maybe_unused]] uintptr_t stream) {
  pybind11::gil_scoped_release nogil;
#ifdef GENFUSE_CUDA
  if (device >= 0) {
    DeviceGuard guard(device);
    return run_cuda(problem, out, reinterpret_cast<void*>(stream));
  }
#endif
  run_cpu(problem, out);
}

template <class Member>
using argument_t = std::conditional_t<std::is_pointer_v<Member>, Array, Member>;

// Members of a structure, in the order in which Python gives them.
template <class Struct, class... Members>
struct Fields {
  std::tuple<Members Struct::*...> members;

  Struct fill(argument_t<Members>... values) const {
    Struct result{};
    std::apply([&](auto... member) { ((result.*member = values), ...); }, members);
    return result;
  }
};
template <class Struct, class... Members>
Fields<Struct, Members...> fields(Members Struct::*... members) {
  return {{members...}};
}
// The same for a structure that has some of them from its bases.
template <class Struct, class... Bases, class... Members>
Fields<Struct, Members...> fields_of(Members Bases::*... members) {
  return {{members...}};
}

// Defines `name(problem..., out..., device, stream)`, which calls run_cpu(problem, out) or run_cuda(problem, out,
// stream) of the operator's namespace.
template <class Problem, class... P, class Out, class... O>
void define(pybind11::module_& m, const char* name, Fields<Problem, P...> problem, Fields<Out, O...> out) {
  m.def(name, [=](argument_t<P>... of_problem, argument_t<O>... of_out, int device, uintptr_t stream) {
    run(problem.fill(of_problem...), out.fill(of_out...), device, stream);
  });
}

}  // namespace genfuse

template <>
struct pybind11::detail::type_caster<genfuse::Array> {
  PYBIND11_TYPE_CASTER(genfuse::Array, const_name("torch.Tensor | None"));

  bool load(handle tensor, bool) {
    static PyObject *const data_ptr = PyUnicode_InternFromString("data_ptr"), *const numel =
                                                                                  PyUnicode_InternFromString("numel");
    if (tensor.is_none()) return true;
    value.data = PyLong_AsVoidPtr(call(tensor, data_ptr).ptr());
    if (value.data) return true;
    if (PyErr_Occurred()) throw error_already_set();
    if (call(tensor, numel).equal(int_(0))) return true;
    throw buffer_error(type_of(tensor) + " has no memory (a fake, sparse or zero tensor)");
  }

 private:
  static object call(handle tensor, PyObject* method) {
    PyObject* const result = PyObject_CallMethodNoArgs(tensor.ptr(), method);
    if (!result && PyErr_ExceptionMatches(PyExc_AttributeError)) {
      raise_from(PyExc_TypeError, ("expected a tensor or None, got " + type_of(tensor)).c_str());
    }
    if (!result && PyErr_ExceptionMatches(PyExc_RuntimeError)) {  // as of what torch.func wraps
      raise_from(PyExc_BufferError, (type_of(tensor) + " has no memory").c_str());
    }
    if (!result) throw error_already_set();
    return reinterpret_steal<object>(result);
  }
  static std::string type_of(handle value) { return Py_TYPE(value.ptr())->tp_name; }
};

template <class T>
struct pybind11::detail::type_caster<genfuse::List<T>> {
  PYBIND11_TYPE_CASTER(genfuse::List<T>, const_name("Sequence"));

  bool load(handle values, bool convert) {
    if (!isinstance<sequence>(values)) return false;
    for (handle one : reinterpret_borrow<sequence>(values)) {
      if (value.count == genfuse::kMostListed)
        throw value_error("expected a list of at most " + std::to_string(genfuse::kMostListed) + ", got a longer one");
      make_caster<genfuse::argument_t<T>> item;
      if (!item.load(one, convert)) return false;
      value.items[value.count++] = cast_op<genfuse::argument_t<T>&>(item);
    }
    return true;
  }
};
