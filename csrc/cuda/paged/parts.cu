#include <algorithm>

#include "cuda/device.cuh"
#include "cuda/paged/attend.h"
#include "cuda/paged/parts.cuh"

namespace duplex::paged {
namespace {

constexpr int32_t ROWS_AT_ONCE = 8;  // of a union; most of a plan's have one row, or are not there

template <class T, int COUNT>
void merge_by(const Call& call, int32_t units, void* stream) {
  const int log2_lanes = log2_merge_lanes<COUNT>(call.head_dim_v), heads = PARTS_THREADS >> log2_lanes;
  const int32_t rows = std::min({call.batch.max_q, call.division.rows, ROWS_AT_ONCE});
  const PartsShape shape{log2_above(rows), log2_above((call.heads_q + heads - 1) / heads), log2_lanes};
  launch<parts_kernel<T, COUNT>>("merge of parts", units << shape.log2_rows << shape.log2_blocks, PARTS_THREADS, 0,
                                 stream, call, shape);
}

template <class T>
void merge_as(const Call& call, int32_t units, void* stream) {
  call.out_vectors ? merge_by<T, 4>(call, units, stream) : merge_by<T, 1>(call, units, stream);
}

}  // namespace

void merge_parts(const Call& call, bool bfloat16, int32_t units, void* stream) {
  bfloat16 ? merge_as<Bfloat16>(call, units, stream) : merge_as<Float16>(call, units, stream);
}

}  // namespace duplex::paged
