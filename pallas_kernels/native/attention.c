// Attention of a few queries over KV pages, read where they lie. See pallas_kernels/paged_decode/api.py for shapes.
//
// This is the walk over the pages: which of them, which tokens, online softmax. What a page holds is known to the header
// that PAGES names.

#define QUOTED(x) #x
#define HEADER(name) QUOTED(name.h)
#include HEADER(PAGES)
#include "softmax.h"
#include "walk.h"

enum { QUERIES_PER_ITEM = 16 };

// M queries of one row that share a KV head: query i is number first + i of group * q_tokens, tokens innermost.
static inline __attribute__((always_inline)) void attend(
    const Attention *a, int64_t row, int64_t head, int64_t first, const int M) {
  const Pool *pool = &a->pool;
  const int64_t group = a->heads / pool->kv_heads;
  Queries queries;
  vec o[BLOCK][V_VECTORS];
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
    load_query(a->q + slot[i] * HEAD_DIM, a->scale, i, &queries);
    for (int v = 0; v < V_VECTORS; v++) o[i][v] = (vec){};
    m[i] = NO_KEY, l[i] = 0;
  }
  const int64_t T = pool->page_tokens;
  Scores s;
  for (int64_t entry = 0; entry < a->entries && last >= 0; entry++) {
    int64_t id = a->tables[row * a->entries + entry];
    int64_t base = (a->places ? a->places[row * a->entries + entry] : entry) * T;
    if (base > last) {
      if (a->places) continue;
      break;
    }
    if (base + T <= begin || id < 0 || id >= pool->pages) continue;
    const Page page = page_at(pool, id * pool->layers + a->layer, head);
    const int64_t from = !WHOLE_PAGES && begin > base ? begin - base : 0;
    const int64_t to = !WHOLE_PAGES && last - base + 1 < T ? last - base + 1 : T;
    score(&page, &queries, M, from, to, s);
    for (int i = 0; i < M; i++) {
      const float keep = weigh(s[i], from, to, (Sight){at[i] - base, a->window, a->softcap}, m + i, l + i);
      for (int v = 0; v < V_VECTORS; v++) o[i][v] = held(o[i][v] * keep);
    }
    Page next = page;
    if (entry + 1 < a->entries) {
      int64_t following = a->tables[row * a->entries + entry + 1];
      if (following >= 0 && following < pool->pages) next = page_at(pool, following * pool->layers + a->layer, head);
    }
    mix(&page, &next, s, M, from, to, o);
  }
  for (int i = 0; i < M; i++) {
    store_output(a->o + slot[i] * VALUE_DIM, o[i]);
    a->m[slot[i]] = m[i];
    a->l[slot[i]] = l[i];
  }
}

static int64_t parts(const Attention *a) {
  return (a->heads / a->pool.kv_heads * a->q_tokens + QUERIES_PER_ITEM - 1) / QUERIES_PER_ITEM;
}

static void attend_item(const void *context, int64_t item) {
  const Attention *a = context;
  int64_t part = item % parts(a), head = item / parts(a) % a->pool.kv_heads, row = item / parts(a) / a->pool.kv_heads;
  int64_t queries = a->heads / a->pool.kv_heads * a->q_tokens, first = part * QUERIES_PER_ITEM;
  int64_t end = first + QUERIES_PER_ITEM < queries ? first + QUERIES_PER_ITEM : queries;
  for (; first + 4 <= end; first += 4) attend(a, row, head, first, 4);
  for (; first + 2 <= end; first += 2) attend(a, row, head, first, 2);
  for (; first < end; first++) attend(a, row, head, first, 1);
}

XLA_FFI_Error *paged_attention(Frame *frame) {
  if (answered_metadata(frame)) return NULL;
  const Attention a = attention_of(frame);
  parallel_for(frame, a.rows * a.pool.kv_heads * parts(&a), &a, attend_item);
  return NULL;
}
