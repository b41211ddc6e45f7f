// The part of ONNX Runtime's C ABI that a library of custom operators calls. The runtime's wheel carries no headers; its
// table of functions only ever grows at its end, so a function's place in it is a constant.
// Knows: places and signatures, of API version 24. Refuses to know: what any operator computes.
#pragma once
#include <cstddef>
#include <cstdint>

namespace ort {

constexpr uint32_t API_VERSION = 24;

using Function = void (*)();

struct Api {
  Function functions[300];  // the runtime's own table may be longer
};

struct ApiBase {
  const Api* (*get)(uint32_t version);
  const char* (*version)();
};

enum Place {
  CREATE_STATUS = 0,
  CREATE_DOMAIN = 26,
  DOMAIN_ADD = 27,
  ADD_DOMAIN = 28,
  TENSOR_DATA = 51,
  DIMENSIONS_COUNT = 61,
  DIMENSIONS = 62,
  TYPE_AND_SHAPE = 65,
  ATTRIBUTE_FLOAT = 85,
  ATTRIBUTE_INT = 86,
  GET_INPUT = 90,
  GET_OUTPUT = 91,
  RELEASE_TYPE_AND_SHAPE = 99,
  PARALLEL_FOR = 274,
};

enum Type { FLOAT = 1, UINT8 = 2, INT64 = 7 };
enum Code { FAIL = 1, INVALID_ARGUMENT = 2 };

// An operator as the runtime reads it. Fields that stay null are of versions and features that are not used.
struct CustomOp {
  uint32_t version;
  void* (*create)(const CustomOp*, const Api*, const void* info);
  const char* (*name)(const CustomOp*);
  const char* (*provider)(const CustomOp*);
  Type (*input_type)(const CustomOp*, size_t);
  size_t (*input_count)(const CustomOp*);
  Type (*output_type)(const CustomOp*, size_t);
  size_t (*output_count)(const CustomOp*);
  void (*compute)(void* kernel, void* context);
  void (*destroy)(void* kernel);
  int (*input_characteristic)(const CustomOp*, size_t);
  int (*output_characteristic)(const CustomOp*, size_t);
  int (*input_memory)(const CustomOp*, size_t);
  int (*variadic_input_least)(const CustomOp*);
  int (*variadic_input_alike)(const CustomOp*);
  int (*variadic_output_least)(const CustomOp*);
  int (*variadic_output_alike)(const CustomOp*);
  void* (*create_v2)(const CustomOp*, const Api*, const void* info, void** kernel);
  void* (*compute_v2)(void* kernel, void* context);
  void* (*infer_shape)(const CustomOp*, void*);
  int (*start_version)(const CustomOp*);
  int (*end_version)(const CustomOp*);
  size_t (*may_inplace)(int**, int**);
  void (*release_may_inplace)(int*, int*);
  size_t (*alias)(int**, int**);
  void (*release_alias)(int*, int*);
};

}  // namespace ort
