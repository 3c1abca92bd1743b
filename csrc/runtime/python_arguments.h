// Lists from Python, read without the binding's casters: one costs 40 ns an element, as much as all else of a call.
#pragma once

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <cstdint>
#include <memory>
#include <string>
#include <variant>
#include <vector>

#include "runtime/sequence.h"

namespace duplex::runtime {

namespace py = pybind11;

using Tokens = std::vector<int32_t>;

inline std::string type_name(py::handle x) { return Py_TYPE(x.ptr())->tp_name; }

inline int32_t token_id(long long id) {
  if (id < 0 || id > INT32_MAX)
    throw std::invalid_argument("tokens: expected ids from 0 to 2147483647, got " + std::to_string(id));
  return int32_t(id);
}

// Owns the item: its __index__ may take it from the list that held it.
inline long long index_of(const py::object& item, int* overflow) {
  const long long id = PyLong_AsLongLongAndOverflow(item.ptr(), overflow);
  if (id == -1 && PyErr_ExceptionMatches(PyExc_TypeError)) {
    PyErr_Clear();
    throw py::type_error("tokens: expected integers, got " + type_name(item));
  }
  if (id == -1 && PyErr_Occurred()) throw py::error_already_set();
  return id;
}

// Token ids: a list or tuple of ints, or a numpy array of integers.
inline Tokens ids_of(py::handle tokens) {
  Tokens ids;
  if (PyList_Check(tokens.ptr()) || PyTuple_Check(tokens.ptr())) {
    ids.resize(PySequence_Fast_GET_SIZE(tokens.ptr()));
    for (size_t n = 0; n < ids.size(); ++n) {
      // an element's __index__ may change the list
      if (size_t(PySequence_Fast_GET_SIZE(tokens.ptr())) != ids.size())
        throw std::invalid_argument("tokens: expected a list, got one that changes while it is read");
      int overflow = 0;
      PyObject* const item = PySequence_Fast_GET_ITEM(tokens.ptr(), n);
      const long long id = PyLong_CheckExact(item) ? PyLong_AsLongLongAndOverflow(item, &overflow)
                                                   : index_of(py::reinterpret_borrow<py::object>(item), &overflow);
      ids[n] = token_id(overflow ? -1 : id);
    }
    return ids;
  }
  if (!py::isinstance<py::array>(tokens))
    throw py::type_error("tokens: expected a list, array or tensor of ints, got " + type_name(tokens));
  const auto array = py::reinterpret_borrow<py::array>(tokens);
  const char kind = array.dtype().kind();
  if (kind != 'i' && kind != 'u')
    throw py::type_error("tokens: expected integers, got " + std::string(py::str(array.dtype())));
  if (array.ndim() != 1)
    throw std::invalid_argument("tokens: expected one dimension, got " + std::to_string(array.ndim()));
  const auto wide = py::array_t<int64_t, py::array::c_style | py::array::forcecast>(array);
  ids.resize(wide.size());
  for (size_t n = 0; n < ids.size(); ++n) ids[n] = token_id(wide.data()[n]);
  return ids;
}

// The same, or how many.
inline std::variant<int64_t, Tokens> count_or_ids_of(py::handle tokens) {
  if (!PyIndex_Check(tokens.ptr()) || py::isinstance<py::array>(tokens)) return ids_of(tokens);
  const py::ssize_t count = PyNumber_AsSsize_t(tokens.ptr(), nullptr);  // clipped to its range
  if (count == -1 && PyErr_Occurred()) throw py::error_already_set();
  return int64_t(count);
}

// Sequences, of a list or tuple. The bound class is final and holds a shared_ptr, so its own type is all to look at.
inline std::vector<std::shared_ptr<Sequence>> sequences_of(py::handle seqs) {
  static PyTypeObject* const type = reinterpret_cast<PyTypeObject*>(py::type::of<Sequence>().ptr());
  if (!PyList_Check(seqs.ptr()) && !PyTuple_Check(seqs.ptr()))
    throw py::type_error("seqs: expected a list or tuple of sequences, got " + type_name(seqs));
  std::vector<std::shared_ptr<Sequence>> found(PySequence_Fast_GET_SIZE(seqs.ptr()));
  for (size_t n = 0; n < found.size(); ++n) {
    PyObject* item = PySequence_Fast_GET_ITEM(seqs.ptr(), n);
    if (Py_TYPE(item) != type) throw py::type_error("seqs: expected sequences of a cache, got " + type_name(item));
    found[n] =
        reinterpret_cast<py::detail::instance*>(item)->get_value_and_holder().holder<std::shared_ptr<Sequence>>();
  }
  return found;
}

}  // namespace duplex::runtime
