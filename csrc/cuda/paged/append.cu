#include <algorithm>

#include "cuda/device.cuh"
#include "cuda/paged/append.cuh"

namespace duplex::paged {
namespace {

template <class T>
void append_as(const Append& a, void* stream) {
  const int lanes = (std::max(a.keys.dim, a.values.dim) + APPEND_NUMBERS - 1) / APPEND_NUMBERS;
  int width = 1;
  while (width < lanes) width *= 2;
  const int64_t rows = a.tokens * a.heads, each = APPEND_THREADS / width;
  const int blocks = int(2 * ((rows + each - 1) / each));
  if (a.vectors)
    launch<append_kernel<T, VECTOR<T>>>("append", blocks, APPEND_THREADS, 0, stream, a, width);
  else
    launch<append_kernel<T, 1>>("append", blocks, APPEND_THREADS, 0, stream, a, width);
}

}  // namespace

void append(const Append& a, void* stream) {
  if (a.tokens * a.heads == 0) return;
  switch (a.dtype) {
    case DType::FLOAT32: return append_as<Float32>(a, stream);
    case DType::FLOAT16: return append_as<Float16>(a, stream);
    case DType::BFLOAT16: return append_as<Bfloat16>(a, stream);
    case DType::BOOL: return;
  }
}

void copy_pages(const CopyPages& c, int processors, void* stream) {
  if (c.count == 0 || c.slots * c.heads * c.row_bytes == 0) return;
  // The widest unit that every address is a multiple of.
  const int64_t low = int64_t(reinterpret_cast<uintptr_t>(c.data)) | c.page | c.slot | c.head | c.row_bytes;
  const int64_t unit = std::min<int64_t>(low & -low, 16);
  const int64_t units = c.slots * c.heads * (c.row_bytes / unit);
  const int blocks =
      int(std::clamp<int64_t>(8 * processors / c.count, 1, (units + APPEND_THREADS - 1) / APPEND_THREADS));
  const auto go = [&]<class Unit>(Unit) {
    launch<copy_kernel<Unit>>("copy", c.count * blocks, APPEND_THREADS, 0, stream, c, blocks);
  };
  switch (unit) {
    case 16: return go(Words4{});
    case 8: return go(uint64_t{});
    case 4: return go(uint32_t{});
    case 2: return go(uint16_t{});
    default: return go(uint8_t{});
  }
}

}  // namespace duplex::paged
