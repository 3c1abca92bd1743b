#include <algorithm>

#include "cuda/device.cuh"
#include "cuda/paged/append.cuh"

namespace duplex::paged {
namespace {

constexpr int HEADS_A_THREAD = 4;

template <class T, Storage S, int COUNT>
void append_by(const Append& a, void* stream) {
  constexpr int NUMBERS = 2 * COUNT * APPEND_PAIRS<COUNT>;
  const int log2_lanes = log2_above((std::max(a.keys.dim, a.values.dim) + NUMBERS - 1) / NUMBERS);
  const int slices = (a.heads + HEADS_A_THREAD - 1) / HEADS_A_THREAD;
  const int64_t each = APPEND_THREADS >> log2_lanes, blocks = 2 * slices * ((a.tokens + each - 1) / each);
  launch<append_kernel<T, S, COUNT>>("append", int(blocks), APPEND_THREADS, 0, stream, a, log2_lanes, slices);
}

template <class T, Storage S>
void append_into(const Append& a, void* stream) {
  const Rope& rope = a.keys.rope;
  const uintptr_t tables = reinterpret_cast<uintptr_t>(rope.cos) | reinterpret_cast<uintptr_t>(rope.sin);
  const bool vectors = a.vectors && rope.reach % VECTOR<T> == 0 && tables % 16 == 0;
  vectors ? append_by<T, S, VECTOR<T>>(a, stream) : append_by<T, S, 1>(a, stream);
}

template <class T>
void append_as(const Append& a, void* stream) {
  switch (a.storage) {
    case Storage::AS_QUERIES: return append_into<T, Storage::AS_QUERIES>(a, stream);
    case Storage::INT8: return append_into<T, Storage::INT8>(a, stream);
    case Storage::FLOAT8_E4M3: return append_into<T, Storage::FLOAT8_E4M3>(a, stream);
  }
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
