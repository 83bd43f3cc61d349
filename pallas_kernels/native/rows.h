// The products on keys and on values that lie in rows, one for each token. What a row holds is up to the page.

#pragma once

#include "pages.h"

typedef void LoadRow(const char *row, vec *x);

// s = q K^T, M queries at a time. Asks for `coming_bytes` at `coming` for every row that it reads.
static inline __attribute__((always_inline)) void score_rows(
    const char *rows, const int row_bytes, LoadRow load_row, const char *coming, const int coming_bytes,
    const vec (*q)[K_VECTORS], const int M, int64_t from, int64_t to, Scores s) {
  const int C = LANES / M;
  for (int64_t t = from / LANES * LANES; t < to; t += C) {
    vec sums[LANES];
#pragma GCC unroll 16
    for (int c = 0; c < C; c++) {
      vec x[K_VECTORS];
      load_row(rows + (t + c) * row_bytes, x);
      fetch(coming + (t + c) * coming_bytes, coming_bytes);
      for (int i = 0; i < M; i++) {
        vec sum = q[i][0] * x[0];
        for (int v = 1; v < K_VECTORS; v++) sum += q[i][v] * x[v];
        sums[i * C + c] = sum;
      }
    }
    vec scores = totals(sums);
    for (int i = 0; i < M; i++) memcpy(&s[i][t], (float *)&scores + i * C, C * sizeof(float));
  }
}

// o += p V. Asks for memory as score_rows does.
static inline __attribute__((always_inline)) void mix_rows(
    const char *rows, const int row_bytes, LoadRow load_row, const char *coming, const int coming_bytes,
    Scores p, const int M, int64_t from, int64_t to, vec (*o)[V_VECTORS]) {
  for (int64_t t = from; t < to; t++) {
    vec x[V_VECTORS];
    load_row(rows + t * row_bytes, x);
    fetch(coming + t * coming_bytes, coming_bytes);
    for (int i = 0; i < M; i++) {
      for (int v = 0; v < V_VECTORS; v++) o[i][v] += p[i][t] * x[v];
    }
  }
}
