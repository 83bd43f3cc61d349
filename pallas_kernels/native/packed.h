// Pages of packed codes, keys token by token and values channel by channel, see pallas_kernels/layouts/packed.py: where they
// lie. What is done with codes is up to kivi.h and hack.h, which say first how scales run (KEY_METAS, VALUE_METAS) and
// whether pages hold sums of codes (SUMS). Compiled for a number of BITS, a GROUP of channels and for PAGE_TOKENS.

#pragma once

#include "pages.h"

enum {
  WHOLE_PAGES = 1,
  FIELDS = 8 / BITS,
  K_ROW = HEAD_DIM / FIELDS,     // bytes of a key; a field of all of them is as many neighbouring channels
  V_ROWS = VALUE_DIM / FIELDS,   // rows of PAGE_TOKENS bytes; a field of all of them is as many neighbouring channels
  K_BYTES = PAGE_TOKENS * K_ROW,
  V_BYTES = V_ROWS * PAGE_TOKENS,
  HALF = 1 << (BITS - 1),        // what a signed code lacks to the stored one
  K_SUM_BYTES = GROUP * HALF <= 128 ? 1 : 2,
  V_SUM_BYTES = PAGE_TOKENS * HALF <= 128 ? 1 : 2,
};

typedef struct {
  const char *k_codes, *k_scale, *k_min, *v_codes, *v_scale, *v_min, *k_sum, *v_sum;  // [pages, layers, kv_heads, ...]
  int64_t pages, layers, kv_heads, page_tokens;
} Pool;

typedef struct {
  const char *k_codes, *v_codes;
  const uint16_t *k_scale, *k_min, *v_scale, *v_min;  // bfloat16
  const char *k_sum, *v_sum;
} Page;

static inline Pool pool_of(const Frame *frame) {
  const char *data[8] = {};
  for (int i = 0; i < (SUMS ? 8 : 6); i++) data[i] = operand(frame, POOL + i)->data;
  const int64_t *dims = operand(frame, POOL)->dims;
  return (Pool){data[0], data[1], data[2], data[3], data[4], data[5], data[6], data[7], dims[0], dims[1], dims[2], dims[3]};
}

static inline Page page_at(const Pool *pool, int64_t block, int64_t head) {
  const int64_t i = block * pool->kv_heads + head;
  return (Page){
      .k_codes = pool->k_codes + i * K_BYTES,
      .v_codes = pool->v_codes + i * V_BYTES,
      .k_scale = (const uint16_t *)pool->k_scale + i * KEY_METAS,
      .k_min = (const uint16_t *)pool->k_min + i * KEY_METAS,
      .v_scale = (const uint16_t *)pool->v_scale + i * VALUE_METAS,
      .v_min = (const uint16_t *)pool->v_min + i * VALUE_METAS,
      .k_sum = SUMS ? pool->k_sum + i * (HEAD_DIM / GROUP) * PAGE_TOKENS * K_SUM_BYTES : NULL,
      .v_sum = SUMS ? pool->v_sum + i * VALUE_DIM * V_SUM_BYTES : NULL,
  };
}

static inline void fetch_key_metas(const Page *page) {
  fetch((const char *)page->k_scale, 2 * KEY_METAS);
  fetch((const char *)page->k_min, 2 * KEY_METAS);
  if (SUMS) fetch(page->k_sum, HEAD_DIM / GROUP * PAGE_TOKENS * K_SUM_BYTES);
}

static inline void fetch_value_metas(const Page *page) {
  fetch((const char *)page->v_scale, 2 * VALUE_METAS);
  fetch((const char *)page->v_min, 2 * VALUE_METAS);
  if (SUMS) fetch(page->v_sum, VALUE_DIM * V_SUM_BYTES);
}

static inline void store_output(float *p, const vec *o) {
  for (int v = 0; v < V_VECTORS; v++) store_f32(p + v * LANES, o[v]);
}
