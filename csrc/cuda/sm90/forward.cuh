// Forward for Hopper: a block stays on its multiprocessor and walks over tiles; its first warpgroup loads and
// hands out tiles, the others compute.
#pragma once

#include "cuda/sm90/compute.cuh"

namespace duplex::sm90 {

template <class T, class S, bool TERMS>
DUPLEX_KERNEL(S::THREADS)
forward_kernel(DUPLEX_PARAMETER ForwardArguments a, DUPLEX_PARAMETER Maps maps) {
  const Shared<S> shared{ptx::shared_base()};
  const Tickets<Work> tickets = tickets_of<S, Work>(shared.base);
  const int warpgroup = ptx::uniform(ptx::thread_index() / 128);
  if (ptx::thread_index() == 0) {
    prepare(shared, TERMS ? LOG2E : a.terms.scale * LOG2E);
    tickets.init(1 + 4 * S::WARPGROUPS);
    ptx::barrier_init_fence();
  }
  ptx::wait_for_launch_before();
  ptx::block_sync();
  if (warpgroup == 0) {
    ptx::fewer_registers<S::LOADER_REGISTERS>();
    const int warp = ptx::uniform(ptx::thread_index() / 32);
    if (warp == 0 && ptx::elect()) load(a, maps, shared, tickets);
    if (warp == 1 && ptx::elect()) hand_out(a.lengths, a.tiles(), tickets);
  } else {
    ptx::more_registers<S::COMPUTE_REGISTERS>();
    Compute<T, S, TERMS>(a, shared, warpgroup - 1, ptx::thread_index() % 128).run(tickets);
  }
}

}  // namespace duplex::sm90
