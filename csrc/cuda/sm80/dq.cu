// dq for one head_dim, DUPLEX_HEAD_DIM.
#include "cuda/sm80/dq.cuh"
#include "cuda/sm80/launch.cuh"

namespace duplex::sm80 {
namespace {

using Built = QueryShape<DUPLEX_HEAD_DIM>;

template <class T, bool TERMS, bool DISTANCES>
void launch_kernel(const BackwardLaunch& l) {
  const Tiles& t = l.arguments.row_tiles;
  const int64_t tiles = t.entries.count(l.arguments.lengths) * t.heads;
  const int blocks = DISTANCES ? l.arguments.distances.count : blocks_of(tiles, l.processors);
  constexpr int SHARED = Built::SHARED_BYTES + DISTANCES * Diagonals<Built::WARP_ROWS, Built::BLOCK_N>::BYTES;
  static_assert(SHARED <= 99 * 1024);
  launch<dq_kernel<T, Built, TERMS, DISTANCES>>(
      "dq", blocks, Built::THREADS, SHARED, l.stream, l.arguments,
      Sources{source_of(l.q), source_of(l.k), source_of(l.v), source_of(l.dout)});
}

template <class T>
void launch_type(const BackwardLaunch& l) {
  if (l.arguments.distances.slots)
    launch_kernel<T, true, true>(l);
  else
    l.terms ? launch_kernel<T, true, false>(l) : launch_kernel<T, false, false>(l);
}

void launch_dq(BackwardLaunch& l) { l.bfloat16 ? launch_type<Bfloat16>(l) : launch_type<Float16>(l); }

}  // namespace

extern const BackwardVariant DUPLEX_NAME(DQ_, DUPLEX_HEAD_DIM);
const BackwardVariant DUPLEX_NAME(DQ_, DUPLEX_HEAD_DIM) = {Built::HEAD_DIM, Built::BLOCK_M, Built::BLOCK_N, &launch_dq};

}  // namespace duplex::sm80
