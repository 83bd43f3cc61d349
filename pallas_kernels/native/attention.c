// Attention of a few queries over dense KV pages, read where they lie. See pallas_kernels/paged_decode/api.py for shapes.

#include <math.h>

#include "frame.h"
#include "vectors.h"

// Compiled for one head_dim (DIM) and one kind of float in the pool (KIND).
enum { MAX_PAGE_TOKENS = 128, BLOCK = 4, QUERIES_PER_ITEM = 16, VECTORS = DIM / LANES, FLOAT_BYTES = KIND == F32 ? 4 : 2 };

// A row of the pool. Its channels come in an order of their own, which load_query and store_output share.
static inline __attribute__((always_inline)) void load_row(const void *p, int64_t i, vec *x) {
  for (int v = 0; v + 1 < VECTORS; v += 2) load_pair(p, i + v * LANES, KIND, x + v);
  if (VECTORS % 2) x[VECTORS - 1] = load(p, i + (VECTORS - 1) * LANES, KIND);
}

static inline void load_query(const float *p, vec *x) {
  for (int v = 0; v + 1 < VECTORS; v += 2) load_sorted(p + v * LANES, KIND, x + v);
  if (VECTORS % 2) x[VECTORS - 1] = load_f32(p + (VECTORS - 1) * LANES);
}

static inline void store_output(float *p, const vec *x) {
  for (int v = 0; v + 1 < VECTORS; v += 2) store_sorted(p + v * LANES, KIND, x + v);
  if (VECTORS % 2) store_f32(p + (VECTORS - 1) * LANES, x[VECTORS - 1]);
}

typedef struct {
  const float *q;  // [rows, q_tokens, heads, dim]
  const int32_t *positions, *counts, *tables, *places;
  const char *pool;  // [pages, layers, 2, kv_heads, page_tokens, dim]
  float *o, *m, *l;
  int64_t q_tokens, heads, pages, layers, layer, kv_heads, page_tokens, entries;
  int64_t window;  // 0: none
  float scale, softcap;  // softcap 0: none
} Attention;

// M queries of one row that share a KV head: query i is number first + i of group * q_tokens, tokens innermost.
static inline __attribute__((always_inline)) void attend(
    const Attention *a, int64_t row, int64_t head, int64_t first, const int M) {
  enum { D = DIM, V = VECTORS };
  const int C = LANES / M;
  const int64_t group = a->heads / a->kv_heads;
  vec q[BLOCK][V], o[BLOCK][V];
  float m[BLOCK], l[BLOCK];
  int64_t at[BLOCK], slot[BLOCK], last = -1, begin = INT64_MAX;
  const int32_t position = a->positions[row];
  for (int i = 0; i < M; i++) {
    int64_t token = (first + i) % a->q_tokens, query_head = head * group + (first + i) / a->q_tokens;
    slot[i] = (row * a->q_tokens + token) * a->heads + query_head;
    at[i] = position >= 0 && token < a->counts[row] ? position + token : -1;
    if (at[i] > last) last = at[i];
    int64_t start = a->window && at[i] >= a->window ? at[i] - a->window + 1 : 0;
    if (at[i] >= 0 && start < begin) begin = start;
    load_query(a->q + slot[i] * D, q[i]);
    for (int v = 0; v < V; v++) {
      q[i][v] *= a->scale;
      o[i][v] = (vec){};
    }
    m[i] = NO_KEY, l[i] = 0;
  }
  const int64_t T = a->page_tokens, plane = T * D * FLOAT_BYTES, step = a->kv_heads * plane;
  float s[BLOCK][MAX_PAGE_TOKENS];
  for (int64_t entry = 0; entry < a->entries && last >= 0; entry++) {
    int64_t page = a->tables[row * a->entries + entry];
    int64_t base = (a->places ? a->places[row * a->entries + entry] : entry) * T;
    if (base > last) {
      if (a->places) continue;
      break;
    }
    if (base + T <= begin || page < 0 || page >= a->pages) continue;
    const char *k = a->pool + (page * a->layers + a->layer) * 2 * step + head * plane;
    const int64_t from = begin > base ? begin - base : 0, to = last - base + 1 < T ? last - base + 1 : T;
    const int64_t first_chunk = from / LANES * LANES;
    for (int64_t t = first_chunk; t < to; t += C) {
      vec sums[LANES];
#pragma GCC unroll 16
      for (int c = 0; c < C; c++) {
        vec x[V];
        load_row(k, (t + c) * D, x);
        fetch(k + step + (t + c) * D * FLOAT_BYTES, D * FLOAT_BYTES);
        for (int i = 0; i < M; i++) {
          vec sum = q[i][0] * x[0];
          for (int v = 1; v < V; v++) sum += q[i][v] * x[v];
          sums[i * C + c] = sum;
        }
      }
      vec scores = totals(sums);
      for (int i = 0; i < M; i++) memcpy(&s[i][t], (float *)&scores + i * C, C * sizeof(float));
    }
    for (int i = 0; i < M; i++) {
      if (a->softcap != 0) {
        for (int64_t t = from; t < to; t++) s[i][t] = a->softcap * tanhf(s[i][t] / a->softcap);
      }
      const int32_t seen_to = at[i] - base + 1, seen_from = a->window ? at[i] - a->window + 1 - base : 0;
      vec tops = all(m[i]), sums = {};
      for (int64_t t = first_chunk; t < to; t += LANES) {
        ivec token = lanes() + (int32_t)t;
        vec seen = pick((token < seen_to) & (token >= seen_from), load_f32(s[i] + t), all(NO_KEY));
        store_f32(s[i] + t, seen);
        tops = pick(seen > tops, seen, tops);
      }
      const float top = largest(tops);
      for (int64_t t = first_chunk; t < to; t += LANES) {
        vec score = load_f32(s[i] + t), p = pick(score > NO_KEY, exponential(score - top), (vec){});
        store_f32(s[i] + t, p);
        sums += p;
      }
      const float keep = exponential(all(m[i] - top))[0];
      l[i] = l[i] * keep + total(sums);
      m[i] = top;
      for (int v = 0; v < V; v++) o[i][v] *= keep;
    }
    k += step;
    const char *next = k;
    if (entry + 1 < a->entries) {
      int64_t following = a->tables[row * a->entries + entry + 1];
      if (following >= 0 && following < a->pages) next = a->pool + (following * a->layers + a->layer) * 2 * step + head * plane;
    }
    for (int64_t t = from; t < to; t++) {
      vec x[V];
      load_row(k, t * D, x);
      fetch(next + t * D * FLOAT_BYTES, D * FLOAT_BYTES);
      for (int i = 0; i < M; i++) {
        for (int v = 0; v < V; v++) o[i][v] += s[i][t] * x[v];
      }
    }
  }
  for (int i = 0; i < M; i++) {
    store_output(a->o + slot[i] * D, o[i]);
    a->m[slot[i]] = m[i];
    a->l[slot[i]] = l[i];
  }
}

static int64_t parts(const Attention *a) {
  return (a->heads / a->kv_heads * a->q_tokens + QUERIES_PER_ITEM - 1) / QUERIES_PER_ITEM;
}

static void attend_item(const void *context, int64_t item) {
  const Attention *a = context;
  int64_t part = item % parts(a), head = item / parts(a) % a->kv_heads, row = item / parts(a) / a->kv_heads;
  int64_t queries = a->heads / a->kv_heads * a->q_tokens, first = part * QUERIES_PER_ITEM;
  int64_t end = first + QUERIES_PER_ITEM < queries ? first + QUERIES_PER_ITEM : queries;
  for (; first + 4 <= end; first += 4) attend(a, row, head, first, 4);
  for (; first + 2 <= end; first += 2) attend(a, row, head, first, 2);
  for (; first < end; first++) attend(a, row, head, first, 1);
}

XLA_FFI_Error *paged_attention(Frame *frame) {
  if (answered_metadata(frame)) return NULL;
  const Buffer *q = operand(frame, 0), *tables = operand(frame, 3), *places = operand(frame, 4), *pool = operand(frame, 6);
  const Attention a = {
      .q = q->data,
      .positions = operand(frame, 1)->data,
      .counts = operand(frame, 2)->data,
      .tables = tables->data,
      .places = places->dims[1] ? places->data : NULL,
      .pool = pool->data,
      .layer = *(const int32_t *)operand(frame, 5)->data,
      .o = result(frame, 0)->data,
      .m = result(frame, 1)->data,
      .l = result(frame, 2)->data,
      .q_tokens = q->dims[1],
      .heads = q->dims[2],
      .pages = pool->dims[0],
      .layers = pool->dims[1],
      .kv_heads = pool->dims[3],
      .page_tokens = pool->dims[4],
      .entries = tables->dims[1],
      .scale = (float)f64_attribute(frame, 0),
      .softcap = (float)f64_attribute(frame, 1),
      .window = i64_attribute(frame, 2),
  };
  parallel_for(frame, q->dims[0] * a.kv_heads * parts(&a), &a, attend_item);
  return NULL;
}
