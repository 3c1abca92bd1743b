// Attention over pages for Hopper: tiles of 128 rows, of a prompt or of sequences that share a prefix, through the
// forward's pipeline. Bulk copies bring keys box by box, each from a page that the block table tells; queries are put
// in place by the warps that multiply them, rotated where that is asked for.
#pragma once

#include "cuda/merge_row.cuh"
#include "cuda/paged/rope.cuh"
#include "cuda/paged/scores.cuh"
#include "cuda/sm90/pages.cuh"
#include "cuda/sm90/pipeline.cuh"
#include "cuda/store.cuh"

namespace duplex::sm90 {

template <class S>
struct PromptStages : Shared<S> {
  DUPLEX_DEVICE static int block_at(const paged::RowTile& tile, int t) { return tile.edges_first(t); }
  // Stages are free when their blocks have been read.
  DUPLEX_DEVICE void wait_for_tile(int) const {}
};

template <class T, class S, bool TERMS>
struct PagedCompute : Pipeline<T, S> {
  using Base = Pipeline<T, S>;
  using Base::shared, Base::warpgroup, Base::thread, Base::lane, Base::quad_lane;
  static constexpr float UNIT = TERMS ? 1 : LN2;             // of the softmax's references
  static constexpr int BARRIER_OWN = 1 + Base::BARRIER_ALL;  // and those after it: of the warps of one warpgroup

  const PagedArguments& a;

  DUPLEX_DEVICE PagedCompute(const PagedArguments& a, Shared<S> shared, int warpgroup, int thread)
      : Base(shared, warpgroup, thread), a(a) {}

  // The warpgroup's 64 rows of queries, once it has read those of the tile before.
  DUPLEX_DEVICE void put_queries(const paged::RowTile& tile) const {
    using Queries = typename S::Queries;
    constexpr int UNITS = Queries::ROW_BYTES / 16, ALL_UNITS = Queries::PANELS * UNITS;  // of 16 bytes in a row
    const paged::Call& c = a.call;
    ptx::named_sync(BARRIER_OWN + warpgroup, 128);
    for (int n = thread; n < 64 * ALL_UNITS; n += 128) {
      const int m = 64 * warpgroup + n / ALL_UNITS, unit = n % ALL_UNITS;
      const paged::RowTile::Row r = tile.row(m);
      float x[8] = {};
      if (r.live)
        paged::load_eight<T>(c.q.template at<uint16_t>(0, tile.piece.row + r.i, r.head), 8 * unit, c.head_dim,
                             c.q_vectors, tile.position(r), c.rope, x);
      const uint32_t to =
          shared.q() + unit / UNITS * Queries::PANEL_BYTES + swizzled(m, unit % UNITS, Queries::ROW_BYTES);
      ptx::shared_store16(
          to, {ptx::pack<T>(x[0], x[1]), ptx::pack<T>(x[2], x[3]), ptx::pack<T>(x[4], x[5]), ptx::pack<T>(x[6], x[7])});
    }
    ptx::fence_async_proxy();
    ptx::named_sync(BARRIER_OWN + warpgroup, 128);
  }

  DUPLEX_DEVICE void tile(const paged::RowTile& tile) {
    const int count = tile.keys.count();
    paged::Rows<paged::RowsDown> rows;
#pragma unroll
    for (int r = 0; r < 2; ++r) rows.put(r, tile, this->row() + 8 * r);
    Softmax softmax;
    softmax.start(nullptr, 0, UNIT, quad_lane());
    float out[Base::OUT];
    if (count > 0) {
      const auto weigh = [&]<bool EDGE>(float (&x)[Base::PRODUCTS], int t, float (&decay)[2]) {
        const int32_t j = tile.edges_first(t) * S::BLOCK_N + 2 * quad_lane();
        if constexpr (TERMS) paged::add_terms(x, tile, rows, j);
        if constexpr (EDGE) paged::hide(x, tile, rows, j);
        softmax.template next<EDGE || TERMS, TERMS>(x, a.call.terms.scale * LOG2E, decay,
                                                    typename Base::Exponentials{*this});
      };
      const auto live = [&](int t) { return int(tile.piece.span.len_k) - tile.edges_first(t) * S::BLOCK_N; };
      put_queries(tile);
      this->template sum_values<TERMS>(count, tile.edges(), out, weigh, live, [] {});
    } else {
#pragma unroll
      for (int n = 0; n < Base::OUT; ++n) out[n] = 0;
    }
    float weight[2], lse[2];
    softmax.finish(UNIT, weight, lse);
#pragma unroll
    for (int n = 0; n < Base::OUT; ++n) out[n] *= weight[row_of(n)];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const paged::RowTile::Row of = tile.row(this->row() + 8 * r);
      tile.piece.slot >= 0 ? store_part(tile, of, out, r, lse[r]) : store_whole(tile, of, out, r, lse[r]);
    }
  }

  DUPLEX_DEVICE void store_part(const paged::RowTile& tile, const paged::RowTile::Row& of,
                                const float (&out)[Base::OUT], int r, float lse) const {
    const paged::Call& c = a.call;
    if (!of.live) return;
    const int64_t slot = tile.piece.slot + of.i - tile.piece.begin;
    float* to = c.parts + (slot * c.heads_q + of.head) * c.head_dim_v;
#pragma unroll
    for (int n = 0; n < Base::OUT; ++n)
      if (const int column = column_of(n) + 2 * quad_lane(); row_of(n) == r && column < c.head_dim_v)
        to[column] = out[n];
    if (quad_lane() == 0) c.parts_lse[int64_t(of.head) * c.slots + slot] = lse;
  }

  DUPLEX_DEVICE void store_whole(const paged::RowTile& tile, const paged::RowTile::Row& of, float (&out)[Base::OUT],
                                 int r, float lse) const {
    const paged::Call& c = a.call;
    const OnePart whole(lse, c.sink ? c.sink[of.head] : -INFINITY);
#pragma unroll
    for (int n = 0; n < Base::OUT; ++n)
      if (row_of(n) == r) out[n] = whole.number(out[n]);
    const int64_t row = of.live ? tile.piece.row + of.i : 0;
    uint16_t* to = c.out.template at<uint16_t>(0, row, of.head);
    if (c.out_vectors)
      store_row<T, true>(to, out, r, 1, c.head_dim_v, of.live, quad_lane());
    else
      store_row<T, false>(to, out, r, 1, c.head_dim_v, of.live, quad_lane());
    if (of.live && quad_lane() == 0) c.lse[int64_t(of.head) * c.batch.rows_q + row] = whole.lse;
  }

  DUPLEX_DEVICE void run() {
    this->open();
    for_each_paged_tile<S>(a, [&](const paged::RowTile& t) { tile(t); });
  }
};

template <class T, class S, bool TERMS>
DUPLEX_KERNEL(S::THREADS)
paged_kernel(DUPLEX_PARAMETER PagedArguments a) {
  const Shared<S> shared{ptx::shared_base()};
  const int warpgroup = ptx::uniform(ptx::thread_index() / 128), warp = ptx::uniform(ptx::thread_index() / 32);
  ptx::let_next_launch_begin();
  if (ptx::thread_index() == 0) {
    prepare(shared, TERMS ? LOG2E : a.call.terms.scale * LOG2E);
    ptx::barrier_init_fence();
  }
  ptx::block_sync();
  if (warpgroup == 0) {
    ptx::fewer_registers<S::LOADER_REGISTERS>();
    if (warp == 0) PageLoader<S, PromptStages<S>>{a, {shared}}.run();
    if (warp == 1 && a.grid.which != paged::Which::SHARED)
      for_each_share(a, [&](const paged::Share& s) { paged::clear_outside<T>(a.call, s); });
  } else {
    ptx::more_registers<S::COMPUTE_REGISTERS>();
    PagedCompute<T, S, TERMS>(a, shared, warpgroup - 1, ptx::thread_index() % 128).run();
  }
}

}  // namespace duplex::sm90
