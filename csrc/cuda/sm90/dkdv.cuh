// dk and dv for Hopper: nothing is added to memory, so the order of sums is fixed.
#pragma once

#include "cuda/sm90/key_gradients.cuh"

namespace duplex::sm90 {

template <class T, class S, bool TERMS>
DUPLEX_KERNEL(S::THREADS)
dkdv_kernel(DUPLEX_PARAMETER BackwardArguments a, DUPLEX_PARAMETER BackwardMaps maps) {
  const typename S::Shared shared{ptx::shared_base()};
  const auto tickets = tickets_of<S, KeyWork>(shared.base);
  if (ptx::thread_index() == 0) {
    init_barriers<S>(shared);
    tickets.init(1 + S::WARPS);
    ptx::barrier_init_fence();
  }
  ptx::wait_for_launch_before();
  ptx::block_sync();
  divide_roles<2, S>(
      [&](int mover) {
        mover == 0 ? load_rows<S>(a, maps, shared, tickets) : hand_out(a.lengths, a.key_tiles, tickets, a.group);
      },
      [&](int warpgroup, int thread) {
        if constexpr (!S::DIVIDED)
          KeyGradients<T, S, TERMS, true, true>(a, shared, warpgroup, thread).run(tickets);
        else if (warpgroup == 0)
          KeyGradients<T, S, TERMS, false, true>(a, shared, warpgroup, thread).run(tickets);
        else
          KeyGradients<T, S, TERMS, true, false>(a, shared, warpgroup, thread).run(tickets);
      });
}

}  // namespace duplex::sm90
