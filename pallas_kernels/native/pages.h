// What every kind of page gives to attention.c. A kind has a header of its own, compiled for one HEAD_DIM and VALUE_DIM:
//
//   Pool, pool_of(frame)       its arrays, the operands from POOL on, with `pages`, `layers`, `kv_heads`, `page_tokens`
//   Page, page_at(pool, block, head)   where one page of one KV head lies; block is page * layers + layer
//   Queries, load_query(p, scale, i, queries)   query i of the M that read a page together, made ready once
//   WHOLE_PAGES                whether the products take all tokens of a page; then weights of unseen ones must be zero
//   score(page, queries, M, from, to, s)        s = q K^T of the tokens from..to; asks for the values meanwhile
//   mix(page, next, s, M, from, to, o)          o += s V of the weights s, which it may change; asks for the next keys
//   store_output(p, o)         o in the order of channels
//
// Every result of a query depends on that query and the page alone, whatever M it comes with.

#pragma once

#include "frame.h"
#include "vectors.h"

enum { POOL = 6, MAX_PAGE_TOKENS = 128, BLOCK = 4, K_VECTORS = HEAD_DIM / LANES, V_VECTORS = VALUE_DIM / LANES };

// Scores of M queries and then their weights, token by token.
typedef float Scores[BLOCK][MAX_PAGE_TOKENS];
