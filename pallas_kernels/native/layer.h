// What the halves of a decoder layer share: norms, and rows of a step of which some are padding.

#pragma once

#include <math.h>

#include "panels.h"

// x / rms(x) * weight; n is a multiple of LANES. y may be x.
static inline void normalize(const float *x, const float *weight, float eps, int64_t n, float *y) {
  vec sums = {};
  for (int64_t i = 0; i < n; i += LANES) sums = fused(load_f32(x + i), load_f32(x + i), sums);
  const float scale = 1.0f / sqrtf(total(sums) / n + eps);
  for (int64_t i = 0; i < n; i += LANES) store_f32(y + i, held(load_f32(x + i) * scale) * load_f32(weight + i));
}

enum { ROWS = 64 };  // of one item

// The rows of a step, and which of them are wanted. The others are padding, or nobody reads what becomes of them.
typedef struct {
  const uint8_t *wanted;
  int64_t count;
} Rows;

static inline int64_t chunks(Rows rows) { return (rows.count + ROWS - 1) / ROWS; }

// `work` on the wanted rows of chunk item % chunks, and `clear` on the others, each for item / chunks. What is not wanted
// within a block may be computed with it: of such rows there are mostly many together.
static inline __attribute__((always_inline)) void on_rows(
    const void *context, int64_t item, Rows rows, Work *work, void (*clear)(const void *context, int64_t item, int64_t row)) {
  const int64_t first = item % chunks(rows) * ROWS, end = first + ROWS < rows.count ? first + ROWS : rows.count;
  item /= chunks(rows);
  for (int64_t row = first; row < end; row += BLOCK) {
    const int64_t stop = row + BLOCK < end ? row + BLOCK : end;
    int64_t from = row, to = stop;
    while (to > row && !rows.wanted[to - 1]) to--;
    while (from < to && !rows.wanted[from]) from++;
    // A whole block takes no longer than two halves.
    if (stop == row + BLOCK && to - from > BLOCK / 2) from = row, to = stop;
    for (int64_t other = row; other < from; other++) clear(context, item, other);
    in_blocks(context, item, from, to, work);
    for (int64_t other = to; other < stop; other++) clear(context, item, other);
  }
}
