// Packed pages whose codes are never converted (HACK): queries and weights are rounded to 8 bits, the products run on
// integers, and stored sums of codes put back what the offsets of both sides contribute; see pallas_kernels/layouts/hack.py.
// FOLDED: scales of keys run along channels and are folded into the query before it is rounded, once a page, those of
// values into the weights. PARTITIONED: they run the other way, so that queries are rounded once and scales stay outside.

#pragma once

typedef enum { FOLDED, PARTITIONED } Form;
enum {
  KEY_METAS = FORM == FOLDED ? HEAD_DIM : HEAD_DIM / GROUP * PAGE_TOKENS,
  VALUE_METAS = FORM == FOLDED ? VALUE_DIM / GROUP * PAGE_TOKENS : VALUE_DIM,
  SUMS = 1,
};

#include "packed.h"

enum {
  REGISTER = 4 * LANES,
  K_PARTS = HEAD_DIM / GROUP,
  T_VECTORS = PAGE_TOKENS / LANES,
  K_FIELD = K_ROW < GROUP ? K_ROW : GROUP,  // bytes of a row of keys whose codes in one field are of one group
  V_RUN = V_ROWS < GROUP ? V_ROWS : GROUP,  // rows of values likewise
};

static const int32_t FIELD_MASK = (int32_t)(0x01010101u * ((1 << BITS) - 1));
static const float TINY = 1e-30f, ROUNDER = 12582912;  // see packing.py

// x is about scale * codes + center; `sum` is that of the codes.
typedef struct {
  float scale, center;
  int32_t sum;
} Affine;

// Codes of M vectors as dots() wants them, each piece of a row repeated until it fills a register.
typedef struct {
  ivec codes[BLOCK][PAGE_TOKENS > GROUP ? PAGE_TOKENS / 16 : GROUP / 16];
  Affine of[BLOCK];
} Rounded;

typedef struct {
  vec x[BLOCK][K_VECTORS];
  Rounded parts[FORM == PARTITIONED ? K_PARTS : 1];
  float total[BLOCK][K_PARTS];
} Queries;

// See packing.quantize8. `step` bytes at a time are repeated. This and all sums of more than two floats below are pinned to
// one order: the compiler, which may choose it, does not choose the same for every M.
static inline __attribute__((always_inline)) void quantize8(
    const vec *x, const int vectors, const int step, int i, Rounded *to) {
  vec low = x[0], high = x[0];
  for (int v = 1; v < vectors; v++) low = pick(x[v] < low, x[v], low), high = pick(x[v] > high, x[v], high);
  const float bottom = -largest(-low), spread = largest(high) - bottom;
  const float inverse = spread < TINY ? 0 : 255 / spread, scale = spread < TINY ? 0 : spread * (1 / 255.0f);
  int8_t codes[MAX_PAGE_TOKENS];
  ivec sum = {};
  for (int v = 0; v < vectors; v++) {
    const ivec near = (ivec)fused(x[v] - bottom, all(inverse), all(ROUNDER - 128)) << 24 >> 24;
    store_bytes(codes + v * LANES, near);
    sum += near;
  }
  to->of[i] = (Affine){scale, bottom + 128 * scale, total_int(sum)};
  for (int j = 0; j < vectors * LANES / step; j++) {
    for (int at = 0; at < REGISTER; at += step) memcpy((char *)&to->codes[i][j] + at, codes + j * step, step);
  }
}

static __attribute__((noinline, noclone)) void quantize_query(const vec *x, int i, Rounded *to) {
  quantize8(x, GROUP / LANES, K_FIELD < REGISTER ? K_FIELD : REGISTER, i, to);
}

static __attribute__((noinline, noclone)) void quantize_weights(const vec *x, int i, Rounded *to) {
  quantize8(x, T_VECTORS, PAGE_TOKENS < REGISTER ? PAGE_TOKENS : REGISTER, i, to);
}

// Products of M vectors in 8 bits with `count` rows of codes: out[i][n], of `bytes` bytes of a row, of which `fields`
// fields from `field` on follow each other in the vectors. Asks for `coming_bytes` at `coming` for every row.
static inline __attribute__((always_inline)) void dots(
    const Rounded *x, const char *rows, const int stride, const int bytes, const int field, const int fields, const int M,
    const int count, const char *coming, const int coming_bytes, int32_t (*out)[MAX_PAGE_TOKENS]) {
  const int step = bytes < REGISTER ? bytes : REGISTER, at_once = REGISTER / step, steps = bytes / step;
  const int C = LANES / M < count / at_once ? LANES / M : count / at_once;
#pragma GCC unroll 1
  for (int n = 0; n < count; n += C * at_once) {
    ivec sums[LANES];
#pragma GCC unroll 16
    for (int c = 0; c < C; c++) {
      const int row = n + c * at_once;
      ivec sum[BLOCK] = {};
      fetch(coming + row * coming_bytes, coming_bytes * at_once);
      for (int j = 0; j < fields * steps; j++) {
        ivec codes;
        const char *from = rows + row * stride + j % steps * step;
        if (stride == step) memcpy(&codes, from, REGISTER);
        else for (int r = 0; r < at_once; r++) memcpy((char *)&codes + r * step, from + r * stride, step);
        if (BITS < 8) codes = codes >> (field + j / steps) * BITS & FIELD_MASK;
        for (int i = 0; i < M; i++) sum[i] = add_products(sum[i], codes, x->codes[i][j]);
      }
      for (int i = 0; i < M; i++) sums[i * C + c] = sum[i];
    }
    // Lane by lane these are sums of quarters: step / 4 lanes make one.
    int32_t whole[LANES * LANES];
    total_lanes(sums, M * C, step / 4, whole);
    for (int i = 0; i < M; i++) memcpy(&out[i][n], whole + i * C * at_once, C * at_once * sizeof(int32_t));
  }
}

static inline void load_query(const float *p, float scale, int i, Queries *queries) {
  vec *x = queries->x[i];
  for (int v = 0; v < K_VECTORS; v++) x[v] = held(load_f32(p + v * LANES) * scale);
  for (int part = 0; FORM == PARTITIONED && part < K_PARTS; part++) {
    const vec *own = x + part * (GROUP / LANES);
    vec sum = own[0];
    for (int v = 1; v < GROUP / LANES; v++) sum = held(sum + own[v]);
    queries->total[i][part] = total(sum);
    quantize_query(own, i, &queries->parts[part]);
  }
}

// What signed code 0 stands for.
static inline vec middle(const uint16_t *scale, const uint16_t *min, int64_t i) {
  return fused(all(HALF), load(scale, i, BF16), load(min, i, BF16));
}

// scale * (product with signed codes) + center * (their sum), of stored codes and `stored` products with these.
static inline vec restored(const Affine *x, const int32_t *stored, vec sum) {
  ivec product;
  memcpy(&product, stored, sizeof product);
  const vec signed_product = __builtin_convertvector(product - HALF * x->sum, vec);
  return fused(all(x->scale), signed_product, held(x->center * sum));
}

static inline __attribute__((always_inline)) void score(
    const Page *page, const Queries *queries, const int M, int64_t from, int64_t to, Scores s) {
  enum { COMING = (V_BYTES + PAGE_TOKENS * K_PARTS - 1) / (PAGE_TOKENS * K_PARTS) };
  float shift[BLOCK] = {};
  fetch_value_metas(page);
  for (int i = 0; FORM == FOLDED && i < M; i++) {
    vec sum = {};
    for (int v = 0; v < K_VECTORS; v++) sum = fused(queries->x[i][v], middle(page->k_scale, page->k_min, v * LANES), sum);
    shift[i] = total(sum);
  }
  for (int part = 0; part < K_PARTS; part++) {
    Rounded own;
    const Rounded *q = FORM == FOLDED ? &own : &queries->parts[part];
    for (int i = 0; FORM == FOLDED && i < M; i++) {
      vec folded[GROUP / LANES];
      for (int v = 0; v < GROUP / LANES; v++) {
        const int at = part * (GROUP / LANES) + v;
        folded[v] = queries->x[i][at] * load(page->k_scale, at * LANES, BF16);
      }
      quantize_query(folded, i, &own);
    }
    int32_t products[BLOCK][MAX_PAGE_TOKENS];
    dots(q, page->k_codes + part * GROUP % K_ROW, K_ROW, K_FIELD, part * GROUP / K_ROW, GROUP / K_FIELD, M, PAGE_TOKENS,
         page->v_codes + part * PAGE_TOKENS * COMING, COMING, products);
    for (int t = 0; t < PAGE_TOKENS; t += LANES) {
      const int64_t at = part * PAGE_TOKENS + t;
      const vec k_sum = load_int(page->k_sum, at, K_SUM_BYTES);
      for (int i = 0; i < M; i++) {
        vec product = restored(&q->of[i], products[i] + t, k_sum);
        if (FORM == PARTITIONED) {
          const vec offset = held(queries->total[i][part] * middle(page->k_scale, page->k_min, at));
          product = fused(product, load(page->k_scale, at, BF16), offset);
        }
        store_f32(s[i] + t, held(product + (part ? load_f32(s[i] + t) : all(shift[i]))));
      }
    }
  }
}

static inline __attribute__((always_inline)) void mix(
    const Page *page, const Page *next, Scores p, const int M, int64_t from, int64_t to, vec (*o)[V_VECTORS]) {
  enum { COMING = (K_BYTES + VALUE_DIM - 1) / VALUE_DIM };
  Rounded weights;
  float shift[BLOCK];
  fetch_key_metas(next);
  for (int channel = 0; channel < VALUE_DIM; channel += V_RUN) {
    if (channel == 0 || (FORM == FOLDED && channel % GROUP == 0)) {
      for (int i = 0; i < M; i++) {
        vec folded[T_VECTORS], sum = {};
        for (int v = 0; v < T_VECTORS; v++) {
          const int64_t at = channel / GROUP * PAGE_TOKENS + v * LANES;
          const vec weight = load_f32(p[i] + v * LANES);
          folded[v] = FORM == FOLDED ? weight * load(page->v_scale, at, BF16) : weight;
          sum = FORM == FOLDED ? fused(weight, middle(page->v_scale, page->v_min, at), sum) : held(sum + weight);
        }
        shift[i] = total(sum);
        quantize_weights(folded, i, &weights);
      }
    }
    int32_t products[BLOCK][MAX_PAGE_TOKENS];
    dots(&weights, page->v_codes + channel % V_ROWS * PAGE_TOKENS, PAGE_TOKENS, PAGE_TOKENS, channel / V_ROWS, 1, M, V_RUN,
         next->k_codes + channel * COMING, COMING, products);
    for (int v = 0; v < V_RUN / LANES; v++) {
      const int64_t at = channel + v * LANES;
      const vec v_sum = load_int(page->v_sum, at, V_SUM_BYTES);
      for (int i = 0; i < M; i++) {
        vec product = restored(&weights.of[i], products[i] + v * LANES, v_sum);
        if (FORM == PARTITIONED) {
          const vec offset = held(shift[i] * middle(page->v_scale, page->v_min, at));
          product = fused(product, load(page->v_scale, at, BF16), offset);
        } else {
          product += shift[i];
        }
        o[i][at / LANES] += held(product);
      }
    }
  }
}
