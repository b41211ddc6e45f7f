// BlockMatMul, NormMatMul, GreedyMarkov: products of 8-bit rows by 8-bit weights. Included by ops.cc alone.
// Knows: inputs and outputs, how work is cut for the runtime's threads. Refuses to know: the arithmetic (kernels.cc).
#pragma once
#include <cstring>

#include "context.h"

namespace {

constexpr size_t CHUNKS = 64;       // at most so many pieces of one product
constexpr size_t FEW_CHUNKS = 16;   // of a product whose weights stay in the second-level cache

// Source's rows in 8 bits, in the thread's scratch.
kernels::Rows quantized(const Context& c, const kernels::Source& source, int64_t M) {
  kernels::Rows rows;
  rows.blocks = (source.K + kernels::BLOCK - 1) / kernels::BLOCK;
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
  return rows;
}

// work(piece, first panel, last) of the panels of N outputs, in at most so many pieces. Returns how many.
template <typename W>
size_t over_panels(const Context& c, int64_t N, size_t most, W& work) {
  const size_t panels = (N + kernels::PANEL - 1) / kernels::PANEL, chunks = panels < most ? panels : most;
  auto piece = [&](size_t i) { work(i, i * panels / chunks, (i + 1) * panels / chunks); };
  c.parallel(chunks, piece);
  return chunks;
}

// y [.., N] = rows @ weights, uint8 [panels, blocks, PANEL_BLOCK_BYTES]; the rows are those of a kernels::Source in 8 bits.
void multiply(const Context& c, const kernels::Source& source, const Shape& dims, int64_t N, const uint8_t* weights, float* y) {
  int64_t M = 1;
  for (size_t i = 0; i + 1 < dims.size(); i++) M *= dims[i];
  if (!M) return;
  const kernels::Rows rows = quantized(c, source, M);
  auto work = [&](size_t, int64_t first, int64_t last) { table->multiply(rows, M, N, weights, first, last, y); };
  over_panels(c, N, CHUNKS, work);
}

Shape checked(Shape dims, int64_t width, const char* name) {
  if (dims.empty() || dims.back() != width)
    throw Failure{std::string(name) + ": the last dimension of x is " + std::to_string(dims.empty() ? 0 : dims.back()) + "; it must be " + std::to_string(width) + "."};
  return dims;
}

struct BlockMatMul {
  static constexpr const char* NAME = "BlockMatMul";
  static constexpr ort::Type INPUTS[] = {ort::FLOAT, ort::UINT8};
  static constexpr ort::Type OUTPUTS[] = {ort::FLOAT};
  int64_t K, N;
  bool gated;

  explicit BlockMatMul(const void* info) : K(attribute(info, "K")), N(attribute(info, "N")), gated(attribute(info, "gated")) {}

  void compute(const Context& c) const {
    void* x = c.input(0);
    Shape dims = checked(c.shape(x), gated ? 2 * K : K, NAME);
    const kernels::Source source = {c.data<float>(x), nullptr, nullptr, nullptr, K, 0.0f, gated};
    dims.back() = N;
    multiply(c, source, dims, N, c.data<uint8_t>(c.input(1)), c.output(0, dims));
  }
};

// The product of RMSNorm(x + skip), and x + skip.
struct NormMatMul {
  static constexpr const char* NAME = "NormMatMul";
  static constexpr ort::Type INPUTS[] = {ort::FLOAT, ort::FLOAT, ort::FLOAT, ort::UINT8};
  static constexpr ort::Type OUTPUTS[] = {ort::FLOAT, ort::FLOAT};
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
    multiply(c, source, dims, N, c.data<uint8_t>(c.input(3)), c.output(0, dims));
  }
};

// The slots of a block one after the other, for requests that take the argmax: the token before a slot gives an embedding, its
// product is the slot's bias, the largest of base logits + bias is the slot's token (the vanilla Markov head).
struct GreedyMarkov {
  static constexpr const char* NAME = "GreedyMarkov";
  static constexpr ort::Type INPUTS[] = {ort::FLOAT, ort::INT64, ort::FLOAT, ort::UINT8, ort::INT64};
  static constexpr ort::Type OUTPUTS[] = {ort::INT64, ort::INT64, ort::FLOAT};

  explicit GreedyMarkov(const void*) {}

  void compute(const Context& c) const {
    void *base = c.input(0), *table_of_embeddings = c.input(2), *to_target = c.input(4);
    const Shape dims = c.shape(base), embeddings = c.shape(table_of_embeddings);
    const int64_t R = dims[0], G = dims[1], V = dims[2], K = embeddings[1];
    const float *logits = c.data<float>(base), *all = c.data<float>(table_of_embeddings);
    const int64_t* targets = c.shape(to_target)[0] ? c.data<int64_t>(to_target) : nullptr;
    const int64_t* previous = c.data<int64_t>(c.input(1));
    const uint8_t* weights = c.data<uint8_t>(c.input(3));
    int64_t *tokens = c.output<int64_t>(0, {R, G}), *indices = c.output<int64_t>(1, {R, G});
    float* taken = c.output(2, {R, G, K});
    struct Best { float value; int64_t index; };
    Best* best = reinterpret_cast<Best*>(more.take(R * (FEW_CHUNKS * sizeof(Best) + (K + V) * sizeof(float))));
    float *rows = reinterpret_cast<float*>(best + R * FEW_CHUNKS), *bias = rows + R * K;
    const kernels::Source source = {rows, nullptr, nullptr, nullptr, K, 0.0f, false};
    for (int64_t k = 0; k < G && R; k++) {
      for (int64_t r = 0; r < R; r++) {
        const int64_t token = k ? tokens[r * G + k - 1] : previous[r];
        if (token < 0 || token >= embeddings[0])
          throw Failure{"GreedyMarkov: the token before slot " + std::to_string(k) + " is " + std::to_string(token) + "; it must lie in 0.." + std::to_string(embeddings[0] - 1) + "."};
        std::memcpy(rows + r * K, all + token * K, K * sizeof(float));
        std::memcpy(taken + (r * G + k) * K, all + token * K, K * sizeof(float));
      }
      const kernels::Rows small = quantized(c, source, R);
      auto work = [&](size_t i, int64_t first, int64_t last) {
        table->multiply(small, R, V, weights, first, last, bias);
        const int64_t from = first * kernels::PANEL, to = last * kernels::PANEL < V ? last * kernels::PANEL : V;
        for (int64_t r = 0; r < R; r++) {
          Best& b = best[r * FEW_CHUNKS + i];
          b.index = table->best(logits + (r * G + k) * V, bias + r * V, from, to, &b.value);
        }
      };
      const size_t chunks = over_panels(c, V, FEW_CHUNKS, work);
      for (int64_t r = 0; r < R; r++) {
        const Best* b = best + r * FEW_CHUNKS;
        for (size_t i = 1; i < chunks; i++)
          if (best[r * FEW_CHUNKS + i].value > b->value) b = best + r * FEW_CHUNKS + i;
        indices[r * G + k] = b->index;
        tokens[r * G + k] = targets ? targets[b->index] : b->index;
      }
    }
  }
};

}  // namespace
