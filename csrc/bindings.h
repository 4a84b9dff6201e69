#pragma once
// How an operator's launches become functions of the module: structures are filled in the order of the arguments.
#include <pybind11/pybind11.h>

#include <stdexcept>
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

#ifdef GENFUSE_CUDA
template <class Problem, class Out, class = void>
constexpr bool has_cuda = false;
template <class Problem, class Out>
constexpr bool has_cuda<Problem, Out,
                        std::void_t<decltype(run_cuda(std::declval<const Problem&>(), std::declval<const Out&>(),
                                                      static_cast<void*>(nullptr)))>> = true;
#endif

// Runs an operator on the CPU (device -1) or on a GPU, without the interpreter's lock.
template <class Problem, class Out>
void run(const Problem& problem, const Out& out, [[maybe_unused]] int device, [[maybe_unused]] uintptr_t stream) {
  pybind11::gil_scoped_release nogil;
#ifdef GENFUSE_CUDA
  if (device >= 0) {
    if constexpr (has_cuda<Problem, Out>) {
      DeviceGuard guard(device);
      return run_cuda(problem, out, reinterpret_cast<void*>(stream));
    } else {
      throw std::invalid_argument("this operator has no CUDA kernel");
    }
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

// A function of the module that fills both structures and runs the operator. Python calls it as it is: pybind11's
// choice among overloads, of which there is one, takes as long as a small launch.
template <class Problem, class Out>
struct Launch;
template <class Problem, class... P, class Out, class... O>
struct Launch<Fields<Problem, P...>, Fields<Out, O...>> {
  Fields<Problem, P...> problem;
  Fields<Out, O...> out;
  PyMethodDef method;

  static PyObject* call(PyObject* self, PyObject* const* given, Py_ssize_t count) {
    const auto& launch = *static_cast<const Launch*>(PyCapsule_GetPointer(self, nullptr));
    try {
      constexpr Py_ssize_t takes = sizeof...(P) + sizeof...(O) + 2;
      if (count != takes) {
        throw pybind11::type_error(std::string(launch.method.ml_name) + " takes " + std::to_string(takes) +
                                   " arguments, got " + std::to_string(count));
      }
      launch.run(given, std::index_sequence_for<P...>(), std::index_sequence_for<O...>());
      Py_RETURN_NONE;
    } catch (pybind11::error_already_set& error) {
      error.restore();
    } catch (const pybind11::builtin_exception& error) {
      error.set_error();
    } catch (const std::exception& error) {
      PyErr_SetString(PyExc_RuntimeError, error.what());
    }
    return nullptr;
  }

 private:
  template <class T>
  T argument(PyObject* const* given, size_t i) const {
    pybind11::detail::make_caster<T> caster;
    if (!caster.load(given[i], true)) {
      throw pybind11::type_error(std::string(method.ml_name) + ": argument " + std::to_string(i) + " must not be " +
                                 Py_TYPE(given[i])->tp_name);
    }
    return pybind11::detail::cast_op<T>(caster);
  }
  template <size_t... I, size_t... J>
  void run(PyObject* const* given, std::index_sequence<I...>, std::index_sequence<J...>) const {
    constexpr size_t p = sizeof...(P), o = sizeof...(O);
    genfuse::run(problem.fill(argument<argument_t<P>>(given, I)...), out.fill(argument<argument_t<O>>(given, p + J)...),
                 argument<int>(given, p + o), argument<uintptr_t>(given, p + o + 1));
  }
};

// Defines `name(problem..., out..., device, stream)`, which calls run_cpu(problem, out) or run_cuda(problem, out,
// stream) of the operator's namespace.
template <class Problem, class Out>
void define(pybind11::module_& m, const char* name, Problem problem, Out out) {
  auto* const launch = new Launch<Problem, Out>{problem, out, {name, nullptr, METH_FASTCALL, nullptr}};  // for ever
  launch->method.ml_meth = reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(&Launch<Problem, Out>::call));
  const pybind11::capsule self(launch);
  m.add_object(name, pybind11::reinterpret_steal<pybind11::object>(
                         PyCFunction_NewEx(&launch->method, self.ptr(), m.attr("__name__").ptr())));
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
    value.count = 0;
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
