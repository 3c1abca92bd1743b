// Attention over pages for one head_dim, DUPLEX_HEAD_DIM.
#include "cuda/device.cuh"
#include "cuda/paged/attend.cuh"
#include "cuda/paged/attend.h"

namespace duplex::paged {
namespace {

constexpr int HEAD_DIM = DUPLEX_HEAD_DIM;

template <class T, Storage S, int ROWS>
void go(const Call& c, Which which, int32_t units, void* stream) {
  using L = Tile<S, HEAD_DIM, ROWS>;
  const Grid grid = Grid::of(c, ROWS, which, units);
  launch<attend_kernel<T, S, HEAD_DIM, ROWS>>("paged attention", grid.shares(), L::THREADS, L::SHARED_BYTES, stream, c,
                                              grid);
}

template <class T, Storage S>
void go(const Call& c, int tile_rows, Which which, int32_t units, void* stream) {
  tile_rows == SMALL_ROWS ? go<T, S, SMALL_ROWS>(c, which, units, stream)
                          : go<T, S, LARGE_ROWS>(c, which, units, stream);
}

template <class T>
void go(const Call& c, int tile_rows, Which which, int32_t units, void* stream) {
  switch (c.pages.storage) {
    case Storage::AS_QUERIES: return go<T, Storage::AS_QUERIES>(c, tile_rows, which, units, stream);
    case Storage::INT8: return go<T, Storage::INT8>(c, tile_rows, which, units, stream);
    case Storage::FLOAT8_E4M3: return go<T, Storage::FLOAT8_E4M3>(c, tile_rows, which, units, stream);
  }
}

void attend(const Call& c, bool bfloat16, int tile_rows, Which which, int32_t units, void* stream) {
  bfloat16 ? go<Bfloat16>(c, tile_rows, which, units, stream) : go<Float16>(c, tile_rows, which, units, stream);
}

template <Storage S>
int block_n(int tile_rows) {
  return tile_rows == SMALL_ROWS ? Tile<S, HEAD_DIM, SMALL_ROWS>::BLOCK_N : Tile<S, HEAD_DIM, LARGE_ROWS>::BLOCK_N;
}

}  // namespace

#define DUPLEX_JOIN(a, b) a##b
#define DUPLEX_NAME(a, b) DUPLEX_JOIN(a, b)
extern const Attention DUPLEX_NAME(ATTENTION_, DUPLEX_HEAD_DIM);
const Attention DUPLEX_NAME(ATTENTION_, DUPLEX_HEAD_DIM) = {HEAD_DIM, &attend, [](Storage storage, int tile_rows) {
                                                              return storage == Storage::AS_QUERIES
                                                                         ? block_n<Storage::AS_QUERIES>(tile_rows)
                                                                         : block_n<Storage::INT8>(tile_rows);
                                                            }};

}  // namespace duplex::paged
