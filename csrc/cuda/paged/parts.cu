#include <algorithm>

#include "cuda/device.cuh"
#include "cuda/paged/attend.h"
#include "cuda/paged/parts.cuh"

namespace duplex::paged {
namespace {

constexpr int32_t ROWS_AT_ONCE = 8;  // of a union; most of a plan's have one row, or are not there

// Teams of a head: more where parts would come one after another. Not where the order of sums must not depend on how
// many there are; nor of a plan's unions, most of which have few parts.
int32_t log2_teams(const Call& call, int32_t groups) {
  if (call.plan || call.division.fixed) return 0;
  int32_t log2 = 0;
  while (2 << log2 <= groups && MERGE_AT_ONCE << (log2 + 1) <= int32_t(call.division.splits.divisor)) ++log2;
  return log2;
}

template <class T, int COUNT>
void merge_by(const Call& call, int32_t units, const Device& device) {
  const int log2_lanes = log2_merge_lanes<COUNT>(call.head_dim_v), groups = PARTS_THREADS >> log2_lanes;
  const int32_t teams = COUNT == Teams::COUNT ? log2_teams(call, groups) : 0,
                heads = groups >> teams;  // heads of a block
  const int32_t rows = std::min({call.batch.max_q, call.division.rows, ROWS_AT_ONCE});
  const PartsShape shape{log2_above(rows), log2_above((call.heads_q + heads - 1) / heads), log2_lanes, teams};
  const Stream stream{device.stream, device.overlaps};
  launch<parts_kernel<T, COUNT>>("merge of parts", units << shape.log2_rows << shape.log2_blocks, PARTS_THREADS,
                                 Teams::SHARED_BYTES, stream, call, shape);
}

template <class T>
void merge_as(const Call& call, int32_t units, const Device& device) {
  call.out_vectors ? merge_by<T, 4>(call, units, device) : merge_by<T, 1>(call, units, device);
}

}  // namespace

void merge_parts(const Call& call, bool bfloat16, int32_t units, const Device& device) {
  bfloat16 ? merge_as<Bfloat16>(call, units, device) : merge_as<Float16>(call, units, device);
}

}  // namespace duplex::paged
