// Python bindings of the CPU kernels. The kernels themselves know nothing of Python.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <cmath>
#include <limits>
#include <optional>
#include <stdexcept>
#include <string>

#include "kernels.h"

namespace py = pybind11;
using namespace lada_rt;

namespace {

using Floats = py::array_t<float, py::array::c_style>;
using Longs = py::array_t<int64_t, py::array::c_style>;
using Ints = py::array_t<int32_t, py::array::c_style>;

std::string shape_of(const py::array& a) {
  std::string s = "[";
  for (py::ssize_t i = 0; i < a.ndim(); ++i) s += (i ? ", " : "") + std::to_string(a.shape(i));
  return s + "] " + std::string(py::str(a.dtype()));
}

// An array of exactly dtype T with the given shape; made contiguous if it is not.
template <typename T>
py::array_t<T, py::array::c_style> want(const py::object& object, const char* name, std::vector<py::ssize_t> shape) {
  std::string expected = std::string(name) + " [";
  for (size_t i = 0; i < shape.size(); ++i) expected += (i ? ", " : "") + std::to_string(shape[i]);
  expected += "] " + std::string(py::str(py::dtype::of<T>()));
  if (!py::isinstance<py::array>(object)) {
    throw std::invalid_argument("expected a numpy array " + expected + ", got " +
                                std::string(py::str(py::type::of(object).attr("__name__"))));
  }
  const py::array a = py::reinterpret_borrow<py::array>(object);
  bool same = a.dtype().equal(py::dtype::of<T>()) && a.ndim() == static_cast<py::ssize_t>(shape.size());
  for (size_t i = 0; same && i < shape.size(); ++i) same = a.shape(static_cast<py::ssize_t>(i)) == shape[i];
  if (!same) throw std::invalid_argument("expected " + expected + ", got " + shape_of(a));
  return py::array_t<T, py::array::c_style>(a);
}

// Any Python integer; the low 64 bits are the Philox key.
uint64_t seed_of(const py::int_& seed) {
  const uint64_t key = PyLong_AsUnsignedLongLongMask(seed.ptr());
  if (PyErr_Occurred()) throw py::error_already_set();
  return key;
}

uint32_t word_of(int64_t value, const char* name) {
  if (value < 0 || value > std::numeric_limits<uint32_t>::max()) {
    throw std::invalid_argument(std::string("expected ") + name + " in [0, 2^32), got " + std::to_string(value));
  }
  return static_cast<uint32_t>(value);
}

// logits [R, V] float32 or float16, or uint16 holding bfloat16 bits. Rows may be strided; `holder` keeps them alive.
Logits logits_of(const py::array& given, py::array* holder) {
  if (given.ndim() != 2) throw std::invalid_argument("expected logits [R, V], got " + shape_of(given));
  Logits logits{};
  if (given.dtype().equal(py::dtype::of<float>())) {
    logits.type = LogitsType::kFloat32;
  } else if (given.dtype().equal(py::dtype("float16"))) {
    logits.type = LogitsType::kFloat16;
  } else if (given.dtype().equal(py::dtype::of<uint16_t>())) {
    logits.type = LogitsType::kBFloat16;
  } else {
    throw std::invalid_argument("expected logits as float32, float16, or uint16 holding bfloat16 bits, got " +
                                shape_of(given));
  }
  const py::ssize_t item = given.itemsize();
  const bool dense_rows = given.shape(1) <= 1 || given.strides(1) == item;
  const bool whole_items = given.strides(0) % item == 0 && reinterpret_cast<uintptr_t>(given.data()) % item == 0;
  *holder = dense_rows && whole_items ? given : py::array::ensure(given.attr("copy")("C"));
  logits.data = holder->data();
  logits.rows = holder->shape(0);
  logits.vocab = holder->shape(1);
  logits.row_stride = holder->strides(0) / item;
  return logits;
}

SampleParams sample_params(const py::int_& seed, int64_t step, int64_t top_k, double top_p, double temperature) {
  if (!(temperature > 0.0) || !std::isfinite(temperature)) {
    throw std::invalid_argument("expected a finite temperature above 0, got " + std::to_string(temperature));
  }
  return {seed_of(seed), word_of(step, "step"), top_k, static_cast<float>(top_p), static_cast<float>(1.0 / temperature)};
}

py::tuple py_sample(const py::array& given, const py::object& positions, const py::int_& seed, int64_t step,
                    int64_t top_k, double top_p, double temperature, const py::object& exp_noise, int n_threads) {
  py::array holder;
  const Logits logits = logits_of(given, &holder);
  const Longs at = want<int64_t>(positions, "positions", {logits.rows});
  const SampleParams params = sample_params(seed, step, top_k, top_p, temperature);
  Floats noise;
  if (!exp_noise.is_none()) noise = want<float>(exp_noise, "exp_noise", {logits.rows, logits.vocab});
  Ints tokens(logits.rows);
  Floats log_confidence(logits.rows);
  const int64_t* at_data = at.data();
  const float* noise_data = exp_noise.is_none() ? nullptr : noise.data();
  int32_t* tokens_data = tokens.mutable_data();
  float* confidence_data = log_confidence.mutable_data();
  {
    py::gil_scoped_release release;
    sample(logits, at_data, params, noise_data, n_threads, tokens_data, confidence_data);
  }
  return py::make_tuple(tokens, log_confidence);
}

Floats py_filtered_probs(const py::array& given, int64_t top_k, double top_p, double temperature, int n_threads) {
  py::array holder;
  const Logits logits = logits_of(given, &holder);
  const SampleParams params = sample_params(py::int_(0), 0, top_k, top_p, temperature);
  Floats probs({logits.rows, logits.vocab});
  float* data = probs.mutable_data();
  {
    py::gil_scoped_release release;
    filtered_probs(logits, params, n_threads, data);
  }
  return probs;
}

Longs py_remask(const py::object& codes, const py::object& rows, const py::object& tokens,
                const py::object& log_confidence, int64_t n_masked, double tau, const std::string& strategy,
                int64_t mask_id, const py::int_& seed, int64_t step, const py::object& noise) {
  if (!py::isinstance<py::array>(codes)) throw std::invalid_argument("expected codes as a numpy array [T] int64");
  const py::array given = py::reinterpret_borrow<py::array>(codes);
  if (given.ndim() != 1 || !given.dtype().equal(py::dtype::of<int64_t>()) || !(given.flags() & py::array::c_style) ||
      !given.writeable()) {
    throw std::invalid_argument("expected codes [T] int64, contiguous and writeable, got " + shape_of(given));
  }
  Longs codes_out = py::reinterpret_borrow<Longs>(given);
  const int64_t n_codes = given.shape(0);
  if (!py::isinstance<py::array>(rows) || py::reinterpret_borrow<py::array>(rows).ndim() != 1) {
    throw std::invalid_argument("expected rows as a numpy array [R] int64");
  }
  const int64_t n_rows = py::reinterpret_borrow<py::array>(rows).shape(0);
  const Longs rows_in = want<int64_t>(rows, "rows", {n_rows});
  const Ints tokens_in = want<int32_t>(tokens, "tokens", {n_rows});
  const Floats confidence_in = want<float>(log_confidence, "log_confidence", {n_rows});
  Floats noise_in;
  if (!noise.is_none()) noise_in = want<float>(noise, "noise", {n_codes});

  RemaskParams params{};
  params.n_masked = n_masked;
  params.tau = static_cast<float>(tau);
  if (strategy == "low_confidence") {
    params.strategy = Strategy::kLowConfidence;
  } else if (strategy == "random") {
    params.strategy = Strategy::kRandom;
  } else if (strategy == "fixed_position") {
    params.strategy = Strategy::kFixedPosition;
  } else {
    throw std::invalid_argument("expected strategy low_confidence, random or fixed_position, got " + strategy);
  }
  params.mask_id = mask_id;
  params.seed = seed_of(seed);
  params.step = word_of(step, "step");
  if (n_masked < 0 || n_masked > n_rows) {
    throw std::invalid_argument("expected 0 <= n_masked <= " + std::to_string(n_rows) + " masked rows, got " +
                                std::to_string(n_masked));
  }
  Longs rows_next(n_masked);
  int64_t* codes_data = codes_out.mutable_data();
  const float* noise_data = noise.is_none() ? nullptr : noise_in.data();
  const int64_t* rows_data = rows_in.data();
  const int32_t* tokens_data = tokens_in.data();
  const float* confidence_data = confidence_in.data();
  int64_t* next_data = rows_next.mutable_data();
  {
    py::gil_scoped_release release;
    remask(codes_data, n_codes, rows_data, tokens_data, confidence_data, n_rows, params, noise_data, next_data);
  }
  return rows_next;
}

std::array<uint32_t, 4> py_philox4x32(const std::array<uint32_t, 4>& counter, const std::array<uint32_t, 2>& key) {
  std::array<uint32_t, 4> out{};
  philox_block(counter.data(), (static_cast<uint64_t>(key[1]) << 32) | key[0], out.data());
  return out;
}

Floats py_philox_normal(const py::int_& seed, int64_t window, const std::vector<py::ssize_t>& shape) {
  for (const py::ssize_t n : shape) {
    if (n < 0) throw std::invalid_argument("expected a shape without negative sizes, got " + std::to_string(n));
  }
  const uint32_t counter_word = word_of(window, "window");
  const uint64_t key = seed_of(seed);
  Floats out(shape);
  float* data = out.mutable_data();
  const int64_t n = out.size();
  {
    py::gil_scoped_release release;
    philox_normal(key, counter_word, n, data);
  }
  return out;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "CPU kernels of lada-rt";
  m.attr("MAX_VOCAB") = kMaxVocab;

  // Bad arguments surface as the package's own ParamError, which is a ValueError.
  py::register_local_exception_translator([](std::exception_ptr pointer) {
    try {
      if (pointer) std::rethrow_exception(pointer);
    } catch (const std::invalid_argument& error) {
      const py::object type = py::module_::import("lada_rt.errors").attr("ParamError");
      PyErr_SetString(type.ptr(), error.what());
    }
  });

  m.def("sample", &py_sample, py::arg("logits"), py::arg("positions"), py::kw_only(), py::arg("seed"), py::arg("step"),
        py::arg("top_k"), py::arg("top_p"), py::arg("temperature"), py::arg("exp_noise") = py::none(),
        py::arg("n_threads") = 0,
        "Draw one token per row of logits [R, V]; returns (tokens int32 [R], log_confidence float32 [R]).");
  m.def("filtered_probs", &py_filtered_probs, py::arg("logits"), py::kw_only(), py::arg("top_k"), py::arg("top_p"),
        py::arg("temperature"), py::arg("n_threads") = 0,
        "Probabilities float32 [R, V] of the distribution that `sample` draws from.");
  m.def("remask", &py_remask, py::arg("codes"), py::arg("rows"), py::arg("tokens"), py::arg("log_confidence"),
        py::kw_only(), py::arg("n_masked"), py::arg("tau"), py::arg("strategy"), py::arg("mask_id"), py::arg("seed"),
        py::arg("step"), py::arg("noise") = py::none(),
        "Commit tokens into codes int64 [T] in place; returns the rows that stay masked, int64 [n_masked].");
  m.def("philox4x32", &py_philox4x32, py::arg("counter"), py::arg("key"), "One Philox4x32-10 block.");
  m.def("philox_normal", &py_philox_normal, py::arg("seed"), py::arg("window"), py::arg("shape"),
        "Standard normals float32 for one window of the flow decoder.");
}
