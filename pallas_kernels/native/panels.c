// Rows times a weight matrix whose columns lie in panels, so that each panel is one stream through memory.

#include "frame.h"
#include "vectors.h"

// Compiled for the kind of float in the panels (KIND).
enum { PANEL = 32, VECTORS = PANEL / LANES, BLOCK = LANES == 16 ? 8 : 4, FLOAT_BYTES = KIND == F32 ? 4 : 2 };

typedef struct {
  const float *x;      // [rows, in]
  const char *panels;  // [out / PANEL, in, PANEL]
  float *y;            // [rows, out]
  int64_t rows, in, out;
} Product;

// The first column of vector `v`. Columns of bfloat16 lie as 0, 16, 1, 17, ...: load_pair has them in order.
static inline int64_t column(int v) { return KIND == BF16 ? v % 2 * (PANEL / 2) + v / 2 * LANES : v * LANES; }

// R rows times one panel. Every sum runs over `in` in order, whatever R is.
static inline __attribute__((always_inline)) void multiply(
    const float *x, const char *panel, float *y, int64_t in, int64_t out, const int R) {
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
    for (int v = 0; v < VECTORS; v++) store_f32(y + r * out + column(v), sums[r][v]);
  }
}

static void multiply_panel(const void *context, int64_t item) {
  const Product *p = context;
  const char *panel = p->panels + item * p->in * PANEL * FLOAT_BYTES;
  const float *x = p->x;
  float *y = p->y + item * PANEL;
  int64_t left = p->rows;
  for (; left >= BLOCK; left -= BLOCK, x += BLOCK * p->in, y += BLOCK * p->out) multiply(x, panel, y, p->in, p->out, BLOCK);
  if (left >= 4) multiply(x, panel, y, p->in, p->out, 4), left -= 4, x += 4 * p->in, y += 4 * p->out;
  if (left >= 2) multiply(x, panel, y, p->in, p->out, 2), left -= 2, x += 2 * p->in, y += 2 * p->out;
  if (left >= 1) multiply(x, panel, y, p->in, p->out, 1);
}

XLA_FFI_Error *panel_product(Frame *frame) {
  if (answered_metadata(frame)) return NULL;
  const Buffer *x = operand(frame, 0), *panels = operand(frame, 1);
  const Product p = {
      .x = x->data,
      .panels = panels->data,
      .y = result(frame, 0)->data,
      .rows = x->dims[0],
      .in = x->dims[1],
      .out = panels->dims[0] * PANEL,
  };
  parallel_for(frame, panels->dims[0], &p, multiply_panel);
  return NULL;
}
