#include "cuda/device.cuh"
#include "cuda/outside.cuh"
#include "cuda/prepare.h"
#include "cuda/schedule.cuh"

namespace duplex {

void schedule(const Lengths& lengths, const Entries& entries, int32_t* order, void* stream) {
  const int64_t blocks = (entries.count(lengths) + SCHEDULE_THREADS - 1) / SCHEDULE_THREADS;
  if (blocks > 0)
    launch<schedule_kernel>("schedule", int(blocks), SCHEDULE_THREADS, SCHEDULE_SHARED, stream, lengths, entries,
                            order);
}

void clear_outside(const ForwardArguments& arguments, int processors, void* stream) {
  launch<outside_kernel>("outside", 4 * processors, OUTSIDE_THREADS, 0, stream, arguments);
}

}  // namespace duplex
