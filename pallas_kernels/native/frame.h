// What a kernel needs of XLA's foreign function interface: its operands, its attributes, and parallel loops.

#pragma once

#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sched.h>

#include "xla/ffi/api/c_api.h"

typedef struct XLA_FFI_CallFrame Frame;
typedef struct XLA_FFI_Buffer Buffer;

static inline const Buffer *operand(const Frame *frame, int i) { return frame->args.args[i]; }
static inline const Buffer *result(const Frame *frame, int i) { return frame->rets.rets[i]; }

// The value of a scalar attribute. XLA sorts attributes by name; `i` counts in that order.
static inline double f64_attribute(const Frame *frame, int i) {
  return *(const double *)((const XLA_FFI_Scalar *)frame->attrs.attrs[i])->value;
}

static inline int64_t i64_attribute(const Frame *frame, int i) {
  return *(const int64_t *)((const XLA_FFI_Scalar *)frame->attrs.attrs[i])->value;
}

// XLA asks each handler once which version of the interface it speaks; such a call has no operands.
static inline bool answered_metadata(const Frame *frame) {
  XLA_FFI_Extension_Base *extension = frame->extension_start;
  if (extension == NULL || extension->type != XLA_FFI_Extension_Metadata) return false;
  XLA_FFI_Metadata *metadata = ((XLA_FFI_Metadata_Extension *)extension)->metadata;
  metadata->api_version.major_version = XLA_FFI_API_MAJOR;
  metadata->api_version.minor_version = XLA_FFI_API_MINOR;
  return true;
}

typedef void Body(const void *context, int64_t item);

// A loop whose items are handed out to whoever comes first.
typedef struct {
  Body *body;
  int64_t items;
} Loop;

enum { MAX_LOOPS = 4, CACHE_LINE = 64 };

// Loops that follow each other. Kept alive by their holders: the caller and each task.
typedef struct {
  const void *context;
  Loop loops[MAX_LOOPS];
  int count;
  _Atomic int holders;
  struct {
    _Alignas(CACHE_LINE) _Atomic int64_t next;
    _Alignas(CACHE_LINE) _Atomic int64_t done;
  } state[MAX_LOOPS];
} Loops;

static inline void await(Loops *loops, int loop) {
  for (int spins = 0; atomic_load(&loops->state[loop].done) < loops->loops[loop].items; spins++) {
    if (spins > 1000) sched_yield();
  }
}

static inline void run_loops(Loops *loops) {
  for (int i = 0; i < loops->count; i++) {
    if (i) await(loops, i - 1);
    for (;;) {
      int64_t item = atomic_fetch_add(&loops->state[i].next, 1);
      if (item >= loops->loops[i].items) break;
      loops->loops[i].body(loops->context, item);
      atomic_fetch_add(&loops->state[i].done, 1);
    }
  }
}

static inline void release(Loops *loops) {
  if (atomic_fetch_sub(&loops->holders, 1) == 1) free(loops);
}

static void loops_task(void *data) {
  run_loops(data);
  release(data);
}

// Runs `count` loops, each when the one before it is done, on XLA's threads, and returns when all are. A thread goes from
// loop to loop without sleeping, because waking one takes as long as a small product. A task that starts late finds no item
// left, so nothing waits for a thread that is busy elsewhere.
static void parallel_loops(const Frame *frame, const void *context, const Loop *each, int count) {
  int64_t threads = 1, items = 0;
  for (int i = 0; i < count; i++) items = each[i].items > items ? each[i].items : items;
  XLA_FFI_ThreadPool_NumThreads_Args number = {XLA_FFI_ThreadPool_NumThreads_Args_STRUCT_SIZE, NULL, frame->ctx, &threads};
  XLA_FFI_Error *no_pool = frame->api->XLA_FFI_ThreadPool_NumThreads(&number);
  Loops *loops = no_pool || threads < 2 || items < 2 ? NULL : aligned_alloc(CACHE_LINE, sizeof(Loops));
  if (no_pool) {
    XLA_FFI_Error_Destroy_Args error = {XLA_FFI_Error_Destroy_Args_STRUCT_SIZE, NULL, no_pool};
    frame->api->XLA_FFI_Error_Destroy(&error);
  }
  if (loops == NULL) {
    for (int i = 0; i < count; i++) {
      for (int64_t item = 0; item < each[i].items; item++) each[i].body(context, item);
    }
    return;
  }
  int64_t tasks = (threads < items ? threads : items) - 1;
  loops->context = context, loops->count = count;
  atomic_init(&loops->holders, (int)tasks + 1);
  for (int i = 0; i < count; i++) {
    loops->loops[i] = each[i];
    atomic_init(&loops->state[i].next, 0), atomic_init(&loops->state[i].done, 0);
  }
  for (int64_t i = 0; i < tasks; i++) {
    XLA_FFI_ThreadPool_Schedule_Args task = {XLA_FFI_ThreadPool_Schedule_Args_STRUCT_SIZE, NULL, frame->ctx, loops_task, loops};
    XLA_FFI_Error *refused = frame->api->XLA_FFI_ThreadPool_Schedule(&task);
    if (refused) {
      XLA_FFI_Error_Destroy_Args error = {XLA_FFI_Error_Destroy_Args_STRUCT_SIZE, NULL, refused};
      frame->api->XLA_FFI_Error_Destroy(&error);
      release(loops);
    }
  }
  run_loops(loops);
  await(loops, count - 1);
  release(loops);
}

static inline void parallel_for(const Frame *frame, int64_t items, const void *context, Body *body) {
  parallel_loops(frame, context, &(Loop){body, items}, 1);
}
