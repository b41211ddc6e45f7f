// The arithmetic of kernels.h in vectors of one instruction set. Compiled with -DISA=avx2 or -DISA=avx512.
// Knows: blocks, panels, rotation, softmax. Refuses to know: ONNX Runtime, threads.
#include "kernels.h"

#include <immintrin.h>

#include <cmath>
#include <cstdlib>
#include <cstring>

namespace kernels {
namespace ISA {
namespace {

#ifdef __AVX512VNNI__
constexpr int LANES = 16, MOST_ROWS = 8;
#else
constexpr int LANES = 8, MOST_ROWS = 2;
#endif
constexpr int VECTORS = PANEL / LANES;
constexpr int64_t AHEAD = 4 * PANEL_BLOCK_BYTES;  // bytes that weights are asked for before they are needed

typedef float F __attribute__((vector_size(4 * LANES)));
typedef int32_t I __attribute__((vector_size(4 * LANES)));

inline F load(const float* p) { F v; std::memcpy(&v, p, sizeof v); return v; }
inline void store(float* p, F v) { std::memcpy(p, &v, sizeof v); }
inline F splat(float x) { return F{} + x; }
inline F larger(F a, F b) { return a > b ? a : b; }
inline F smaller(F a, F b) { return a < b ? a : b; }

// To the nearest integer, halves to even; |x| < 2^22.
inline F nearest(F x) { const F magic = splat(12582912.0f); return (x + magic) - magic; }

inline float total(F v) {
  float parts[LANES], half[LANES / 2];
  std::memcpy(parts, &v, sizeof v);
  for (int i = 0; i < LANES / 2; i++) half[i] = parts[i] + parts[i + LANES / 2];
  for (int n = LANES / 4; n; n /= 2)
    for (int i = 0; i < n; i++) half[i] += half[i + n];
  return half[0];
}

#if defined(__AVX512VNNI__)
inline F evens(F a, F b) { return __builtin_shufflevector(a, b, 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30); }
inline F odds(F a, F b) { return __builtin_shufflevector(a, b, 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31); }
#else
inline F evens(F a, F b) { return __builtin_shufflevector(a, b, 0, 2, 4, 6, 8, 10, 12, 14); }
inline F odds(F a, F b) { return __builtin_shufflevector(a, b, 1, 3, 5, 7, 9, 11, 13, 15); }
#endif

// The totals of LANES vectors: neighbours are added until one lane is left of each.
inline F totals(F* v) {
#pragma GCC unroll 4
  for (int n = LANES / 2; n; n /= 2)
#pragma GCC unroll 8
    for (int i = 0; i < n; i++) v[i] = evens(v[2 * i], v[2 * i + 1]) + odds(v[2 * i], v[2 * i + 1]);
  return v[0];
}

inline float largest(F v) {
  float parts[LANES], m;
  std::memcpy(parts, &v, sizeof v);
  m = parts[0];
  for (int i = 1; i < LANES; i++) m = parts[i] > m ? parts[i] : m;
  return m;
}

// exp, within 2 units in the last place for -87 < x < 88; 0 far below.
inline F exponential(F x) {
  const F under = x < splat(-87.0f) ? splat(0.0f) : splat(1.0f);
  x = smaller(larger(x, splat(-87.0f)), splat(88.0f));
  const F n = nearest(x * 1.44269504f);
  F r = x - n * 0.693359375f;
  r = r + n * 2.12194440e-4f;
  F p = splat(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  const I power = (__builtin_convertvector(n, I) + 127) << 23;
  F scale;
  std::memcpy(&scale, &power, sizeof scale);
  return p * scale * under;
}

// acc + the products of 4 weights (0 .. 255 around 128) with 4 activations (-127 .. 127), in each of LANES columns. Without
// VNNI the weights' offset is off already.
#ifdef __AVX512VNNI__
constexpr int32_t OFFSET = 128;
inline I weights_of(const uint8_t* w) { return (I)_mm512_loadu_si512(w); }
inline I dot4(I acc, I w, int32_t a) { return (I)_mm512_dpbusd_epi32((__m512i)acc, (__m512i)w, _mm512_set1_epi32(a)); }
#else
constexpr int32_t OFFSET = 0;
inline I weights_of(const uint8_t* w) {
  return (I)_mm256_xor_si256(_mm256_loadu_si256((const __m256i*)w), _mm256_set1_epi8(-128));
}
inline I dot4(I acc, I w, int32_t a) {  // 2 x 127 x 127 fits into 16 bits
  const __m256i all = _mm256_set1_epi32(a);
  const __m256i pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(all), _mm256_sign_epi8((__m256i)w, all));
  return (I)_mm256_add_epi32((__m256i)acc, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
}
#endif

inline F silu(F x) { return x / (exponential(-x) + 1.0f); }

// x + skip [K] into sum; returns the factor of the norm.
float add_and_measure(const float* x, const float* skip, int64_t K, float epsilon, float* sum) {
  F squares = splat(0.0f);
  int64_t i = 0;
  for (; i + LANES <= K; i += LANES) {
    const F v = load(x + i) + load(skip + i);
    store(sum + i, v);
    squares += v * v;
  }
  float all = total(squares);
  for (; i < K; i++) {
    sum[i] = x[i] + skip[i];
    all += sum[i] * sum[i];
  }
  return 1.0f / std::sqrt(all / (float)K + epsilon);
}

void quantize(const Source& source, const Rows& rows, int64_t row) {
  const int64_t K = source.K;
  const float* x = source.x + row * (source.gated ? 2 * K : K);
  int8_t* values = rows.values + row * rows.blocks * BLOCK;
  float factor_of_norm = 1.0f;
  if (source.norm) {
    float* sum = source.sum + row * K;
    factor_of_norm = add_and_measure(x, source.skip + row * K, K, source.epsilon, sum);
    x = sum;
  }
  for (int64_t b = 0; b < rows.blocks; b++, values += BLOCK) {
    float block[BLOCK], other[BLOCK];
    const int64_t from = b * BLOCK, n = K - from < BLOCK ? K - from : BLOCK;
    if (n < BLOCK) {
      std::memset(block, 0, sizeof block);
      std::memset(other, 0, sizeof other);
    }
    std::memcpy(block, x + from, n * sizeof(float));
    if (source.gated) {
      std::memcpy(other, x + K + from, n * sizeof(float));
      for (int i = 0; i < BLOCK; i += LANES) store(block + i, silu(load(block + i)) * load(other + i));
    } else if (source.norm) {
      std::memcpy(other, source.norm + from, n * sizeof(float));
      for (int i = 0; i < BLOCK; i += LANES) store(block + i, load(block + i) * factor_of_norm * load(other + i));
    }
    F m = splat(0.0f);
    for (int i = 0; i < BLOCK; i += LANES) {
      const F v = load(block + i);
      m = larger(m, larger(v, -v));
    }
    const float top = largest(m), factor = top > 0 ? 127.0f / top : 0.0f;
    I sum = I{};
    for (int i = 0; i < BLOCK; i += LANES) {
      const I q = __builtin_convertvector(nearest(load(block + i) * factor), I);
      sum += q;
      for (int j = 0; j < LANES; j++) values[i + j] = (int8_t)q[j];
    }
    int32_t all = 0;
    for (int j = 0; j < LANES; j++) all += sum[j];
    rows.scales[row * rows.blocks + b] = top * (1.0f / 127.0f);
    rows.sums[row * rows.blocks + b] = all;
  }
}

template <int ROWS>
void tile(const Rows& rows, int64_t first, const uint8_t* panel, float* y, int64_t N, int64_t columns) {
  const int64_t stride = rows.blocks * BLOCK;
  const int8_t* a = rows.values + first * stride;
  const float* scales = rows.scales + first * rows.blocks;
  const int32_t* sums = rows.sums + first * rows.blocks;
  F f[ROWS][VECTORS] = {};
  for (int64_t b = 0; b < rows.blocks; b++, panel += PANEL_BLOCK_BYTES) {
    I acc[ROWS][VECTORS];
    for (int m = 0; m < ROWS; m++)
      for (int v = 0; v < VECTORS; v++) acc[m][v] = I{} - OFFSET * sums[m * rows.blocks + b];
    for (int k = 0; k < BLOCK / 4; k++) {
      const char* ahead = (const char*)panel + AHEAD + 4 * k * PANEL;
      _mm_prefetch(ahead, _MM_HINT_T0);
      _mm_prefetch(ahead + 64, _MM_HINT_T0);
      I w[VECTORS];
      for (int v = 0; v < VECTORS; v++) w[v] = weights_of(panel + 4 * (k * PANEL + v * LANES));
      for (int m = 0; m < ROWS; m++) {
        int32_t four;
        std::memcpy(&four, a + m * stride + b * BLOCK + 4 * k, 4);
        for (int v = 0; v < VECTORS; v++) acc[m][v] = dot4(acc[m][v], w[v], four);
      }
    }
    const float* steps = (const float*)(panel + BLOCK * PANEL);
    for (int m = 0; m < ROWS; m++)
      for (int v = 0; v < VECTORS; v++)
        f[m][v] += __builtin_convertvector(acc[m][v], F) * (load(steps + v * LANES) * scales[m * rows.blocks + b]);
  }
  for (int m = 0; m < ROWS; m++, y += N) {
    if (columns == PANEL) {
      for (int v = 0; v < VECTORS; v++) store(y + v * LANES, f[m][v]);
    } else {
      std::memcpy(y, f[m], columns * sizeof(float));
    }
  }
}

void multiply(const Rows& rows, int64_t M, int64_t N, const uint8_t* weights, int64_t first, int64_t last, float* y) {
  const int64_t bytes = rows.blocks * PANEL_BLOCK_BYTES, tiles = (M + MOST_ROWS - 1) / MOST_ROWS;
  for (int64_t p = first; p < last; p++) {
    const uint8_t* panel = weights + p * bytes;
    const int64_t column = p * PANEL, columns = N - column < PANEL ? N - column : PANEL;
    for (int64_t t = 0; t < tiles; t++) {  // tiles of nearly the same height
      const int64_t from = t * M / tiles, count = (t + 1) * M / tiles - from;
      float* to = y + from * N + column;
      switch (count) {
        case 1: tile<1>(rows, from, panel, to, N, columns); break;
        case 2: tile<2>(rows, from, panel, to, N, columns); break;
#ifdef __AVX512VNNI__
        case 3: tile<3>(rows, from, panel, to, N, columns); break;
        case 4: tile<4>(rows, from, panel, to, N, columns); break;
        case 5: tile<5>(rows, from, panel, to, N, columns); break;
        case 6: tile<6>(rows, from, panel, to, N, columns); break;
        case 7: tile<7>(rows, from, panel, to, N, columns); break;
        case 8: tile<8>(rows, from, panel, to, N, columns); break;
#endif
      }
    }
  }
}

float dot(const float* a, const float* b, int64_t D) {
  F sum = splat(0.0f);
  for (int64_t i = 0; i < D; i += LANES) sum += load(a + i) * load(b + i);
  return total(sum);
}

void turned(const float* x, const float* norm, float epsilon, const float* cos, const float* sin, int64_t D, float scale, float* y) {
  float normed[512];
  if (norm) {
    const float r = 1.0f / std::sqrt(dot(x, x, D) / (float)D + epsilon);
    for (int64_t i = 0; i < D; i += LANES) store(normed + i, load(x + i) * r * load(norm + i));
    x = normed;
  }
  const int64_t half = D / 2;
  for (int64_t i = 0; i < half; i += LANES) {
    const F a = load(x + i), b = load(x + half + i), c = load(cos + i) * scale, s = load(sin + i) * scale;
    const F bs = b * s, as = a * s;
    store(y + i, a * c - bs);
    store(y + half + i, b * c + as);
  }
}

void prepare(const Attention& a, int64_t t) {
  const int64_t at = a.pack_index[t], r = at / a.slots, j = at % a.slots, D = a.D;
  const float* x = a.qkv + t * (a.H + 2 * a.KV) * D;
  const float *cos = a.cos + a.position_ids[at] * (D / 2), *sin = a.sin + a.position_ids[at] * (D / 2);
  for (int64_t h = 0; h < a.H; h++, x += D)
    if (t >= a.asking) turned(x, a.q_norm, a.epsilon, cos, sin, D, a.scale, a.queries + ((t - a.asking) * a.H + h) * D);
  for (int64_t h = 0; h < a.KV; h++, x += D) {
    const int64_t place = ((r * a.KV + h) * a.C + a.write_index[r] + j) * D;
    turned(x, a.k_norm, a.epsilon, cos, sin, D, 1.0f, a.keys + place);
    std::memcpy(a.values + place, x + a.KV * D, D * sizeof(float));
  }
}

// Scores of the calling thread. No template of the standard library in this file: the linker keeps one copy of each, and
// it could be the one of the wider instruction set.
struct Scores {
  float* data = nullptr;
  int64_t size = 0;
  ~Scores() { std::free(data); }
  float* take(int64_t n) {
    if (n > size) {
      std::free(data);
      data = static_cast<float*>(std::malloc((size = n + 1024) * sizeof(float)));
      if (!data) std::abort();
    }
    return data;
  }
};
thread_local Scores buffer;

// The scores of HEADS queries [HEADS, D] with the keys [length, D], LANES positions at a time, into out [HEADS, stride].
template <int HEADS>
void score(const float* queries, const float* keys, const float* mask, int64_t D, int64_t length, float* out, int64_t stride) {
  for (int64_t from = 0; from < length; from += LANES) {
    F sums[HEADS][LANES];
    for (int j = 0; j < LANES; j++) {
      const float* key = keys + (from + j < length ? from + j : length - 1) * D;
      F s[HEADS] = {};
      for (int64_t i = 0; i < D; i += LANES) {
        const F k = load(key + i);
        for (int h = 0; h < HEADS; h++) s[h] += k * load(queries + h * D + i);
      }
      for (int h = 0; h < HEADS; h++) sums[h][j] = s[h];
    }
    F bias = splat(-INFINITY);
    if (from + LANES <= length) {
      bias = load(mask + from);
    } else {
      std::memcpy(&bias, mask + from, (length - from) * sizeof(float));
    }
    for (int h = 0; h < HEADS; h++) store(out + h * stride + from, totals(sums[h]) + bias);
  }
}

// out [HEADS, D] = shares [HEADS, stride] @ values [length, D], PARTS vectors of a value from `at` on.
template <int HEADS, int PARTS>
void mix(const float* shares, int64_t stride, const float* values, int64_t D, int64_t length, int64_t at, float* out) {
  F o[HEADS][PARTS] = {};
  for (int64_t c = 0; c < length; c++)
    for (int p = 0; p < PARTS; p++) {
      const F v = load(values + c * D + at + p * LANES);
      for (int h = 0; h < HEADS; h++) o[h][p] += v * shares[h * stride + c];
    }
  for (int h = 0; h < HEADS; h++)
    for (int p = 0; p < PARTS; p++) store(out + h * D + at + p * LANES, o[h][p]);
}

template <int HEADS>
void attend_heads(const Attention& a, const float* mask, int64_t length, const float* queries, const float* keys, const float* values, float* out) {
  const int64_t stride = (length + LANES - 1) / LANES * LANES, D = a.D;
  float* all = buffer.take(HEADS * stride);
  score<HEADS>(queries, keys, mask, D, length, all, stride);
  for (int h = 0; h < HEADS; h++) {
    float* scores = all + h * stride;
    F top = splat(-INFINITY), sum = splat(0.0f);
    for (int64_t c = 0; c < stride; c += LANES) top = larger(top, load(scores + c));
    const float highest = largest(top);
    for (int64_t c = 0; c < stride; c += LANES) {
      const F e = exponential(load(scores + c) - highest);
      store(scores + c, e);
      sum += e;
    }
    const float share = 1.0f / total(sum);
    for (int64_t c = 0; c < stride; c += LANES) store(scores + c, load(scores + c) * share);
  }
  int64_t at = 0;
  for (; at + 4 * LANES <= D; at += 4 * LANES) mix<HEADS, 4>(all, stride, values, D, length, at, out);
  for (; at < D; at += LANES) mix<HEADS, 1>(all, stride, values, D, length, at, out);
}

void attend(const Attention& a, int64_t q, int64_t head) {
  const int64_t at = a.mask_rows[q], r = at / a.mask_slots, D = a.D, group = a.H / a.KV;
  const float* mask = a.mask + at * a.C;
  int64_t length = a.C;
  while (length > 0 && mask[length - 1] < IGNORED) length--;
  const float *keys = a.keys + (r * a.KV + head) * a.C * D, *values = a.values + (r * a.KV + head) * a.C * D;
  for (int64_t g = 0; g < group;) {
    const int64_t first = (q * a.H + head * group + g) * D;
    const float* queries = a.queries + first;
    float* out = a.out + first;
    switch (group - g) {
      case 1: attend_heads<1>(a, mask, length, queries, keys, values, out); g += 1; break;
      case 2: attend_heads<2>(a, mask, length, queries, keys, values, out); g += 2; break;
      case 3: attend_heads<3>(a, mask, length, queries, keys, values, out); g += 3; break;
      default: attend_heads<4>(a, mask, length, queries, keys, values, out); g += 4;
    }
  }
}

int64_t best(const float* a, const float* b, int64_t from, int64_t to, float* value) {
  F top = splat(-INFINITY);
  int64_t i = from;
  for (; i + LANES <= to; i += LANES) top = larger(top, load(a + i) + load(b + i));
  float highest = largest(top);
  for (; i < to; i++) highest = a[i] + b[i] > highest ? a[i] + b[i] : highest;
  for (i = from; i < to - 1 && a[i] + b[i] != highest; i++) {
  }
  *value = highest;
  return i;
}

}  // namespace

const Table table = {
#ifdef __AVX512VNNI__
    "avx512",
#else
    "avx2",
#endif
    quantize, multiply, prepare, attend, best};

}  // namespace ISA
}  // namespace kernels
