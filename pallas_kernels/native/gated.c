// silu(gate) * up, what gated feed-forward layers compute between their products.

#include "frame.h"
#include "vectors.h"

enum { ROWS = 16 };

typedef struct {
  const float *both;  // [rows, 2 * size]: gate, then up; `size` a multiple of LANES
  float *y;           // [rows, size]
  int64_t rows, size;
} Gated;

static void gate_rows(const void *context, int64_t item) {
  const Gated *g = context;
  int64_t end = (item + 1) * ROWS < g->rows ? (item + 1) * ROWS : g->rows;
  for (int64_t row = item * ROWS; row < end; row++) {
    const float *gates = g->both + row * 2 * g->size;
    for (int64_t i = 0; i < g->size; i += LANES) {
      vec gate = load_f32(gates + i), up = load_f32(gates + g->size + i);
      // 1 / (1 + e^-x) is e^x / (1 + e^x): the one whose power is not above 1.
      vec power = exponential(pick(gate > 0.0f, -gate, gate));
      store_f32(g->y + row * g->size + i, gate * pick(gate > 0.0f, all(1.0f), power) / (1.0f + power) * up);
    }
  }
}

XLA_FFI_Error *gated_silu(Frame *frame) {
  if (answered_metadata(frame)) return NULL;
  const Buffer *both = operand(frame, 0);
  const Gated g = {.both = both->data, .y = result(frame, 0)->data, .rows = both->dims[0], .size = both->dims[1] / 2};
  parallel_for(frame, (g.rows + ROWS - 1) / ROWS, &g, gate_rows);
  return NULL;
}
