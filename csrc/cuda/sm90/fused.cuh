// dq, dk and dv for Hopper in one kernel: scores are computed once, five products a pair of blocks. Every tile of keys
// adds to the float32 sums of dq, so the order of those, and it alone, is not fixed. The sums lie as threads hold them:
// for each head and 64 rows (RowSums), for each computing warpgroup, (columns / 8, thread, 4 accumulators).
#pragma once

#include "cuda/sm90/key_gradients.cuh"

namespace duplex::sm90 {

// A thread for each computing warpgroup adds to memory what that has staged.
template <class S>
DUPLEX_DEVICE void add_to_dq(const BackwardArguments& a, typename S::Shared shared, Tickets<KeyWork> tickets,
                             int warpgroup) {
  uint32_t step = 0;
  tickets.for_each<false>([&](const KeyWork& w) {
    const int64_t sums = RowSums::start(a.lengths, w.batch, w.row_q);
    for_each_block_of_rows<S>(a, w, [&](int head, int i0) {
      float* to = a.dq_sums + (head * a.sums.head + sums + i0) * S::HEAD_DIM + S::BLOCK_M * S::first_column(warpgroup);
      ptx::barrier_wait(shared.staged_full(warpgroup), step++ & 1);
      ptx::reduce_bytes(to, shared.staged(warpgroup), S::BLOCK_M * S::columns(warpgroup) * 4);
      ptx::reduce_commit();
      ptx::reduce_wait_read<0>();
      ptx::barrier_arrive(shared.staged_empty(warpgroup));
    });
  });
  ptx::reduce_wait<0>();
}

template <class T, class S, bool TERMS>
DUPLEX_KERNEL(S::THREADS)
fused_kernel(DUPLEX_PARAMETER BackwardArguments a, DUPLEX_PARAMETER BackwardMaps maps) {
  ptx::let_next_launch_begin();
  const typename S::Shared shared{ptx::shared_base()};
  const auto tickets = tickets_of<S, KeyWork>(shared.base);
  if (ptx::thread_index() == 0) {
    init_barriers<S>(shared);
    for (int w = 0; w < S::WARPGROUPS; ++w) {
      ptx::barrier_init(shared.staged_full(w), S::WARPS / S::WARPGROUPS);
      ptx::barrier_init(shared.staged_empty(w), 1);
    }
    tickets.init(1 + S::WARPGROUPS + S::WARPS);
    ptx::barrier_init_fence();
  }
  ptx::wait_for_launch_before();
  ptx::block_sync();
  divide_roles<2 + S::WARPGROUPS, S>(
      [&](int mover) {
        if (mover == 0)
          load_rows<S>(a, maps, shared, tickets);
        else if (mover == 1)
          hand_out(a.lengths, a.key_tiles, tickets, a.group);
        else
          add_to_dq<S>(a, shared, tickets, mover - 2);
      },
      [&](int warpgroup, int thread) {
        if (S::EVEN || warpgroup == 0)
          KeyGradients<T, S, TERMS, true, true, S::columns(0)>(a, shared, warpgroup, thread).run(tickets);
        else if constexpr (!S::EVEN)
          KeyGradients<T, S, TERMS, true, true, S::columns(1)>(a, shared, warpgroup, thread).run(tickets);
      });
}

// A warpgroup's columns of a block of 64 rows, from the sums as its threads held them.
template <class T, class S, int WARPGROUP>
DUPLEX_DEVICE void store_sums(const BackwardArguments& a, const float* sums, int b, const RowRange& q, int i0,
                              int head) {
  constexpr int FIRST = S::first_column(WARPGROUP);
  const int thread = ptx::thread_index() % 128, lane = thread % 32;
  float dq[S::columns(WARPGROUP) / 2];
  const float* from = sums + S::BLOCK_M * FIRST + 4 * thread;
#pragma unroll
  for (int n = 0; n < S::columns(WARPGROUP) / 8; ++n) {
    const Words4 four = *reinterpret_cast<const Words4*>(from + 128 * 4 * n);
    for (int i = 0; i < 4; ++i) dq[4 * n + i] = ptx::float_of(four.word[i]);
  }
  const float weight[2] = {a.terms.scale, a.terms.scale};
  Rows to = a.dq;
  to.data = to.at(0, 0, 0) + FIRST;
  store_rows<T>(to, b, q.row, head, i0 + thread / 32 * 16 + lane / 4, q.length, a.head_dim - FIRST, dq, weight,
                lane % 4);
}

// The sums of dq, times scale, as rows of the caller's. A block takes 64 of a head at a time.
template <class T, class S>
DUPLEX_KERNEL(S::THREADS - 128)
finish_dq_kernel(DUPLEX_PARAMETER BackwardArguments a) {
  ptx::wait_for_launch_before();
  const Lengths& l = a.lengths;
  const int heads = a.key_tiles.heads * a.group, blocks = (l.max_q + S::BLOCK_M - 1) / S::BLOCK_M;
  const int64_t tiles = int64_t(l.batch) * blocks * heads;
  for (int64_t tile = ptx::block_index(); tile < tiles; tile += ptx::blocks()) {
    const int head = int(tile % heads), block = int(tile / heads % blocks), b = int(tile / heads / blocks);
    const RowRange q = query_rows(l, b);
    const int i0 = block * S::BLOCK_M;
    if (i0 >= q.length) continue;
    const float* sums = a.dq_sums + (head * a.sums.head + RowSums::start(l, b, q.row) + i0) * S::HEAD_DIM;
    if (ptx::thread_index() < 128)
      store_sums<T, S, 0>(a, sums, b, q, i0, head);
    else
      store_sums<T, S, 1>(a, sums, b, q, i0, head);
  }
}

}  // namespace duplex::sm90
