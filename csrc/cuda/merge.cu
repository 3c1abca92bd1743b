#include "cuda/device.cuh"
#include "cuda/merge.cuh"

namespace duplex {
namespace {

// Whether every row begins on 16 bytes and ends on them.
bool has_vectors(const Merge& m, int64_t bytes) {
  int64_t all = m.dim * bytes;
  for (int n = 0; n < m.count; ++n) {
    const View& out = m.parts[n].out;
    all |= int64_t(reinterpret_cast<uintptr_t>(out.data)) | bytes * (out.batch | out.row | out.head);
  }
  return all % 16 == 0;
}

template <class T, int COUNT>
void merge_by(const Merge& m, void* stream) {
  const int log2_lanes = log2_merge_lanes<COUNT>(m.dim);
  const int64_t rows = m.batch * m.rows * m.heads, each = MERGE_THREADS >> log2_lanes;
  launch<merge_kernel<T, COUNT>>("merge", int((rows + each - 1) / each), MERGE_THREADS, 0, stream, m, log2_lanes);
}

template <class T>
void merge_as(const Merge& m, void* stream) {
  has_vectors(m, sizeof(typename T::Stored)) ? merge_by<T, VECTOR<T>>(m, stream) : merge_by<T, 1>(m, stream);
}

}  // namespace

void merge(const Merge& m, void* stream) {
  switch (m.dtype) {
    case DType::FLOAT32: return merge_as<Float32>(m, stream);
    case DType::FLOAT16: return merge_as<Float16>(m, stream);
    case DType::BFLOAT16: return merge_as<Bfloat16>(m, stream);
    case DType::BOOL: return;
  }
}

}  // namespace duplex
