// Three operators for ONNX Runtime's CPU provider, domain "dspark": BlockMatMul, NormMatMul, CachedAttention (docs/kernels.md).
// Knows: inputs, outputs, how work is cut for the runtime's threads. Refuses to know: the arithmetic (kernels.cc).
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

#include "kernels.h"
#include "ort_abi.h"

namespace {

using kernels::Table;
using Shape = std::vector<int64_t>;

const ort::Api* api;
const Table* table;

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
  float* output(size_t i, const Shape& dims) const {
    void* value = nullptr;
    check(call<void*, void*, size_t, const int64_t*, size_t, void**>(ort::GET_OUTPUT, context, i, dims.data(), dims.size(), &value));
    return data<float>(value);
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
thread_local Scratch scratch;

constexpr size_t CHUNKS = 64;       // at most so many pieces of one product
constexpr int64_t MANY_ROWS = 16;   // from here on rows are quantised and rotated by all threads

// y [.., N] = rows @ weights, uint8 [panels, blocks, PANEL_BLOCK_BYTES]; the rows are those of a kernels::Source in 8 bits.
void multiply(const Context& c, const kernels::Source& source, const Shape& dims, int64_t K, int64_t N, const uint8_t* weights, float* y) {
  int64_t M = 1;
  for (size_t i = 0; i + 1 < dims.size(); i++) M *= dims[i];
  if (!M) return;
  kernels::Rows rows;
  rows.blocks = (K + kernels::BLOCK - 1) / kernels::BLOCK;
  const int64_t cells = M * rows.blocks;
  rows.values = reinterpret_cast<int8_t*>(scratch.take(cells * (kernels::BLOCK + 8)));
  rows.scales = reinterpret_cast<float*>(rows.values + cells * kernels::BLOCK);
  rows.sums = reinterpret_cast<int32_t*>(rows.scales + cells);
  auto quantize = [&](size_t m) { table->quantize(source, rows, m); };
  if (M < MANY_ROWS) {
    for (int64_t m = 0; m < M; m++) quantize(m);
  } else {
    c.parallel(M, quantize);
  }
  const size_t panels = (N + kernels::PANEL - 1) / kernels::PANEL, chunks = panels < CHUNKS ? panels : CHUNKS;
  auto work = [&](size_t i) { table->multiply(rows, M, N, weights, i * panels / chunks, (i + 1) * panels / chunks, y); };
  c.parallel(chunks, work);
}

Shape checked(Shape dims, int64_t width, const char* name) {
  if (dims.empty() || dims.back() != width)
    throw Failure{std::string(name) + ": the last dimension of x is " + std::to_string(dims.empty() ? 0 : dims.back()) + "; it must be " + std::to_string(width) + "."};
  return dims;
}

struct BlockMatMul {
  static constexpr const char* NAME = "BlockMatMul";
  static constexpr ort::Type INPUTS[] = {ort::FLOAT, ort::UINT8};
  static constexpr size_t OUTPUTS = 1;
  int64_t K, N;
  bool gated;

  explicit BlockMatMul(const void* info) : K(attribute(info, "K")), N(attribute(info, "N")), gated(attribute(info, "gated")) {}

  void compute(const Context& c) const {
    void* x = c.input(0);
    Shape dims = checked(c.shape(x), gated ? 2 * K : K, NAME);
    const kernels::Source source = {c.data<float>(x), nullptr, nullptr, nullptr, K, 0.0f, gated};
    dims.back() = N;
    multiply(c, source, dims, K, N, c.data<uint8_t>(c.input(1)), c.output(0, dims));
  }
};

// The product of RMSNorm(x + skip), and x + skip.
struct NormMatMul {
  static constexpr const char* NAME = "NormMatMul";
  static constexpr ort::Type INPUTS[] = {ort::FLOAT, ort::FLOAT, ort::FLOAT, ort::UINT8};
  static constexpr size_t OUTPUTS = 2;
  int64_t K, N;
  float epsilon;

  explicit NormMatMul(const void* info) : K(attribute(info, "K")), N(attribute(info, "N")), epsilon(attribute_float(info, "epsilon")) {}

  void compute(const Context& c) const {
    void *x = c.input(0), *skip = c.input(1);
    Shape dims = checked(c.shape(x), K, NAME);
    if (c.shape(skip) != dims) throw Failure{"NormMatMul: x and skip have different shapes."};
    float* sum = c.output(1, dims);
    const kernels::Source source = {c.data<float>(x), c.data<float>(skip), c.data<float>(c.input(2)), sum, K, epsilon, false};
    dims.back() = N;
    multiply(c, source, dims, K, N, c.data<uint8_t>(c.input(3)), c.output(0, dims));
  }
};

// Packed tokens' queries, keys and values -> what they attend, keys and values written into linear caches.
struct CachedAttention {
  static constexpr const char* NAME = "CachedAttention";
  static constexpr ort::Type INPUTS[] = {ort::FLOAT, ort::FLOAT, ort::FLOAT, ort::FLOAT, ort::FLOAT, ort::INT64,
                                         ort::INT64, ort::INT64, ort::INT64, ort::FLOAT, ort::FLOAT, ort::FLOAT};
  static constexpr size_t OUTPUTS = 3;
  int64_t H;
  float scale, epsilon;

  explicit CachedAttention(const void* info)
      : H(attribute(info, "heads")), scale(attribute_float(info, "scale")), epsilon(attribute_float(info, "epsilon")) {}

  void compute(const Context& c) const {
    void *norm = c.input(3), *positions = c.input(5), *packed = c.input(8), *past_key = c.input(10);
    const Shape cache = c.shape(past_key), slots = c.shape(positions);
    kernels::Attention a;
    a.tokens = c.shape(packed)[0];
    a.slots = slots[1];
    a.H = H, a.KV = cache[1], a.C = cache[2], a.D = cache[3];
    a.scale = scale, a.epsilon = epsilon;
    a.qkv = c.data<float>(c.input(0));
    a.cos = c.data<float>(c.input(1)), a.sin = c.data<float>(c.input(2));
    const bool normed = c.shape(norm)[0] > 0;
    a.q_norm = normed ? c.data<float>(norm) : nullptr;
    a.k_norm = normed ? c.data<float>(c.input(4)) : nullptr;
    a.position_ids = c.data<int64_t>(positions);
    a.write_index = c.data<int64_t>(c.input(6));
    a.pack_index = c.data<int64_t>(packed);
    a.mask = c.data<float>(c.input(9));
    const int64_t* padded = c.data<int64_t>(c.input(7));
    const int64_t rotated = c.shape(c.input(1))[0];
    for (int64_t t = 0; t < a.tokens; t++) {
      const int64_t at = a.pack_index[t];
      if (at < 0 || at >= slots[0] * a.slots || padded[at] != t)
        throw Failure{"CachedAttention: pack_index holds " + std::to_string(at) + " for token " + std::to_string(t) + ", which is not its slot in pad_index."};
      const int64_t place = a.write_index[at / a.slots] + at % a.slots;
      if (place < 0 || place >= a.C)
        throw Failure{"CachedAttention: token " + std::to_string(t) + " would lie at cache position " + std::to_string(place) +
                      "; it must lie in 0.." + std::to_string(a.C - 1) + "."};
      if (a.position_ids[at] < 0 || a.position_ids[at] >= rotated)
        throw Failure{"CachedAttention: position_ids holds " + std::to_string(a.position_ids[at]) + "; it must lie in 0.." + std::to_string(rotated - 1) + "."};
    }
    float* out = c.output(0, {a.tokens, H * a.D});
    a.keys = present(c, past_key, cache, 1);
    a.values = present(c, c.input(11), cache, 2);
    a.out = out;
    a.queries = reinterpret_cast<float*>(scratch.take(a.tokens * H * a.D * sizeof(float)));
    auto prepare = [&](size_t t) { table->prepare(a, t); };
    if (a.tokens < MANY_ROWS) {
      for (int64_t t = 0; t < a.tokens; t++) prepare(t);
    } else {
      c.parallel(a.tokens, prepare);
    }
    auto attend = [&](size_t i) { table->attend(a, i / a.KV, i % a.KV); };
    c.parallel(a.tokens * a.KV, attend);
  }

  // The cache's output: the same memory where the caller bound it so, else a copy of the input.
  static float* present(const Context& c, void* past, const Shape& dims, size_t output) {
    const float* from = c.data<float>(past);
    float* to = c.output(output, dims);
    if (to != from) std::memcpy(to, from, dims[0] * dims[1] * dims[2] * dims[3] * sizeof(float));
    return to;
  }
};

template <typename Op>
ort::CustomOp described() {
  ort::CustomOp op = {};
  op.version = ort::API_VERSION;
  op.name = [](const ort::CustomOp*) { return Op::NAME; };
  op.provider = [](const ort::CustomOp*) { return "CPUExecutionProvider"; };
  op.input_type = [](const ort::CustomOp*, size_t i) { return Op::INPUTS[i]; };
  op.input_count = [](const ort::CustomOp*) { return sizeof(Op::INPUTS) / sizeof(ort::Type); };
  op.output_type = [](const ort::CustomOp*, size_t) { return ort::FLOAT; };
  op.output_count = [](const ort::CustomOp*) { return Op::OUTPUTS; };
  op.destroy = [](void* kernel) { delete static_cast<Op*>(kernel); };
  op.input_characteristic = op.output_characteristic = [](const ort::CustomOp*, size_t) { return 0; };  // required
  op.input_memory = [](const ort::CustomOp*, size_t) { return 0; };
  op.variadic_input_least = op.variadic_output_least = [](const ort::CustomOp*) { return 1; };
  op.variadic_input_alike = op.variadic_output_alike = [](const ort::CustomOp*) { return 1; };
  op.create_v2 = [](const ort::CustomOp*, const ort::Api*, const void* info, void** kernel) -> void* {
    try {
      *kernel = new Op(info);
    } catch (void* failed) {
      return failed;
    }
    return nullptr;
  };
  op.compute_v2 = [](void* kernel, void* context) -> void* {
    try {
      static_cast<const Op*>(kernel)->compute(Context{context});
    } catch (void* failed) {
      return failed;
    } catch (const Failure& failure) {
      return status(failure);
    }
    return nullptr;
  };
  op.start_version = [](const ort::CustomOp*) { return 1; };
  op.end_version = [](const ort::CustomOp*) { return INT32_MAX; };
  return op;
}

}  // namespace

// What ONNX Runtime calls when the library is registered in a session's options.
extern "C" __attribute__((visibility("default"))) void* RegisterCustomOps(void* options, const ort::ApiBase* base) {
  api = base->get(ort::API_VERSION);
  if (!api) return nullptr;  // an older runtime: the session will say which operator it does not know
  __builtin_cpu_init();
  const bool wide = __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512bw") &&
                    __builtin_cpu_supports("avx512dq") && !std::getenv("DSPARK_KERNELS_AVX2");
  if (!wide && !(__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")))
    return status({"the bundle's kernels need a CPU with AVX2 and FMA; export with --kernels onnxruntime."});
  table = wide ? &kernels::avx512::table : &kernels::avx2::table;
  static const ort::CustomOp ops[] = {described<BlockMatMul>(), described<NormMatMul>(), described<CachedAttention>()};
  try {
    static void* domain = nullptr;
    if (!domain) {
      check(call<void*, const char*, void**>(ort::CREATE_DOMAIN, "dspark", &domain));
      for (const ort::CustomOp& op : ops) check(call<void*, void*, const ort::CustomOp*>(ort::DOMAIN_ADD, domain, &op));
    }
    check(call<void*, void*, void*>(ort::ADD_DOMAIN, options, domain));
  } catch (void* failed) {
    return failed;
  }
  return nullptr;
}

// Which instruction set was picked; for whoever wants to say so.
extern "C" __attribute__((visibility("default"))) const char* dspark_kernels() { return table ? table->name : "none"; }
