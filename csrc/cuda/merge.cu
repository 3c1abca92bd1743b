#include "cuda/device.cuh"
#include "cuda/merge.cuh"

namespace duplex {

void merge(const Merge& m, void* stream) {
  const int64_t rows = m.batch * m.rows * m.heads, each = MERGE_THREADS / 32;
  const int blocks = int((rows + each - 1) / each);
  switch (m.dtype) {
    case DType::FLOAT32: return launch<merge_kernel<Float32>>("merge", blocks, MERGE_THREADS, 0, stream, m);
    case DType::FLOAT16: return launch<merge_kernel<Float16>>("merge", blocks, MERGE_THREADS, 0, stream, m);
    case DType::BFLOAT16: return launch<merge_kernel<Bfloat16>>("merge", blocks, MERGE_THREADS, 0, stream, m);
    case DType::BOOL: return;
  }
}

}  // namespace duplex
