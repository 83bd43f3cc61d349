// Rows times a table whose rows are the outputs: logits from the token embeddings of a model that ties them.

#include "frame.h"
#include "vectors.h"

// Compiled for the kind of float in the table (KIND).
enum { OUTPUTS = 64, FLOAT_BYTES = KIND == F32 ? 4 : 2 };

typedef struct {
  const float *x;     // [rows, in], `in` a multiple of LANES
  const char *table;  // [out, in]
  float *y;           // [rows, out]
  int64_t rows, in, out;
} Product;

// R rows times LANES / R outputs. Every sum runs over `in` in the same order, whatever R is.
static inline __attribute__((always_inline)) void multiply(const Product *p, int64_t row, int64_t output, const int R) {
  const int C = LANES / R;
  const float *x = p->x + row * p->in;
  vec sums[LANES];
  for (int i = 0; i < LANES; i++) sums[i] = (vec){};
  // Past the end the last output is computed again, and not stored.
  int64_t at[LANES];
  for (int c = 0; c < C; c++) at[c] = (output + c < p->out ? output + c : p->out - 1) * p->in;
  for (int64_t i = 0; i < p->in; i += LANES) {
    vec w[LANES];
    if (row == 0) {
      for (int c = 0; c < C; c++) fetch((const char *)p->table + (at[c] + C * p->in + i) * FLOAT_BYTES, LANES * FLOAT_BYTES);
    }
#pragma GCC unroll 16
    for (int c = 0; c < C; c++) {
      w[c] = load(p->table, at[c] + i, KIND);
      if (R > 1) w[c] = held(w[c]);
    }
#pragma GCC unroll 16
    for (int r = 0; r < R; r++) {
      const vec one = held(load_f32(x + r * p->in + i));
#pragma GCC unroll 16
      for (int c = 0; c < C; c++) sums[r * C + c] += one * w[c];
    }
  }
  vec y = totals(sums);
  int64_t stored = p->out - output < C ? p->out - output : C;
  for (int r = 0; r < R; r++) memcpy(p->y + (row + r) * p->out + output, (float *)&y + r * C, stored * sizeof(float));
}

// All rows take a few outputs before the next outputs are read, so that the table comes through memory once.
static void multiply_outputs(const void *context, int64_t item) {
  const Product *p = context;
  int64_t end = (item + 1) * OUTPUTS < p->out ? (item + 1) * OUTPUTS : p->out;
  for (int64_t first = item * OUTPUTS; first < end; first += LANES) {
    int64_t row = 0;
    for (; row + 4 <= p->rows; row += 4) {
      for (int64_t output = first; output < first + LANES && output < end; output += LANES / 4) multiply(p, row, output, 4);
    }
    for (; row + 2 <= p->rows; row += 2) {
      for (int64_t output = first; output < first + LANES && output < end; output += LANES / 2) multiply(p, row, output, 2);
    }
    for (; row < p->rows; row++) multiply(p, row, first, 1);
  }
}

XLA_FFI_Error *table_product(Frame *frame) {
  if (answered_metadata(frame)) return NULL;
  const Buffer *x = operand(frame, 0), *table = operand(frame, 1);
  const Product p = {
      .x = x->data,
      .table = table->data,
      .y = result(frame, 0)->data,
      .rows = x->dims[0],
      .in = x->dims[1],
      .out = table->dims[0],
  };
  parallel_for(frame, (p.out + OUTPUTS - 1) / OUTPUTS, &p, multiply_outputs);
  return NULL;
}
