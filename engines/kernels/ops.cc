// The operators of ONNX Runtime's domain "dspark" (docs/kernels.md): what the runtime asks about them, and their registration.
// Knows: the runtime's description of an operator. Refuses to know: what one computes.
#include "attention.h"
#include "products.h"

namespace {

template <typename Op>
ort::CustomOp described() {
  ort::CustomOp op = {};
  op.version = ort::API_VERSION;
  op.name = [](const ort::CustomOp*) { return Op::NAME; };
  op.provider = [](const ort::CustomOp*) { return "CPUExecutionProvider"; };
  op.input_type = [](const ort::CustomOp*, size_t i) { return Op::INPUTS[i]; };
  op.input_count = [](const ort::CustomOp*) { return sizeof(Op::INPUTS) / sizeof(ort::Type); };
  op.output_type = [](const ort::CustomOp*, size_t i) { return Op::OUTPUTS[i]; };
  op.output_count = [](const ort::CustomOp*) { return sizeof(Op::OUTPUTS) / sizeof(ort::Type); };
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
  static const ort::CustomOp ops[] = {described<BlockMatMul>(), described<NormMatMul>(), described<GreedyMarkov>(), described<CachedAttention>(),
                                      described<BlockAttention>()};
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
