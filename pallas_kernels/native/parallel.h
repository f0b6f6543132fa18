// Work shared with the threads of XLA's own pool.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <functional>
#include <memory>
#include <thread>
#if defined(__linux__)
#include <sched.h>
#endif

#include "xla/ffi/api/ffi.h"

namespace lamina {

// Those that this process may use: it may be pinned to some of the machine's.
inline int64_t own_cores() {
#if defined(__linux__)
  cpu_set_t own;
  if (sched_getaffinity(0, sizeof own, &own) == 0) return CPU_COUNT(&own);
#endif
  return std::max(1u, std::thread::hardware_concurrency());
}

// How many threads work at once. The pool may have more than this process has cores: of them, one that waits for a core
// with a task begun would hold up all others.
inline int64_t threads(xla::ffi::ThreadPool& pool) {
  static const int64_t cores = own_cores();
  return std::min(pool.num_threads(), cores);
}

// Calls run(i) for i in 0 .. count - 1, each once, from this thread and whichever others of the pool are free.
//
// This thread takes part, and waits only for what another has begun: a pool whose threads are all busy, or
// wait here themselves, delays nobody. Helpers that come late find nothing left and touch nothing of the
// caller's but `shared`, which they keep alive.
template <class Run>
void parallel(xla::ffi::ThreadPool& pool, int64_t count, const Run& run) {
  struct Shared {
    std::atomic<int64_t> next{0}, done{0};
  };
  auto shared = std::make_shared<Shared>();
  auto take = [shared, count, &run] {
    int64_t i;
    while ((i = shared->next.fetch_add(1, std::memory_order_relaxed)) < count) {
      run(i);
      shared->done.fetch_add(1, std::memory_order_release);
    }
  };
  const int64_t helpers = std::min(threads(pool), count) - 1;
  for (int64_t i = 0; i < helpers; i++) pool.Schedule(std::function<void()>(take));
  take();
  for (int spins = 0; shared->done.load(std::memory_order_acquire) < count; spins++) {
    if (spins > 1000) std::this_thread::yield();
  }
}

}  // namespace lamina
