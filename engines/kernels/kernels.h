// What the operators compute, without the runtime: products by 8-bit weights, and attention over linear caches.
// kernels.cc is compiled once for each instruction set, each in a namespace of its own; ops.cc picks one when it is loaded.
// Legend: M rows, K inputs and N outputs of a product; H query heads, KV key-value heads, D head size, C cache positions.
//
// Every row's result is made of that row alone, in an order of its own: the same bits in any batch, any split into
// passes and any cache capacity.
#pragma once
#include <cstddef>
#include <cstdint>

namespace kernels {

constexpr int64_t BLOCK = 64;   // inputs that share a scale, of weights and of activations
constexpr int64_t PANEL = 32;   // outputs whose weights lie together
constexpr int64_t PANEL_BLOCK_BYTES = BLOCK * PANEL + 4 * PANEL;  // one block of a panel: weights, then float32 scales

// Rows of activations in 8 bits, a scale each BLOCK inputs.
struct Rows {
  int8_t* values;   // [M, blocks * BLOCK]
  float* scales;    // [M, blocks]
  int32_t* sums;    // [M, blocks]: of the values
  int64_t blocks;
};

// What a product's rows are made of, row by row: x [M, K]; with `norm`, the RMSNorm of x + skip, which is written to `sum`;
// gated: x is [M, 2 K], and the rows are silu of the first half times the second.
struct Source {
  const float *x, *skip, *norm;  // skip [M, K], norm [K], or null both
  float* sum;                    // [M, K]
  int64_t K;
  float epsilon;
  bool gated;
};

// Packed rows that are written into the caches, of which those from `asking` on attend: all of a target's (asking 0), of a draft
// the blocks behind their context.
struct Attention {
  const float *qkv;                       // [tokens, (H + 2 KV) D]
  const float *cos, *sin;                 // [positions, D / 2]
  const float *q_norm, *k_norm;           // [D], or null
  const int64_t *position_ids;            // [R, Q]
  const int64_t *write_index;             // [R]
  const int64_t *pack_index;              // [tokens]: r Q + j
  const int64_t *mask_rows;               // [tokens - asking]: r S + its row of the mask, in the order of the asking rows
  const float *mask;                      // [R, 1, S, C], added to the scores; under IGNORED = not attended
  float *keys, *values;                   // [R, KV, C, D], read and written
  float *queries;                         // [tokens - asking, H D], scratch
  float *out;                             // [tokens - asking, H D]
  int64_t tokens, asking, slots, mask_slots, H, KV, D, C;     // slots: Q; mask_slots: S
  float scale, epsilon;
};

constexpr float IGNORED = -1e29f;

struct Table {
  const char* name;
  // Row `row` of `source` to that of `rows`.
  void (*quantize)(const Source& source, const Rows& rows, int64_t row);
  // Columns of the panels first .. last - 1 of y [M, N] = rows @ weights.
  void (*multiply)(const Rows& rows, int64_t M, int64_t N, const uint8_t* weights, int64_t first, int64_t last, float* y);
  // Rotates token t's keys and, where it asks, queries, and writes its keys and values into the caches.
  void (*prepare)(const Attention& a, int64_t t);
  // Asking row q's query heads of key-value head `head`.
  void (*attend)(const Attention& a, int64_t q, int64_t head);
  // The first of the largest of a + b in from .. to - 1, and its value.
  int64_t (*best)(const float* a, const float* b, int64_t from, int64_t to, float* value);
};

namespace avx2 { extern const Table table; }
namespace avx512 { extern const Table table; }

}  // namespace kernels
