// From the heads' output to the next layer: projection and residual, norm, down(silu(gate) * up), residual.

#include "frame.h"
#include "layer.h"

typedef struct {
  const float *x;        // [rows, hidden]
  const float *heads;    // [rows, inner]
  const char *out;       // panels of [inner, hidden]
  const float *weight;   // [hidden], of the norm
  const char *gate_up;   // panels of [hidden, 2 * size], blocks of `block` gate columns and as many up columns
  const char *down;      // panels of [size, hidden]
  float *y;              // [rows, hidden]
  float *normed;         // [rows, hidden]
  float *gated;          // [rows, size]
  Rows rows;
  int64_t hidden, inner, size, block;
  float eps;
} Forward;

// A panel of columns for R rows: y = x + the product of `input` [rows, in] with panel `item` of `weight`.
static inline __attribute__((always_inline)) void add_product(
    const Forward *f, const float *x, const float *input, int64_t in, const char *weight, int64_t item, int64_t row, const int R) {
  float sums[BLOCK * PANEL];
  multiply(input + row * in, panel_at(weight, item, in), in, R, sums, PANEL);
  for (int r = 0; r < R; r++) {
    const int64_t at = (row + r) * f->hidden + item * PANEL;
    for (int i = 0; i < PANEL; i += LANES) store_f32(f->y + at + i, load_f32(x + at + i) + load_f32(sums + r * PANEL + i));
  }
}

static inline __attribute__((always_inline)) void add_heads(const void *context, int64_t item, int64_t row, const int R) {
  const Forward *f = context;
  add_product(f, f->x, f->heads, f->inner, f->out, item, row, R);
}

static inline __attribute__((always_inline)) void norm_rows(const void *context, int64_t item, int64_t row, const int R) {
  const Forward *f = context;
  for (int64_t i = row * f->hidden; i < (row + R) * f->hidden; i += f->hidden) {
    normalize(f->y + i, f->weight, f->eps, f->hidden, f->normed + i);
  }
}

static inline __attribute__((always_inline)) void gate(const void *context, int64_t item, int64_t row, const int R) {
  const Forward *f = context;
  const int64_t first = item * PANEL / f->block * 2 * f->block + item * PANEL % f->block;
  float gates[BLOCK * PANEL], ups[BLOCK * PANEL];
  const float *x = f->normed + row * f->hidden;
  multiply(x, panel_at(f->gate_up, first / PANEL, f->hidden), f->hidden, R, gates, PANEL);
  multiply(x, panel_at(f->gate_up, (first + f->block) / PANEL, f->hidden), f->hidden, R, ups, PANEL);
  for (int r = 0; r < R; r++) {
    for (int i = 0; i < PANEL; i += LANES) {
      vec gate = load_f32(gates + r * PANEL + i), up = load_f32(ups + r * PANEL + i);
      // 1 / (1 + e^-x) is e^x / (1 + e^x): the one whose power is not above 1.
      vec power = exponential(pick(gate > 0.0f, -gate, gate));
      vec open = held(gate * pick(gate > 0.0f, all(1.0f), power)) / (1.0f + power);
      store_f32(f->gated + (row + r) * f->size + item * PANEL + i, held(open) * up);
    }
  }
}

static inline __attribute__((always_inline)) void add_down(const void *context, int64_t item, int64_t row, const int R) {
  const Forward *f = context;
  add_product(f, f->y, f->gated, f->size, f->down, item, row, R);
}

static void clear(const void *context, int64_t item, int64_t row) {
  const Forward *f = context;
  memset(f->y + row * f->hidden + item * PANEL, 0, PANEL * sizeof(float));
}

static void no_output(const void *context, int64_t item, int64_t row) {}

static void heads_item(const void *context, int64_t item) { on_rows(context, item, ((const Forward *)context)->rows, add_heads, clear); }
static void norm_item(const void *context, int64_t item) { on_rows(context, item, ((const Forward *)context)->rows, norm_rows, no_output); }
static void gate_item(const void *context, int64_t item) { on_rows(context, item, ((const Forward *)context)->rows, gate, no_output); }
static void down_item(const void *context, int64_t item) { on_rows(context, item, ((const Forward *)context)->rows, add_down, no_output); }

XLA_FFI_Error *feed_forward(Frame *frame) {
  if (answered_metadata(frame)) return NULL;
  const Buffer *x = operand(frame, 0), *heads = operand(frame, 2), *gated = result(frame, 2);
  const Forward f = {
      .x = x->data,
      .heads = heads->data,
      .out = operand(frame, 3)->data,
      .weight = operand(frame, 4)->data,
      .gate_up = operand(frame, 5)->data,
      .down = operand(frame, 6)->data,
      .y = result(frame, 0)->data,
      .normed = result(frame, 1)->data,
      .gated = gated->data,
      .rows = {operand(frame, 1)->data, x->dims[0]},
      .hidden = x->dims[1],
      .inner = heads->dims[1],
      .size = gated->dims[1],
      .block = i64_attribute(frame, 0),
      .eps = (float)f64_attribute(frame, 1),
  };
  const int64_t each = chunks(f.rows), columns = f.hidden / PANEL;
  const Loop loops[] = {
      {heads_item, columns * each}, {norm_item, each}, {gate_item, f.size / PANEL * each}, {down_item, columns * each}};
  parallel_loops(frame, &f, loops, 4);
  return NULL;
}
