#include "cuda/device.cuh"
#include "cuda/paged/attend.h"
#include "cuda/paged/parts.cuh"

namespace duplex::paged {

void merge_parts(const Call& call, bool bfloat16, int32_t units, void* stream) {
  const int blocks = units * call.heads_q;
  if (bfloat16)
    launch<parts_kernel<Bfloat16>>("merge of parts", blocks, PARTS_THREADS, 0, stream, call);
  else
    launch<parts_kernel<Float16>>("merge of parts", blocks, PARTS_THREADS, 0, stream, call);
}

}  // namespace duplex::paged
