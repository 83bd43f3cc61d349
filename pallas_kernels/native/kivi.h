// Packed pages dequantized as they are read (KIVI): keys have a scale and minimum for each channel, which go into the
// queries, values one for each token and group of channels, which go into the weights. What is left of a code is itself.

#pragma once

enum { KEY_METAS = HEAD_DIM, VALUE_METAS = VALUE_DIM / GROUP * PAGE_TOKENS, SUMS = 0 };

#include "packed.h"
#include "rows.h"

enum { T_VECTORS = PAGE_TOKENS / LANES };

typedef struct {
  vec x[BLOCK][K_VECTORS];
} Queries;

// The codes in one field of LANES bytes.
static inline __attribute__((always_inline)) vec load_field(const char *p, const int field) {
  ivec bytes = load_bytes(p, false) >> (field * BITS);
#if LANES == 16
  vec codes;  // a permutation looks at the lowest four bits of an index
  for (int lane = 0; lane < LANES; lane++) codes[lane] = lane & ((1 << BITS) - 1);
  return __builtin_shuffle(codes, bytes);
#else
  return __builtin_convertvector(bytes & ((1 << BITS) - 1), vec);
#endif
}

static inline __attribute__((always_inline)) void load_key(const char *row, vec *x) {
  for (int v = 0; v < K_VECTORS; v++) x[v] = load_field(row + v * LANES % K_ROW, v * LANES / K_ROW);
}

static inline void load_query(const float *p, float scale, int i, Queries *queries) {
  for (int v = 0; v < K_VECTORS; v++) queries->x[i][v] = held(load_f32(p + v * LANES) * scale);
}

static inline __attribute__((always_inline)) void score(
    const Page *page, const Queries *queries, const int M, int64_t from, int64_t to, Scores s) {
  Queries folded;
  vec shift[BLOCK] = {};
  fetch_value_metas(page);
  for (int v = 0; v < K_VECTORS; v++) {
    const vec scale = load(page->k_scale, v * LANES, BF16), low = load(page->k_min, v * LANES, BF16);
    for (int i = 0; i < M; i++) {
      folded.x[i][v] = queries->x[i][v] * scale;
      shift[i] = fused(queries->x[i][v], low, shift[i]);
    }
  }
  score_rows(page->k_codes, K_ROW, load_key, page->v_codes, V_ROWS, folded.x, M, from, to, s);
  for (int i = 0; i < M; i++) {
    const float sum = total(shift[i]);
    for (int t = 0; t < PAGE_TOKENS; t += LANES) store_f32(s[i] + t, load_f32(s[i] + t) + sum);
  }
}

static inline __attribute__((always_inline)) void mix(
    const Page *page, const Page *next, Scores p, const int M, int64_t from, int64_t to, vec (*o)[V_VECTORS]) {
  enum { COMING = (K_BYTES + VALUE_DIM - 1) / VALUE_DIM };
  const int C = LANES / M;
  fetch_key_metas(next);
  for (int first = 0; first < VALUE_DIM; first += GROUP) {
    vec folded[BLOCK][T_VECTORS], shift[BLOCK] = {};
    for (int v = 0; v < T_VECTORS; v++) {
      const int64_t t = first / GROUP * PAGE_TOKENS + v * LANES;
      const vec scale = load(page->v_scale, t, BF16), low = load(page->v_min, t, BF16);
      for (int i = 0; i < M; i++) {
        const vec weights = load_f32(p[i] + v * LANES);
        folded[i][v] = weights * scale;
        shift[i] = fused(weights, low, shift[i]);
      }
    }
    float mixed[BLOCK][GROUP];
#pragma GCC unroll 1
    for (int plane = first; plane < first + GROUP; plane += V_ROWS < GROUP ? V_ROWS : GROUP) {
#pragma GCC unroll 1
      for (int row = plane % V_ROWS, end = row + (V_ROWS < GROUP ? V_ROWS : GROUP); row < end; row += C) {
        const int field = plane / V_ROWS, channel = field * V_ROWS + row;
        vec sums[LANES];
#pragma GCC unroll 16
        for (int c = 0; c < C; c++) {
          const char *codes = page->v_codes + (row + c) * PAGE_TOKENS;
          fetch(next->k_codes + (channel + c) * COMING, COMING);
          vec sum[BLOCK] = {};
          for (int v = 0; v < T_VECTORS; v++) {
            const vec x = load_field(codes + v * LANES, field);
            for (int i = 0; i < M; i++) sum[i] = fused(folded[i][v], x, sum[i]);
          }
          for (int i = 0; i < M; i++) sums[i * C + c] = sum[i];
        }
        const vec all_sums = totals(sums);
        for (int i = 0; i < M; i++) memcpy(&mixed[i][channel - first], (float *)&all_sums + i * C, C * sizeof(float));
      }
    }
    for (int i = 0; i < M; i++) {
      const float sum = total(shift[i]);
      for (int v = 0; v < GROUP / LANES; v++) o[i][first / LANES + v] += held(load_f32(mixed[i] + v * LANES) + sum);
    }
  }
}
