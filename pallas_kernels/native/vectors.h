// Vectors of floats as compilers know them, and what the kernels do with them. No kernel, no XLA.

#pragma once

#include <stdint.h>
#include <string.h>

#if defined(__AVX512F__)
#include <immintrin.h>
#define LANES 16
#elif defined(__AVX2__) && defined(__F16C__)
#include <immintrin.h>
#define LANES 8
#else
#define LANES 4
#endif

typedef float vec __attribute__((vector_size(4 * LANES)));
typedef int32_t ivec __attribute__((vector_size(4 * LANES)));
typedef uint16_t hvec __attribute__((vector_size(2 * LANES)));

typedef enum { F16, BF16, F32 } Kind;

#define NO_KEY -1e30f

static inline vec load_f32(const float *p) {
  vec x;
  memcpy(&x, p, sizeof x);
  return x;
}

// The same, in a register: a compiler may prefer to read memory again for each use.
static inline vec held(vec x) {
#if defined(__x86_64__)
  __asm__("" : "+v"(x));
#endif
  return x;
}

static inline void store_f32(float *p, vec x) { memcpy(p, &x, sizeof x); }

// LANES floats of a kind from number `i` on.
static inline __attribute__((always_inline)) vec load(const void *p, int64_t i, const Kind kind) {
  if (kind == F32) return load_f32((const float *)p + i);
  const uint16_t *h = (const uint16_t *)p + i;
#if LANES == 16
  __m256i bits = _mm256_loadu_si256((const __m256i *)h);
  if (kind == F16) return (vec)_mm512_cvtph_ps(bits);
  return (vec)_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16);
#elif LANES == 8
  __m128i bits = _mm_loadu_si128((const __m128i *)h);
  if (kind == F16) return (vec)_mm256_cvtph_ps(bits);
  return (vec)_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16);
#else
  vec x;
  for (int lane = 0; lane < LANES; lane++) {
    if (kind == F16) {
      _Float16 half;
      memcpy(&half, h + lane, sizeof half);
      x[lane] = (float)half;
    } else {
      uint32_t bits = (uint32_t)h[lane] << 16;
      memcpy((float *)&x + lane, &bits, sizeof bits);
    }
  }
  return x;
#endif
}

// 2 * LANES floats of a kind from number `i` on, in the order that is quickest to make: bfloat16 lie in pairs of 32 bits, so
// those at even places come first, then those at odd ones.
static inline __attribute__((always_inline)) void load_pair(const void *p, int64_t i, const Kind kind, vec *x) {
  if (kind != BF16) {
    x[0] = load(p, i, kind), x[1] = load(p, i + LANES, kind);
    return;
  }
  ivec bits;
  memcpy(&bits, (const uint16_t *)p + i, sizeof bits);
  x[0] = (vec)(bits << 16), x[1] = (vec)(bits & (int32_t)0xffff0000);
}

// 2 * LANES float32 in the order of load_pair, and back.
static inline __attribute__((always_inline)) void load_sorted(const float *p, const Kind kind, vec *x) {
  for (int i = 0; i < 2 * LANES; i++) x[kind == BF16 ? i % 2 : i / LANES][kind == BF16 ? i / 2 : i % LANES] = p[i];
}

static inline __attribute__((always_inline)) void store_sorted(float *p, const Kind kind, const vec *x) {
  for (int i = 0; i < 2 * LANES; i++) p[i] = x[kind == BF16 ? i % 2 : i / LANES][kind == BF16 ? i / 2 : i % LANES];
}

// Asks for memory that will be read soon. Into the second cache: the first one is too small for what is on its way.
static inline void fetch(const char *p, int bytes) {
  for (int i = 0; i < bytes; i += 64) __builtin_prefetch(p + i, 0, 2);
}

// The sums of LANES vectors, in order, as one vector.
static inline __attribute__((always_inline)) vec totals(const vec *x) {
  vec sums[LANES];
  for (int i = 0; i < LANES; i++) sums[i] = x[i];
#pragma GCC unroll 4
  for (int apart = 1; apart < LANES; apart *= 2) {
    ivec even, odd;
    for (int lane = 0; lane < LANES; lane++) {
      even[lane] = lane & apart ? lane - apart + LANES : lane;
      odd[lane] = lane & apart ? lane + LANES : lane + apart;
    }
#pragma GCC unroll 8
    for (int i = 0; i < LANES / apart / 2; i++) {
      sums[i] = __builtin_shuffle(sums[2 * i], sums[2 * i + 1], even) + __builtin_shuffle(sums[2 * i], sums[2 * i + 1], odd);
    }
  }
  return sums[0];
}

static inline vec all(float x) { return (vec){} + x; }

static inline ivec lanes(void) {
  ivec x;
  for (int lane = 0; lane < LANES; lane++) x[lane] = lane;
  return x;
}

// `yes` in the lanes where the mask is all ones, `no` where it is zero.
static inline vec pick(ivec mask, vec yes, vec no) { return (vec)((mask & (ivec)yes) | (~mask & (ivec)no)); }

static inline float total(vec x) {
#if LANES == 16
  return _mm512_reduce_add_ps((__m512)x);
#else
  float sum = 0;
  for (int lane = 0; lane < LANES; lane++) sum += x[lane];
  return sum;
#endif
}

static inline float largest(vec x) {
#if LANES == 16
  return _mm512_reduce_max_ps((__m512)x);
#else
  float top = x[0];
  for (int lane = 1; lane < LANES; lane++) top = x[lane] > top ? x[lane] : top;
  return top;
#endif
}

// e^x for x <= 0, to 1e-7 of its value; below -87 as of -87.
static inline vec exponential(vec x) {
  x = pick(x < -87.0f, all(-87.0f), x);
  ivec n = __builtin_convertvector(x * 1.44269504f - 0.5f, ivec);
  vec turns = __builtin_convertvector(n, vec), r = x - turns * 0.693145752f - turns * 1.42860677e-6f;
  vec p = 1.0f + r * (1.0f + r * (0.5f + r * (0.166666667f + r * (0.0416666667f + r * (0.00833333333f + r * 0.00138888889f)))));
  return p * (vec)((n + 127) << 23);
}
