// From the residual stream to the heads of attention: norm, projection to q, k and v, norms of q and k, RoPE.

#include "frame.h"
#include "layer.h"

enum { MAX_HEAD_DIM = 256 };

typedef struct {
  const float *x;          // [rows, hidden]
  const float *weight;     // [hidden], of the norm
  const char *panels;      // [kv_heads, group + 2, head_dim / PANEL, hidden, PANEL]
  const float *bias;       // [kv_heads, group + 2, head_dim], or NULL
  const float *qk_weight;  // [2, head_dim], or NULL
  const float *cos, *sin;  // [rows, head_dim / 2]
  float *q, *k, *v;        // [rows, kv_heads * group, head_dim], [rows, kv_heads, head_dim]
  float *normed;           // [rows, hidden]
  Rows live, read;
  int64_t hidden, kv_heads, group, head_dim;
  float eps;
} Heads;

static inline __attribute__((always_inline)) void norm_rows(const void *context, int64_t item, int64_t row, const int R) {
  const Heads *h = context;
  for (int64_t i = row * h->hidden; i < (row + R) * h->hidden; i += h->hidden) {
    normalize(h->x + i, h->weight, h->eps, h->hidden, h->normed + i);
  }
}

static void no_output(const void *context, int64_t item, int64_t row) {}

static void norm_item(const void *context, int64_t item) {
  on_rows(context, item, ((const Heads *)context)->live, norm_rows, no_output);
}

// Head number `item` of a row: first the queries of a KV head, then its key, then its value.
static inline float *output(const Heads *h, int64_t item, int64_t row) {
  const int64_t kv_head = item / (h->group + 2), part = item % (h->group + 2);
  if (part < h->group) return h->q + ((row * h->kv_heads + kv_head) * h->group + part) * h->head_dim;
  return (part == h->group ? h->k : h->v) + (row * h->kv_heads + kv_head) * h->head_dim;
}

static inline void rotate(float *head, const float *cos, const float *sin, int64_t half) {
  for (int64_t i = 0; i < half; i += LANES) {
    const vec c = load_f32(cos + i), s = load_f32(sin + i), first = load_f32(head + i), second = load_f32(head + half + i);
    store_f32(head + i, fused(first, c, -held(second * s)));
    store_f32(head + half + i, fused(second, c, held(first * s)));
  }
}

static inline __attribute__((always_inline)) void project(const void *context, int64_t item, int64_t row, const int R) {
  const Heads *h = context;
  const int64_t part = item % (h->group + 2), panels = h->head_dim / PANEL, half = h->head_dim / 2;
  float heads[BLOCK * MAX_HEAD_DIM];
  for (int64_t p = 0; p < panels; p++) {
    multiply(
        h->normed + row * h->hidden, panel_at(h->panels, item * panels + p, h->hidden), h->hidden, R, heads + p * PANEL,
        h->head_dim);
  }
  for (int r = 0; r < R; r++) {
    float *head = heads + r * h->head_dim;
    for (int64_t i = 0; h->bias && i < h->head_dim; i += LANES) {
      store_f32(head + i, load_f32(head + i) + load_f32(h->bias + item * h->head_dim + i));
    }
    if (part <= h->group) {
      if (h->qk_weight) normalize(head, h->qk_weight + (part == h->group) * h->head_dim, h->eps, h->head_dim, head);
      rotate(head, h->cos + (row + r) * half, h->sin + (row + r) * half, half);
    }
    memcpy(output(h, item, row + r), head, h->head_dim * sizeof(float));
  }
}

static void clear(const void *context, int64_t item, int64_t row) {
  const Heads *h = context;
  memset(output(h, item, row), 0, h->head_dim * sizeof(float));
}

static void project_item(const void *context, int64_t item) {
  const Heads *h = context;
  const bool query = item / chunks(h->live) % (h->group + 2) < h->group;
  on_rows(context, item, query ? h->read : h->live, project, clear);
}

XLA_FFI_Error *project_heads(Frame *frame) {
  if (answered_metadata(frame)) return NULL;
  const Buffer *x = operand(frame, 0), *bias = operand(frame, 5), *qk = operand(frame, 6);
  const Buffer *q = result(frame, 0), *k = result(frame, 1);
  const Heads h = {
      .x = x->data,
      .weight = operand(frame, 3)->data,
      .panels = operand(frame, 4)->data,
      .bias = bias->dims[0] ? bias->data : NULL,
      .qk_weight = qk->dims[0] ? qk->data : NULL,
      .cos = operand(frame, 7)->data,
      .sin = operand(frame, 8)->data,
      .q = q->data,
      .k = k->data,
      .v = result(frame, 2)->data,
      .normed = result(frame, 3)->data,
      .live = {operand(frame, 1)->data, x->dims[0]},
      .read = {operand(frame, 2)->data, x->dims[0]},
      .hidden = x->dims[1],
      .kv_heads = k->dims[1],
      .group = q->dims[1] / k->dims[1],
      .head_dim = q->dims[2],
      .eps = (float)f64_attribute(frame, 0),
  };
  const Loop loops[] = {{norm_item, chunks(h.live)}, {project_item, h.kv_heads * (h.group + 2) * chunks(h.live)}};
  parallel_loops(frame, &h, loops, 2);
  return NULL;
}
