// 8-bit pages: a code (CODE) for every number, and for every token the scales of its key and value, of int8 their zeros too.
// These stay outside of the products on codes, see pallas_kernels/layouts/eight_bit.py.

#pragma once

#include "rows.h"

typedef enum { INT8, FP8 } Code;
enum { WHOLE_PAGES = 0, ZEROS = CODE == INT8, SIDES = ZEROS ? 4 : 2 };

// load_codes gives codes of fp8 over 256; the scales make up for it.
static const float UNIT = CODE == FP8 ? 256.0f : 1.0f;

typedef struct {
  const char *codes;      // [pages, layers, 2, kv_heads, page_tokens, HEAD_DIM]
  const uint16_t *sides;  // [pages, layers, kv_heads, SIDES, page_tokens], bfloat16
  int64_t pages, layers, kv_heads, page_tokens;
} Pool;

typedef struct {
  const char *k, *v;
  const uint16_t *sides;
  int64_t page_tokens;
} Page;

typedef struct {
  vec x[BLOCK][K_VECTORS];
  float sum[BLOCK];
} Queries;

static inline Pool pool_of(const Frame *frame) {
  const Buffer *codes = operand(frame, POOL), *sides = operand(frame, POOL + 1);
  const int64_t *dims = codes->dims;
  return (Pool){codes->data, sides->data, .pages = dims[0], .layers = dims[1], .kv_heads = dims[3], .page_tokens = dims[4]};
}

static inline Page page_at(const Pool *pool, int64_t block, int64_t head) {
  const int64_t T = pool->page_tokens, heads = pool->kv_heads;
  const char *k = pool->codes + (block * 2 * heads + head) * T * HEAD_DIM;
  return (Page){k, k + heads * T * HEAD_DIM, pool->sides + (block * heads + head) * SIDES * T, T};
}

static inline __attribute__((always_inline)) vec load_codes(const char *p) {
  if (CODE == INT8) return __builtin_convertvector(load_bytes(p, true), vec);
  // The bits of a float16: the sign, which the extension has doubled, and the rest one exponent bit further down.
  hvec bits = (hvec)load_signed_bytes(p) << 7 & 0xbfff;
  return widened(bits, F16);
}

static inline __attribute__((always_inline)) void load_row(const char *row, vec *x) {
  for (int v = 0; v < K_VECTORS; v++) x[v] = load_codes(row + v * LANES);
}

static inline void load_query(const float *p, float scale, int i, Queries *queries) {
  vec sum = {};
  for (int v = 0; v < K_VECTORS; v++) {
    queries->x[i][v] = held(load_f32(p + v * LANES) * scale);
    sum += queries->x[i][v];
  }
  queries->sum[i] = total(sum);
}

static inline void store_output(float *p, const vec *o) {
  for (int v = 0; v < V_VECTORS; v++) store_f32(p + v * LANES, o[v]);
}

static inline vec side(const Page *page, int index, int64_t t) {
  return load(page->sides, index * page->page_tokens + t, BF16);
}

static inline __attribute__((always_inline)) void score(
    const Page *page, const Queries *queries, const int M, int64_t from, int64_t to, Scores s) {
  score_rows(page->k, HEAD_DIM, load_row, page->v, HEAD_DIM, queries->x, M, from, to, s);
  for (int64_t t = from / LANES * LANES; t < to; t += LANES) {
    const vec scale = side(page, 0, t) * UNIT, zero = ZEROS ? side(page, 2, t) : (vec){};
    for (int i = 0; i < M; i++) {
      const vec scores = load_f32(s[i] + t), offset = ZEROS ? held(queries->sum[i] * zero) : (vec){};
      store_f32(s[i] + t, ZEROS ? fused(scores, scale, offset) : scores * scale);
    }
  }
}

static inline __attribute__((always_inline)) void mix(
    const Page *page, const Page *next, Scores p, const int M, int64_t from, int64_t to, vec (*o)[V_VECTORS]) {
  vec shift[BLOCK] = {};
  fetch((const char *)next->sides, SIDES * page->page_tokens * sizeof *page->sides);
  for (int64_t t = from / LANES * LANES; t < to; t += LANES) {
    const vec scale = side(page, 1, t) * UNIT, zero = ZEROS ? side(page, 3, t) : (vec){};
    for (int i = 0; i < M; i++) {
      vec weights = load_f32(p[i] + t);
      if (ZEROS) shift[i] = fused(weights, zero, shift[i]);
      store_f32(p[i] + t, weights * scale);
    }
  }
  mix_rows(page->v, HEAD_DIM, load_row, next->k, HEAD_DIM, p, M, from, to, o);
  for (int i = 0; ZEROS && i < M; i++) {
    const float sum = total(shift[i]);
    for (int v = 0; v < V_VECTORS; v++) o[i][v] += sum;
  }
}
