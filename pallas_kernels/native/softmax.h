// The online softmax of a query over one page. No page, no walk.

#pragma once

#include <math.h>

#include "vectors.h"

// What a query sees of a page: its own place in it, which may be past the end, and how far back; 0: all the way.
typedef struct {
  int64_t at, window;
  float softcap;  // 0: none
} Sight;

// Makes the scores s[from..to) into weights, those around them in whole vectors into zeros, and updates the query's largest
// score `m` and sum of weights `l`. Returns by what all that came before is to be multiplied.
static inline __attribute__((always_inline)) float weigh(float *s, int64_t from, int64_t to, Sight sight, float *m, float *l) {
  if (sight.softcap != 0) {
    for (int64_t t = from; t < to; t++) s[t] = sight.softcap * tanhf(s[t] / sight.softcap);
  }
  const int64_t first = from / LANES * LANES;
  const int32_t seen_to = sight.at + 1, seen_from = sight.window ? sight.at - sight.window + 1 : 0;
  vec tops = all(*m), sums = {};
  for (int64_t t = first; t < to; t += LANES) {
    ivec token = lanes() + (int32_t)t;
    vec seen = pick((token < seen_to) & (token >= seen_from), load_f32(s + t), all(NO_KEY));
    store_f32(s + t, seen);
    tops = pick(seen > tops, seen, tops);
  }
  const float top = largest(tops);
  for (int64_t t = first; t < to; t += LANES) {
    vec score = load_f32(s + t), p = pick(score > NO_KEY, exponential(score - top), (vec){});
    store_f32(s + t, p);
    sums += p;
  }
  const float keep = exponential(all(*m - top))[0];
  *l = *l * keep + total(sums);
  *m = top;
  return keep;
}
