// A weight matrix whose columns lie in panels, so that each panel is one stream through memory. No XLA.

#pragma once

#include "vectors.h"

// Compiled for the kind of float in the panels (KIND).
enum { PANEL = 32, VECTORS = PANEL / LANES, BLOCK = LANES == 16 ? 8 : 4, FLOAT_BYTES = KIND == F32 ? 4 : 2 };

// Panel number `i` of a matrix with `in` rows.
static inline const char *panel_at(const char *panels, int64_t i, int64_t in) { return panels + i * in * PANEL * FLOAT_BYTES; }

// The first column of vector `v`. Columns of bfloat16 lie as 0, 16, 1, 17, ...: load_pair has them in order.
static inline int64_t column(int v) { return KIND == BF16 ? v % 2 * (PANEL / 2) + v / 2 * LANES : v * LANES; }

// R rows of x [R, in] times one panel: y[r * stride + column]. Every sum runs over `in` in order, whatever R is.
static inline __attribute__((always_inline)) void multiply(
    const float *x, const char *panel, int64_t in, const int R, float *y, int64_t stride) {
  vec sums[BLOCK][VECTORS];
  for (int r = 0; r < R; r++) {
    for (int v = 0; v < VECTORS; v++) sums[r][v] = (vec){};
  }
  for (int64_t i = 0; i < in; i++) {
    vec w[VECTORS];
    for (int v = 0; v < VECTORS; v += 2) load_pair(panel, i * PANEL + v * LANES, KIND, w + v);
#pragma GCC unroll 8
    for (int r = 0; r < R; r++) {
      for (int v = 0; v < VECTORS; v++) sums[r][v] += x[r * in + i] * w[v];
    }
  }
  for (int r = 0; r < R; r++) {
    for (int v = 0; v < VECTORS; v++) store_f32(y + r * stride + column(v), sums[r][v]);
  }
}

// What a kernel does with R rows from `row` on for one of its items.
typedef void Work(const void *context, int64_t item, int64_t row, const int R);

// `work` on the rows [row, end), block by block, each of a size known to the compiler.
static inline __attribute__((always_inline)) void in_blocks(
    const void *context, int64_t item, int64_t row, int64_t end, Work *work) {
  for (; row + BLOCK <= end; row += BLOCK) work(context, item, row, BLOCK);
  if (row + 4 <= end) work(context, item, row, 4), row += 4;
  if (row + 2 <= end) work(context, item, row, 2), row += 2;
  if (row < end) work(context, item, row, 1);
}
