// Attention of prefill tiles over pages of floats, see pallas_kernels/paged_prefill/api.py for shapes.
//
// What attention.c does for a few queries, for so many that a page is worth making into float32 and its keys into columns:
// both products are then as fast as those with weights. Their sums run in another order, so a query's bits are its own,
// whatever tile it is in, but not those that attention.c gives it.

#include "dense.h"
#include "softmax.h"
#include "walk.h"

// Compiled for one PAGE_TOKENS, too.
enum { WIDTH = 2 * LANES, QUERIES = LANES == 16 ? 8 : 4 };

// A page as the products want it.
typedef struct {
  float keys[HEAD_DIM * PAGE_TOKENS];     // a row for each channel
  float values[PAGE_TOKENS * VALUE_DIM];  // a row for each token
} Floats;

static inline void transpose(vec *x) {
#pragma GCC unroll 4
  for (int apart = 1; apart < LANES; apart *= 2) {
    const Pairs take = pairs(apart);
#pragma GCC unroll 16
    for (int i = 0; i < LANES; i++) {
      if (i & apart) continue;
      vec first = x[i], second = x[i + apart];
      x[i] = __builtin_shuffle(first, second, take.even), x[i + apart] = __builtin_shuffle(first, second, take.odd);
    }
  }
}

// The first `tokens` of a page, and what follows up to a whole vector.
static void unpack(const Page *page, int64_t tokens, float scale, Floats *to) {
  for (int64_t t = 0; t < tokens; t += LANES) {
    for (int c = 0; c < HEAD_DIM; c += LANES) {
      vec x[LANES];
      for (int i = 0; i < LANES; i++) x[i] = load(page->k, (t + i) * HEAD_DIM + c, KIND) * scale;
      transpose(x);
      for (int i = 0; i < LANES; i++) store_f32(to->keys + (c + i) * PAGE_TOKENS + t, x[i]);
    }
    for (int64_t i = t * VALUE_DIM; i < (t + LANES) * VALUE_DIM; i += LANES) {
      store_f32(to->values + i, load(page->v, i, KIND));
    }
  }
}

// y[r][0..WIDTH) = keep[r] * y[r] + the sum over i < n of x[r][i] times w[i][0..WIDTH).
static inline __attribute__((always_inline)) void add_product(
    const float *x, int64_t x_stride, int64_t n, const float *w, int64_t w_stride, const float *keep, float *y,
    int64_t y_stride, const int R) {
  vec sums[QUERIES][2];
  for (int r = 0; r < R; r++) {
    for (int v = 0; v < 2; v++) sums[r][v] = keep ? held(load_f32(y + r * y_stride + v * LANES) * keep[r]) : (vec){};
  }
  for (int64_t i = 0; i < n; i++) {
    const vec low = load_f32(w + i * w_stride), high = load_f32(w + i * w_stride + LANES);
#pragma GCC unroll 8
    for (int r = 0; r < R; r++) {
      const vec one = all(x[r * x_stride + i]);
      sums[r][0] = fused(one, low, sums[r][0]), sums[r][1] = fused(one, high, sums[r][1]);
    }
  }
  for (int r = 0; r < R; r++) {
    for (int v = 0; v < 2; v++) store_f32(y + r * y_stride + v * LANES, sums[r][v]);
  }
}

// R queries of a head, the first of them number `query` of [rows, tokens, heads] and at `at` of the page, over the first
// `to` tokens of it.
static inline __attribute__((always_inline)) void attend(
    const Attention *a, const Floats *page, int64_t query, int64_t at, int64_t to, const int R) {
  const int64_t stride = a->heads;
  float s[QUERIES][PAGE_TOKENS], keep[QUERIES];
  for (int64_t t = 0; t < to; t += WIDTH) {
    add_product(
        a->q + query * HEAD_DIM, stride * HEAD_DIM, HEAD_DIM, page->keys + t, PAGE_TOKENS, NULL, &s[0][t], PAGE_TOKENS, R);
  }
  for (int r = 0; r < R; r++) {
    const int64_t one = query + r * stride;
    keep[r] = weigh(s[r], 0, to, (Sight){at + r, a->window, a->softcap}, a->m + one, a->l + one);
  }
  for (int c = 0; c < VALUE_DIM; c += WIDTH) {
    add_product(
        s[0], PAGE_TOKENS, to, page->values + c, VALUE_DIM, keep, a->o + query * VALUE_DIM + c, stride * VALUE_DIM, R);
  }
}

static void attend_item(const void *context, int64_t item) {
  const Attention *a = context;
  const int64_t row = item / a->heads, head = item % a->heads, kv_head = head / (a->heads / a->pool.kv_heads);
  const int64_t T = PAGE_TOKENS, position = a->positions[row], at_first = row * a->q_tokens * a->heads + head;
  const int64_t count = position < 0 ? 0 : a->counts[row] < a->q_tokens ? a->counts[row] : a->q_tokens;
  for (int64_t i = 0; i < a->q_tokens; i++) {
    const int64_t at = at_first + i * a->heads;
    memset(a->o + at * VALUE_DIM, 0, VALUE_DIM * sizeof(float));
    a->m[at] = NO_KEY, a->l[at] = 0;
  }
  const int64_t last = position + count - 1, begin = a->window && position >= a->window ? position - a->window + 1 : 0;
  Floats page;
  for (int64_t entry = 0; entry < a->entries && count > 0; entry++) {
    const int64_t id = a->tables[row * a->entries + entry];
    const int64_t base = (a->places ? a->places[row * a->entries + entry] : entry) * T;
    if (base > last || base + T <= begin || id < 0 || id >= a->pool.pages) continue;
    const int64_t to = last - base + 1 < T ? last - base + 1 : T;
    const Page packed = page_at(&a->pool, id * a->pool.layers + a->layer, kv_head);
    unpack(&packed, to, a->scale, &page);
    int64_t i = 0;
    for (; i + QUERIES <= count; i += QUERIES) attend(a, &page, at_first + i * a->heads, position + i - base, to, QUERIES);
    for (; i < count; i++) attend(a, &page, at_first + i * a->heads, position + i - base, to, 1);
  }
}

XLA_FFI_Error *tiled_attention(Frame *frame) {
  if (answered_metadata(frame)) return NULL;
  const Attention a = attention_of(frame);
  parallel_for(frame, a.rows * a.heads, &a, attend_item);
  return NULL;
}
