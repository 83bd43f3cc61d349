// Pages of floats (KIND): keys and values in rows, in one array or in two.

#pragma once

#include "rows.h"

enum { WHOLE_PAGES = 0, FLOAT_BYTES = KIND == F32 ? 4 : 2 };
enum { K_ROW = HEAD_DIM * FLOAT_BYTES, V_ROW = VALUE_DIM * FLOAT_BYTES };

typedef struct {
  const char *k, *v;  // each [pages, layers, kv_heads, page_tokens, dim]; or both in [pages, layers, 2, kv_heads, ...]
  int64_t pages, layers, kv_heads, page_tokens, k_block, v_block;
} Pool;

typedef struct {
  const char *k, *v;
} Page;

typedef struct {
  vec x[BLOCK][K_VECTORS];
} Queries;

static inline Pool pool_of(const Frame *frame) {
  const Buffer *k = operand(frame, POOL);
  const bool one = frame->args.size == POOL + 1;
  const int64_t kv_heads = k->dims[one ? 3 : 2], page_tokens = k->dims[one ? 4 : 3];
  const int64_t k_bytes = kv_heads * page_tokens * K_ROW, v_bytes = kv_heads * page_tokens * V_ROW;
  return (Pool){
      .k = k->data,
      .v = one ? (const char *)k->data + k_bytes : operand(frame, POOL + 1)->data,
      .pages = k->dims[0],
      .layers = k->dims[1],
      .kv_heads = kv_heads,
      .page_tokens = page_tokens,
      .k_block = one ? k_bytes + v_bytes : k_bytes,
      .v_block = one ? k_bytes + v_bytes : v_bytes,
  };
}

static inline Page page_at(const Pool *pool, int64_t block, int64_t head) {
  return (Page){
      pool->k + block * pool->k_block + head * pool->page_tokens * K_ROW,
      pool->v + block * pool->v_block + head * pool->page_tokens * V_ROW,
  };
}

// The channels of a row come in an order of their own, which queries and outputs share.
static inline __attribute__((always_inline)) void load_floats(const char *p, const int vectors, vec *x) {
  for (int v = 0; v + 1 < vectors; v += 2) load_pair(p, v * LANES, KIND, x + v);
  if (vectors % 2) x[vectors - 1] = load(p, (vectors - 1) * LANES, KIND);
}

static inline __attribute__((always_inline)) void load_key(const char *row, vec *x) { load_floats(row, K_VECTORS, x); }
static inline __attribute__((always_inline)) void load_value(const char *row, vec *x) { load_floats(row, V_VECTORS, x); }

static inline void load_query(const float *p, float scale, int i, Queries *queries) {
  vec *x = queries->x[i];
  for (int v = 0; v + 1 < K_VECTORS; v += 2) load_sorted(p + v * LANES, KIND, x + v);
  if (K_VECTORS % 2) x[K_VECTORS - 1] = load_f32(p + (K_VECTORS - 1) * LANES);
  for (int v = 0; v < K_VECTORS; v++) x[v] *= scale;
}

static inline void store_output(float *p, const vec *o) {
  for (int v = 0; v + 1 < V_VECTORS; v += 2) store_sorted(p + v * LANES, KIND, o + v);
  if (V_VECTORS % 2) store_f32(p + (V_VECTORS - 1) * LANES, o[V_VECTORS - 1]);
}

static inline __attribute__((always_inline)) void score(
    const Page *page, const Queries *queries, const int M, int64_t from, int64_t to, Scores s) {
  score_rows(page->k, K_ROW, load_key, page->v, V_ROW, queries->x, M, from, to, s);
}

static inline __attribute__((always_inline)) void mix(
    const Page *page, const Page *next, Scores p, const int M, int64_t from, int64_t to, vec (*o)[V_VECTORS]) {
  mix_rows(page->v, V_ROW, load_value, next->k, K_ROW, p, M, from, to, o);
}
