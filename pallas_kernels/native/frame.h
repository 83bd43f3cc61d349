// What a kernel needs of XLA's foreign function interface: its operands, its attributes, and a parallel loop.

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

// A loop whose items are handed out to whoever comes first. Kept alive by its holders: the caller and each task.
typedef struct {
  Body *body;
  const void *context;
  int64_t items;
  _Atomic int64_t next, done;
  _Atomic int holders;
} Loop;

static inline void run_items(Loop *loop) {
  for (;;) {
    int64_t item = atomic_fetch_add(&loop->next, 1);
    if (item >= loop->items) return;
    loop->body(loop->context, item);
    atomic_fetch_add(&loop->done, 1);
  }
}

static inline void release(Loop *loop) {
  if (atomic_fetch_sub(&loop->holders, 1) == 1) free(loop);
}

static void loop_task(void *data) {
  run_items(data);
  release(data);
}

// Calls body(context, item) for every item on XLA's threads and returns when all are done. A task that starts late finds
// no item left, so nothing waits for a thread that is busy elsewhere.
static void parallel_for(const Frame *frame, int64_t items, const void *context, Body *body) {
  int64_t threads = 1;
  XLA_FFI_ThreadPool_NumThreads_Args count = {XLA_FFI_ThreadPool_NumThreads_Args_STRUCT_SIZE, NULL, frame->ctx, &threads};
  XLA_FFI_Error *no_pool = frame->api->XLA_FFI_ThreadPool_NumThreads(&count);
  Loop *loop = no_pool || threads < 2 || items < 2 ? NULL : malloc(sizeof(Loop));
  if (no_pool) {
    XLA_FFI_Error_Destroy_Args error = {XLA_FFI_Error_Destroy_Args_STRUCT_SIZE, NULL, no_pool};
    frame->api->XLA_FFI_Error_Destroy(&error);
  }
  if (loop == NULL) {
    for (int64_t item = 0; item < items; item++) body(context, item);
    return;
  }
  int64_t tasks = (threads < items ? threads : items) - 1;
  loop->body = body, loop->context = context, loop->items = items;
  atomic_init(&loop->next, 0), atomic_init(&loop->done, 0), atomic_init(&loop->holders, (int)tasks + 1);
  for (int64_t i = 0; i < tasks; i++) {
    XLA_FFI_ThreadPool_Schedule_Args task = {XLA_FFI_ThreadPool_Schedule_Args_STRUCT_SIZE, NULL, frame->ctx, loop_task, loop};
    XLA_FFI_Error *refused = frame->api->XLA_FFI_ThreadPool_Schedule(&task);
    if (refused) {
      XLA_FFI_Error_Destroy_Args error = {XLA_FFI_Error_Destroy_Args_STRUCT_SIZE, NULL, refused};
      frame->api->XLA_FFI_Error_Destroy(&error);
      release(loop);
    }
  }
  run_items(loop);
  for (int spins = 0; atomic_load(&loop->done) < items; spins++) {
    if (spins > 1000) sched_yield();
  }
  release(loop);
}
