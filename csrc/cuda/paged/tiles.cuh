// The tiles of a block of threads: rows, the heads that share a kv head side by side in them, and the keys they see.
#pragma once

#include "cuda/key_blocks.h"
#include "cuda/paged/call.h"
#include "cuda/ptx.cuh"

namespace duplex::paged {

// What a block of threads takes at a time: of a unit, heads that share a kv head.
struct Share {
  const Grid& grid;
  int32_t unit, kv_head, chunk;

  DUPLEX_DEVICE Share(const Grid& grid, int32_t n) : grid(grid) {
    const auto of_width = grid.width.divide(n), of_chunks = grid.chunks.divide(of_width.rest);
    unit = of_width.quotient;
    kv_head = of_chunks.quotient;
    chunk = of_chunks.rest;
  }
};

// Queries [i0, i1) of a piece.
struct RowTile {
  const Call& c;
  const Piece& piece;
  Share share;
  int32_t i0, i1;
  KeyBlocks keys;

  // Row m of the tile: which query it is, its head, and whether it is one.
  struct Row {
    int32_t i, head;
    bool live;
  };
  DUPLEX_DEVICE Row row(int m) const {
    const Packing& p = share.grid.pack;
    const auto [query, g] = share.grid.heads.divide(m);
    const bool is_head = share.chunk * p.heads + g < c.group;
    return {i0 + query, first_head() + (is_head ? g : 0), i0 + query < i1 && query < p.rows && is_head};
  }
  DUPLEX_DEVICE int32_t first_head() const { return share.kv_head * c.group + share.chunk * share.grid.pack.heads; }

  // Rows from here on are none.
  DUPLEX_DEVICE int rows() const { return (i1 - i0) * share.grid.pack.heads; }

  // Blocks of keys with edges before the others; where bits must not depend on the rows beside, from first to last.
  DUPLEX_DEVICE int edges_first(int t) const { return c.division.fixed ? keys.in_order(t) : keys.at(t); }
  // How many come first that need a test.
  DUPLEX_DEVICE int edges() const { return c.division.fixed ? keys.count() : keys.edges(); }

  // Where key j of the piece lies, which is one.
  struct Place {
    int32_t page, slot;
  };
  DUPLEX_DEVICE Place place_of(int32_t j) const {
    const Place found = entry_of(j);
    return {page(found.page), found.slot};
  }
  // The same as the table has it, for who can wait for it and look later whether it is a page.
  DUPLEX_DEVICE Place entry_of(int32_t j) const {
    const auto [page, slot] = c.page_size.divide(piece.first + j);
    return {c.pages.table[piece.sequence * c.pages.table_row + page], slot};
  }
  DUPLEX_DEVICE int32_t page(int32_t entry) const { return clamp32(entry, 0, c.num_pages - 1); }

  // Where a row stands in its own sequence.
  DUPLEX_DEVICE int64_t position(const Row& r) const {
    return piece.shared && c.rope && r.live ? position_of(c.batch, piece.row + r.i) : piece.position + r.i;
  }
};

// f(tile) for each, with keys in blocks of block_n.
template <class F>
DUPLEX_DEVICE void for_each_tile(const Call& c, const Share& share, int block_n, F&& f) {
  const Which which = share.grid.which;
  Piece piece;
  if (which == Which::ALL) {
    if (c.batch.batch == 0 || !piece_of(c.batch, c.division, share.unit, piece)) return;
  } else if (!piece_of(c.batch, c.plan, c.capacity, which == Which::SHARED, c.division.fixed, share.unit, piece)) {
    return;
  }
  const int32_t rows = share.grid.pack.rows;
  for (int32_t i0 = piece.begin; i0 < piece.end; i0 += rows) {
    const int32_t i1 = i0 + rows < piece.end ? i0 + rows : piece.end;
    f(RowTile{c, piece, share, i0, i1, key_blocks(piece.span, i0, i1, block_n)});
  }
}

// A warp clears rows past the last sequence, of the block's heads: those that are its share among the units.
template <class T>
DUPLEX_DEVICE void clear_outside(const Call& c, const Share& share) {
  if (!c.batch.cu_q) return;
  const int32_t end = c.batch.rows_q, lane = ptx::thread_index() % 32;
  const int32_t first = share.chunk * share.grid.pack.heads, last = first + share.grid.pack.heads;
  for (int32_t row = clamp32(c.batch.cu_q[c.batch.batch], 0, end) + share.unit; row < end; row += share.grid.units)
    for (int g = first; g < last && g < c.group; ++g) {
      const int32_t head = share.kv_head * c.group + g;
      auto* to = c.out.template at<typename T::Stored>(0, row, head);
      for (int column = lane; column < c.head_dim_v; column += 32) to[column] = 0;
      if (lane == 0) c.lse[int64_t(head) * end + row] = -INFINITY;
    }
}

}  // namespace duplex::paged
