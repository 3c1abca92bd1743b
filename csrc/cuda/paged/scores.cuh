// Terms and mask on a lane's products, where its rows of the tile may be of any queries and heads.
#pragma once

#include "cuda/paged/tiles.cuh"
#include "cuda/softmax.cuh"

namespace duplex::paged {

// How a lane's numbers lie: which of its rows of the tile each is of, and how many keys behind its first.
struct RowsDown {
  static constexpr int ROWS = 2;
  DUPLEX_DEVICE static constexpr int row(int n) { return row_of(n); }
  DUPLEX_DEVICE static constexpr int key(int n) { return column_of(n); }
};
// Four for each 8 rows of the tile.
template <int TILES>
struct KeysDown {
  static constexpr int ROWS = 2 * TILES;
  DUPLEX_DEVICE static constexpr int row(int n) { return n / 4 * 2 + n % 2; }
  DUPLEX_DEVICE static constexpr int key(int n) { return n / 2 % 2 * 8; }
};

// The lane's rows: how many queries and heads each lies behind the tile's first, in one register for all.
template <class Layout>
struct Rows {
  static constexpr int BITS = 16 / Layout::ROWS, MASK = (1 << BITS) - 1;
  uint32_t places = 0;

  DUPLEX_DEVICE void put(int r, const RowTile& t, int m) {
    const RowTile::Row row = t.row(m);
    places |= uint32_t((row.i - t.i0) << BITS | (row.head - t.first_head())) << 2 * BITS * r;
  }
  DUPLEX_DEVICE int32_t i(int r, const RowTile& t) const { return t.i0 + int(places >> (2 * r + 1) * BITS & MASK); }
  DUPLEX_DEVICE int32_t head(int r, const RowTile& t) const {
    return t.first_head() + int(places >> 2 * r * BITS & MASK);
  }
};

// The terms of a score on a block of products; j is the lane's first key.
template <class Layout, int COUNT>
DUPLEX_DEVICE void add_terms(float (&x)[COUNT], const RowTile& tile, const Rows<Layout>& rows, int32_t j) {
  const Terms& t = tile.c.terms;
  const int32_t offset = int32_t(tile.piece.span.offset);
  scale_and_cap(x, t, [](int, float) {});
  const auto distance = [&](int n) { return j - (rows.i(Layout::row(n), tile) + offset) + Layout::key(n); };
  if (t.distance_bias) {
#pragma unroll
    for (int n = 0; n < COUNT; ++n) {
      const float* middle = t.distance_bias + int64_t(rows.head(Layout::row(n), tile)) * (2 * t.radius + 1) + t.radius;
      x[n] += middle[clamp32(distance(n), -t.radius, t.radius)];
    }
  }
  if (t.alibi_slopes) {
    float slope[Layout::ROWS];
#pragma unroll
    for (int r = 0; r < Layout::ROWS; ++r) slope[r] = t.alibi_slopes[rows.head(r, tile)];
#pragma unroll
    for (int n = 0; n < COUNT; ++n) x[n] -= slope[Layout::row(n)] * fabsf(float(distance(n)));
  }
}

// -inf where the span hides a key.
template <class Layout, int COUNT>
DUPLEX_DEVICE void hide(float (&x)[COUNT], const RowTile& tile, const Rows<Layout>& rows, int32_t j) {
  const Span& s = tile.piece.span;
  const int32_t live = int32_t(s.len_k) - j, prefix = int32_t(s.prefix) - j;
  int32_t low[Layout::ROWS], high[Layout::ROWS];
#pragma unroll
  for (int r = 0; r < Layout::ROWS; ++r) {
    const int32_t place = rows.i(r, tile) + int32_t(s.offset) - j;
    low[r] = place - int32_t(s.left);
    high[r] = place + int32_t(s.right);
  }
#pragma unroll
  for (int n = 0; n < COUNT; ++n) {
    const int c = Layout::key(n), r = Layout::row(n);
    const bool seen = (c < live) & ((c < prefix) | ((low[r] <= c) & (c <= high[r])));  // without branches
    x[n] = seen ? x[n] : -INFINITY;
  }
}

}  // namespace duplex::paged
