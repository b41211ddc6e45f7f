// CachedAttention, BlockAttention: attention over linear caches. Included by ops.cc alone.
// Knows: inputs and outputs, which packed row lies where. Refuses to know: the arithmetic (kernels.cc).
#pragma once
#include <cstring>

#include "context.h"

namespace {

// The cache's output: the same memory where the caller bound it so, else a copy of the input.
float* present(const Context& c, void* past, const Shape& dims, size_t output) {
  const float* from = c.data<float>(past);
  float* to = c.output(output, dims);
  if (to != from) std::memcpy(to, from, dims[0] * dims[1] * dims[2] * dims[3] * sizeof(float));
  return to;
}

// What both operators begin with: qkv [N, (H + 2 H_kv) D], cos, sin, norms of q and k, position_ids, write_index, pad_index.
constexpr size_t QKV = 0, COS = 1, SIN = 2, Q_NORM = 3, K_NORM = 4, POSITIONS = 5, WRITE = 6, PAD = 7;
constexpr int64_t NOWHERE = INT64_MIN;  // of a token's slot

// Fills in all but pack_index, mask, mask_rows, mask_slots and asking; checks each of the tokens' places, then attends. pack(a) fills
// those in; the caches are inputs `cache` and `cache` + 1.
template <typename Pack>
void attend(const Context& c, const char* name, int64_t H, float scale, float epsilon, size_t cache_input, const Pack& pack) {
  void *norm = c.input(Q_NORM), *positions = c.input(POSITIONS), *past_key = c.input(cache_input);
  const Shape cache = c.shape(past_key), slots = c.shape(positions);
  kernels::Attention a;
  a.tokens = c.shape(c.input(QKV))[0];
  a.slots = slots[1];
  a.H = H, a.KV = cache[1], a.C = cache[2], a.D = cache[3];
  a.scale = scale, a.epsilon = epsilon;
  a.qkv = c.data<float>(c.input(QKV));
  a.cos = c.data<float>(c.input(COS)), a.sin = c.data<float>(c.input(SIN));
  const bool normed = c.shape(norm)[0] > 0;
  a.q_norm = normed ? c.data<float>(norm) : nullptr;
  a.k_norm = normed ? c.data<float>(c.input(K_NORM)) : nullptr;
  a.position_ids = c.data<int64_t>(positions);
  a.write_index = c.data<int64_t>(c.input(WRITE));
  const int64_t* padded = c.data<int64_t>(c.input(PAD));
  pack(a, padded, slots[0]);
  const int64_t rotated = c.shape(c.input(COS))[0];
  const std::string who = std::string(name) + ": ";
  for (int64_t t = 0; t < a.tokens; t++) {
    const int64_t at = a.pack_index[t];
    if (at == NOWHERE) throw Failure{who + "token " + std::to_string(t) + " has no slot in pad_index."};
    if (at < 0 || at >= slots[0] * a.slots || padded[at] != t)
      throw Failure{who + "pack_index holds " + std::to_string(at) + " for token " + std::to_string(t) + ", which is not its slot in pad_index."};
    const int64_t place = a.write_index[at / a.slots] + at % a.slots;
    if (place < 0 || place >= a.C)
      throw Failure{who + "token " + std::to_string(t) + " would lie at cache position " + std::to_string(place) + "; it must lie in 0.." + std::to_string(a.C - 1) + "."};
    if (a.position_ids[at] < 0 || a.position_ids[at] >= rotated)
      throw Failure{who + "position_ids holds " + std::to_string(a.position_ids[at]) + "; it must lie in 0.." + std::to_string(rotated - 1) + "."};
  }
  const int64_t asking = a.tokens - a.asking;
  float* out = c.output(0, {asking, H * a.D});
  a.keys = present(c, past_key, cache, 1);
  a.values = present(c, c.input(cache_input + 1), cache, 2);
  a.out = out;
  a.queries = reinterpret_cast<float*>(scratch.take(asking * H * a.D * sizeof(float)));
  auto prepare = [&](size_t t) { table->prepare(a, t); };
  if (a.tokens < MANY_ROWS) {
    for (int64_t t = 0; t < a.tokens; t++) prepare(t);
  } else {
    c.parallel(a.tokens, prepare);
  }
  auto each = [&](size_t i) { table->attend(a, i / a.KV, i % a.KV); };
  if (asking) c.parallel(asking * a.KV, each);
}

// Packed tokens' queries, keys and values -> what they attend, keys and values written into linear caches.
struct CachedAttention {
  static constexpr const char* NAME = "CachedAttention";
  static constexpr ort::Type INPUTS[] = {ort::FLOAT, ort::FLOAT, ort::FLOAT, ort::FLOAT, ort::FLOAT, ort::INT64,
                                         ort::INT64, ort::INT64, ort::INT64, ort::FLOAT, ort::FLOAT, ort::FLOAT};
  static constexpr ort::Type OUTPUTS[] = {ort::FLOAT, ort::FLOAT, ort::FLOAT};
  static constexpr size_t PACKED = 8, MASK = 9, CACHE = 10;
  int64_t H;
  float scale, epsilon;

  explicit CachedAttention(const void* info)
      : H(attribute(info, "heads")), scale(attribute_float(info, "scale")), epsilon(attribute_float(info, "epsilon")) {}

  void compute(const Context& c) const {
    attend(c, NAME, H, scale, epsilon, CACHE, [&](kernels::Attention& a, const int64_t*, int64_t) {
      if (c.shape(c.input(PACKED))[0] != a.tokens) throw Failure{"CachedAttention: pack_index and qkv have different lengths."};
      a.pack_index = a.mask_rows = c.data<int64_t>(c.input(PACKED));
      a.mask = c.data<float>(c.input(MASK));
      a.mask_slots = a.slots, a.asking = 0;
    });
  }
};

// The same of a draft's context and blocks: pad_index puts a request's `block` last packed rows behind its context, and those alone
// attend, through mask [R, 1, block, C].
struct BlockAttention {
  static constexpr const char* NAME = "BlockAttention";
  static constexpr ort::Type INPUTS[] = {ort::FLOAT, ort::FLOAT, ort::FLOAT, ort::FLOAT, ort::FLOAT, ort::INT64,
                                         ort::INT64, ort::INT64, ort::FLOAT, ort::FLOAT, ort::FLOAT};
  static constexpr ort::Type OUTPUTS[] = {ort::FLOAT, ort::FLOAT, ort::FLOAT};
  static constexpr size_t MASK = 8, CACHE = 9;
  int64_t H, block;
  float scale, epsilon;

  explicit BlockAttention(const void* info)
      : H(attribute(info, "heads")), block(attribute(info, "block")), scale(attribute_float(info, "scale")), epsilon(attribute_float(info, "epsilon")) {}

  void compute(const Context& c) const {
    attend(c, NAME, H, scale, epsilon, CACHE, [&](kernels::Attention& a, const int64_t* padded, int64_t R) {
      const int64_t asking = R * block;
      a.asking = a.tokens - asking;
      if (a.asking < 0) throw Failure{"BlockAttention: qkv has fewer rows than the blocks."};
      int64_t* places = reinterpret_cast<int64_t*>(more.take((a.tokens + asking) * sizeof(int64_t)));
      for (int64_t t = 0; t < a.tokens; t++) places[t] = NOWHERE;
      for (int64_t r = 0; r < R; r++) {
        const int64_t* row = padded + r * a.slots;
        int64_t context = 0;  // the slot where the block begins
        while (context + block <= a.slots && row[context] != a.asking + r * block) context++;
        if (context + block > a.slots) throw Failure{"BlockAttention: pad_index has no block of request " + std::to_string(r) + "."};
        for (int64_t j = 0; j < context + block; j++)
          if (row[j] >= 0 && row[j] < a.tokens) places[row[j]] = r * a.slots + j;
      }
      for (int64_t q = 0; q < asking; q++) places[a.tokens + q] = q;
      a.pack_index = places, a.mask_rows = places + a.tokens;
      a.mask = c.data<float>(c.input(MASK));
      a.mask_slots = block;
    });
  }
};

}  // namespace
