// What both attention kernels are asked: see pallas_kernels/paged_decode/api.py for shapes.

#pragma once

#include "pages.h"

typedef struct {
  const float *q;  // [rows, q_tokens, heads, HEAD_DIM]
  const int32_t *positions, *counts, *tables, *places;
  Pool pool;
  float *o, *m, *l;  // [rows, q_tokens, heads, VALUE_DIM], [rows, q_tokens, heads]
  int64_t rows, q_tokens, heads, layer, entries;
  int64_t window;  // 0: none
  float scale, softcap;  // softcap 0: none
} Attention;

static inline Attention attention_of(const Frame *frame) {
  const Buffer *q = operand(frame, 0), *tables = operand(frame, 3), *places = operand(frame, 4);
  return (Attention){
      .q = q->data,
      .positions = operand(frame, 1)->data,
      .counts = operand(frame, 2)->data,
      .tables = tables->data,
      .places = places->dims[1] ? places->data : NULL,
      .pool = pool_of(frame),
      .layer = *(const int32_t *)operand(frame, 5)->data,
      .o = result(frame, 0)->data,
      .m = result(frame, 1)->data,
      .l = result(frame, 2)->data,
      .rows = q->dims[0],
      .q_tokens = q->dims[1],
      .heads = q->dims[2],
      .entries = tables->dims[1],
      .scale = (float)f64_attribute(frame, 0),
      .softcap = (float)f64_attribute(frame, 1),
      .window = i64_attribute(frame, 2),
  };
}
