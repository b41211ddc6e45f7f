// What an operator sees of ONNX Runtime: its inputs, outputs, attributes and threads. Included by ops.cc alone.
// Knows: the runtime's calls. Refuses to know: operators.
#pragma once
#include <cstdlib>
#include <string>
#include <vector>

#include "kernels.h"
#include "ort_abi.h"

namespace {


using kernels::Table;
using Shape = std::vector<int64_t>;

const ort::Api* api;
const Table* table;

constexpr int64_t MANY_ROWS = 16;  // from here on rows are quantised and rotated by all threads

template <typename R, typename... A>
R call(ort::Place place, A... arguments) {
  return reinterpret_cast<R (*)(A...)>(api->functions[place])(arguments...);
}

struct Failure {
  std::string text;
};

void* status(const Failure& failure) { return call<void*, int, const char*>(ort::CREATE_STATUS, ort::INVALID_ARGUMENT, failure.text.c_str()); }

void check(void* status) {
  if (status) throw status;
}

struct Context {
  void* context;

  void* input(size_t i) const {
    void* value = nullptr;
    check(call<void*, void*, size_t, void**>(ort::GET_INPUT, context, i, &value));
    return value;
  }
  template <typename T>
  T* data(void* value) const {
    void* p = nullptr;
    check(call<void*, void*, void**>(ort::TENSOR_DATA, value, &p));
    return static_cast<T*>(p);
  }
  Shape shape(void* value) const {
    void* info = nullptr;
    check(call<void*, void*, void**>(ort::TYPE_AND_SHAPE, value, &info));
    size_t rank = 0;
    check(call<void*, void*, size_t*>(ort::DIMENSIONS_COUNT, info, &rank));
    Shape dims(rank);
    check(call<void*, void*, int64_t*, size_t>(ort::DIMENSIONS, info, dims.data(), rank));
    call<void, void*>(ort::RELEASE_TYPE_AND_SHAPE, info);
    return dims;
  }
  template <typename T = float>
  T* output(size_t i, const Shape& dims) const {
    void* value = nullptr;
    check(call<void*, void*, size_t, const int64_t*, size_t, void**>(ort::GET_OUTPUT, context, i, dims.data(), dims.size(), &value));
    return data<T>(value);
  }
  template <typename W>
  void parallel(size_t total, W& work) const {
    if (total == 1) return work(0);
    auto run = [](void* w, size_t i) { (*static_cast<W*>(w))(i); };
    check(call<void*, void*, void (*)(void*, size_t), size_t, size_t, void*>(ort::PARALLEL_FOR, context, run, total, 0, &work));
  }
};

int64_t attribute(const void* info, const char* name) {
  int64_t value = 0;
  check(call<void*, const void*, const char*, int64_t*>(ort::ATTRIBUTE_INT, info, name, &value));
  return value;
}

float attribute_float(const void* info, const char* name) {
  float value = 0;
  check(call<void*, const void*, const char*, float*>(ort::ATTRIBUTE_FLOAT, info, name, &value));
  return value;
}

// A growing buffer of the calling thread, aligned for any vector.
struct Scratch {
  char* data = nullptr;
  size_t size = 0;
  ~Scratch() { std::free(data); }
  char* take(size_t bytes) {
    if (bytes > size) {
      std::free(data);
      size = (bytes + 4095) / 4096 * 4096;
      data = static_cast<char*>(std::aligned_alloc(64, size));
      if (!data) throw Failure{"no memory for " + std::to_string(size) + " bytes of scratch."};
    }
    return data;
  }
};
thread_local Scratch scratch, more;

}  // namespace
