#include "cuda/device.cuh"
#include "cuda/distances.cuh"
#include "cuda/outside.cuh"
#include "cuda/prepare.h"
#include "cuda/row_sums.cuh"
#include "cuda/schedule.cuh"
#include "cuda/sink.cuh"

namespace duplex {

void schedule(const Lengths& lengths, const Entries& entries, Order order, void* stream) {
  const int64_t blocks = (entries.count(lengths) + SCHEDULE_THREADS - 1) / SCHEDULE_THREADS;
  if (blocks > 0)
    launch<schedule_kernel>("schedule", int(blocks), SCHEDULE_THREADS, SCHEDULE_SHARED, stream, lengths, entries,
                            order);
}

void clear_outside(const OutsideArguments& arguments, int processors, void* stream) {
  launch<outside_kernel>("outside", 4 * processors, OUTSIDE_THREADS, 0, stream, arguments);
}

void sum_rows(const RowSumsArguments& arguments, bool bfloat16, bool whole, int processors, void* stream) {
  const auto go = [&]<auto KERNEL>() {
    launch<KERNEL>("row_sums", 8 * processors, ROW_SUMS_THREADS, 0, stream, arguments);
  };
  if (bfloat16)
    whole ? go.operator()<row_sums_kernel<Bfloat16, true>>() : go.operator()<row_sums_kernel<Bfloat16, false>>();
  else
    whole ? go.operator()<row_sums_kernel<Float16, true>>() : go.operator()<row_sums_kernel<Float16, false>>();
}

void add_distances(const DistanceSums& sums, float* to, int32_t radius, void* stream) {
  launch<distance_kernel>("distances", int(sums.heads * distance_blocks(radius)), DISTANCE_THREADS, DISTANCE_SHARED,
                          stream, sums, to, radius);
}

void sink_gradient(const SinkArguments& arguments, int heads, void* stream) {
  if (heads > 0) launch<sink_kernel>("sink", heads, SINK_THREADS, SINK_SHARED, stream, arguments);
}

}  // namespace duplex
