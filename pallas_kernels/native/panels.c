// Rows times a weight matrix in panels.

#include "frame.h"
#include "panels.h"

typedef struct {
  const float *x;      // [rows, in]
  const char *panels;  // [out / PANEL, in, PANEL]
  float *y;            // [rows, out]
  int64_t rows, in, out;
} Product;

static inline __attribute__((always_inline)) void multiply_rows(const void *context, int64_t item, int64_t row, const int R) {
  const Product *p = context;
  multiply(p->x + row * p->in, panel_at(p->panels, item, p->in), p->in, R, p->y + row * p->out + item * PANEL, p->out);
}

static void multiply_panel(const void *context, int64_t item) {
  in_blocks(context, item, 0, ((const Product *)context)->rows, multiply_rows);
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
