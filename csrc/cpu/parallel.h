// Work over torch's thread pool, each thread with scratch of its own.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>

namespace duplex {

// Scratch is kept from call to call in each thread, up to KEEP bytes: mapping fresh pages costs more than a small call.
class Arena {
 public:
  void* get(size_t bytes) {
    if (bytes > size_) {
      memory_.reset();
      size_ = (bytes + 4095) / 4096 * 4096;
      memory_.reset(std::aligned_alloc(4096, size_));
      if (!memory_) {
        size_ = 0;
        throw std::bad_alloc();
      }
    }
    return memory_.get();
  }
  void trim() {
    constexpr size_t KEEP = size_t(4) << 20;
    if (size_ > KEEP) {
      memory_.reset();
      size_ = 0;
    }
  }

 private:
  struct Free {
    void operator()(void* at) const { std::free(at); }
  };
  std::unique_ptr<void, Free> memory_;
  size_t size_ = 0;
};

inline Arena& thread_arena() {
  static thread_local Arena arena;
  return arena;
}

// For tests: what a task reads of its scratch and has not written is then NaN, in every float there is.
inline std::atomic<bool> scratch_is_nan{false};

// How many of `parts` a task may take at most, so that with `times` as many in all every thread has a task.
inline int64_t leaving_none_idle(int64_t parts, int64_t times) {
  const int64_t tasks = (torch::stable::get_num_threads() + times - 1) / times;
  return (parts + tasks - 1) / tasks;
}

// Calls work(index, scratch) for each index of [0, count), the next ones to whichever thread is free: a 16th of its
// share of what is left at once, since a counter that threads have in common takes a microsecond to come by.
template <class Work>
void parallel_tasks(int64_t count, size_t scratch_bytes, const Work& work) {
  if (count <= 0) return;
  const int64_t threads = std::min<int64_t>(count, torch::stable::get_num_threads());
  std::atomic<int64_t> next{0};
  const auto worker = [&](int64_t, int64_t) {
    Arena& arena = thread_arena();
    void* scratch = arena.get(scratch_bytes);
    for (int64_t index = next.load(std::memory_order_relaxed); index < count;) {
      const int64_t end = index + 1 + (count - index - 1) / (16 * threads);
      if (!next.compare_exchange_weak(index, end, std::memory_order_relaxed)) continue;
      for (; index < end; ++index) {
        if (scratch_is_nan.load(std::memory_order_relaxed)) std::memset(scratch, 0xff, scratch_bytes);
        work(index, scratch);
      }
      index = next.load(std::memory_order_relaxed);
    }
    arena.trim();
  };
  if (threads <= 1)
    worker(0, 1);
  else
    torch::stable::parallel_for(0, threads, 1, worker);
}

}  // namespace duplex
