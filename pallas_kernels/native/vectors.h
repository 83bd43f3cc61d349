// Vectors of floats as compilers know them, and what the kernels do with them. No kernel, no XLA.

#pragma once

#include <stdbool.h>
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
typedef int16_t shvec __attribute__((vector_size(2 * LANES)));

typedef enum { F16, BF16, F32 } Kind;

#define NO_KEY -1e30f

static inline vec all(float x) { return (vec){} + x; }

static inline vec load_f32(const float *p) {
  vec x;
  memcpy(&x, p, sizeof x);
  return x;
}

// The same, in a register: a compiler may prefer to read memory again for each use. What it is a part of stays as it is
// written: a compiler that may order sums has nothing to order across it.
static inline vec held(vec x) {
#if defined(__x86_64__)
  __asm__("" : "+v"(x));
#elif defined(__aarch64__)
  __asm__("" : "+w"(x));
#endif
  return x;
}

// a * b + c, rounded as it is in every place: a compiler that is left to fuse does so in one and not in the next.
static inline vec fused(vec a, vec b, vec c) {
#if LANES == 16
  return (vec)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif LANES == 8 && defined(__FMA__)
  return (vec)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#else
  return held(held(a * b) + c);
#endif
}

static inline void store_f32(float *p, vec x) { memcpy(p, &x, sizeof x); }

// Floats of 16 bits as float32.
static inline __attribute__((always_inline)) vec widened(hvec h, const Kind kind) {
#if LANES == 16
  if (kind == F16) return (vec)_mm512_cvtph_ps((__m256i)h);
  return (vec)_mm512_slli_epi32(_mm512_cvtepu16_epi32((__m256i)h), 16);
#elif LANES == 8
  if (kind == F16) return (vec)_mm256_cvtph_ps((__m128i)h);
  return (vec)_mm256_slli_epi32(_mm256_cvtepu16_epi32((__m128i)h), 16);
#else
  vec x;
  for (int lane = 0; lane < LANES; lane++) {
    if (kind == F16) {
      _Float16 half;
      memcpy(&half, (uint16_t *)&h + lane, sizeof half);
      x[lane] = (float)half;
    } else {
      uint32_t bits = (uint32_t)h[lane] << 16;
      memcpy((float *)&x + lane, &bits, sizeof bits);
    }
  }
  return x;
#endif
}

// LANES floats of a kind from number `i` on.
static inline __attribute__((always_inline)) vec load(const void *p, int64_t i, const Kind kind) {
  if (kind == F32) return load_f32((const float *)p + i);
  hvec h;
  memcpy(&h, (const uint16_t *)p + i, sizeof h);
  return widened(h, kind);
}

// LANES bytes as integers of 32 bits.
static inline __attribute__((always_inline)) ivec load_bytes(const void *p, const bool with_sign) {
#if LANES == 16
  __m128i bytes = _mm_loadu_si128(p);
  return (ivec)(with_sign ? _mm512_cvtepi8_epi32(bytes) : _mm512_cvtepu8_epi32(bytes));
#elif LANES == 8
  __m128i bytes = _mm_loadu_si64(p);
  return (ivec)(with_sign ? _mm256_cvtepi8_epi32(bytes) : _mm256_cvtepu8_epi32(bytes));
#else
  ivec x;
  for (int lane = 0; lane < LANES; lane++) x[lane] = with_sign ? ((const int8_t *)p)[lane] : ((const uint8_t *)p)[lane];
  return x;
#endif
}

// LANES signed bytes as integers of 16 bits.
static inline shvec load_signed_bytes(const void *p) {
#if LANES == 16
  return (shvec)_mm256_cvtepi8_epi16(_mm_loadu_si128(p));
#elif LANES == 8
  return (shvec)_mm_cvtepi8_epi16(_mm_loadu_si64(p));
#else
  shvec x;
  for (int lane = 0; lane < LANES; lane++) x[lane] = ((const int8_t *)p)[lane];
  return x;
#endif
}

// The lowest byte of each lane.
static inline void store_bytes(void *p, ivec x) {
#if LANES == 16
  _mm_storeu_si128(p, _mm512_cvtepi32_epi8((__m512i)x));
#else
  for (int lane = 0; lane < LANES; lane++) ((int8_t *)p)[lane] = x[lane];
#endif
}

// LANES integers of one byte or two from number `i` on.
static inline __attribute__((always_inline)) vec load_int(const void *p, int64_t i, const int bytes) {
  if (bytes == 1) return __builtin_convertvector(load_bytes((const char *)p + i, true), vec);
  int16_t shorts[LANES];
  memcpy(shorts, (const char *)p + 2 * i, sizeof shorts);
  vec x;
  for (int lane = 0; lane < LANES; lane++) x[lane] = shorts[lane];
  return x;
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

// Of two vectors, the lanes that a butterfly of lanes `apart` from each other puts into its first and second result.
typedef struct {
  ivec even, odd;
} Pairs;

static inline __attribute__((always_inline)) Pairs pairs(const int apart) {
  Pairs take = {};
  for (int lane = 0; lane < LANES; lane++) {
    take.even[lane] = lane & apart ? lane - apart + LANES : lane;
    take.odd[lane] = lane & apart ? lane + LANES : lane + apart;
  }
  return take;
}

// The sums of LANES vectors, in order, as one vector.
static inline __attribute__((always_inline)) vec totals(const vec *x) {
  vec sums[LANES];
  for (int i = 0; i < LANES; i++) sums[i] = x[i];
#pragma GCC unroll 4
  for (int apart = 1; apart < LANES; apart *= 2) {
    const Pairs take = pairs(apart);
#pragma GCC unroll 8
    for (int i = 0; i < LANES / apart / 2; i++) {
      sums[i] = __builtin_shuffle(sums[2 * i], sums[2 * i + 1], take.even) + __builtin_shuffle(sums[2 * i], sums[2 * i + 1], take.odd);
    }
  }
  return sums[0];
}

// The sums of `width` neighbouring lanes of x[0..count), in order.
static inline __attribute__((always_inline)) void total_lanes(const ivec *x, const int count, const int width, int32_t *out) {
  ivec sums[LANES];
  for (int i = 0; i < count; i++) sums[i] = x[i];
#pragma GCC unroll 4
  for (int apart = 1; apart < width; apart *= 2) {
    const Pairs take = pairs(apart);
#pragma GCC unroll 8
    for (int i = 0; i < count / apart / 2; i++) {
      sums[i] = __builtin_shuffle(sums[2 * i], sums[2 * i + 1], take.even) + __builtin_shuffle(sums[2 * i], sums[2 * i + 1], take.odd);
    }
  }
  ivec order;
  for (int lane = 0; lane < LANES; lane++) order[lane] = lane % (LANES / width) * width + lane / (LANES / width);
#pragma GCC unroll 16
  for (int i = 0; i < count / width; i++) {
    sums[i] = __builtin_shuffle(sums[i], order);
    memcpy(out + i * LANES, &sums[i], sizeof *sums);
  }
}

// Adds to each lane of `sum` four products, of its bytes of `codes`, from 0 to 255, and of `x`, from -128 to 127.
static inline __attribute__((always_inline)) ivec add_products(ivec sum, ivec codes, ivec x) {
#if LANES == 16 && defined(__AVX512VNNI__)
  return (ivec)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)codes, (__m512i)x);
#else
  for (int up = 0; up < 32; up += 8) sum += (codes >> up & 0xff) * (x << (24 - up) >> 24);
  return sum;
#endif
}

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

static inline int32_t total_int(ivec x) {
#if LANES == 16
  return _mm512_reduce_add_epi32((__m512i)x);
#else
  int32_t sum = 0;
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
