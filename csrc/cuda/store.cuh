// Accumulators to rows in global memory.
#pragma once

#include "cuda/softmax.cuh"

namespace duplex {

// Of four lanes' words, each with four of every fourth: lane c gets all that had number c (a 4 x 4 transposition).
DUPLEX_DEVICE void transpose_quad(uint32_t (&w)[4], int quad_lane) {
  const bool odd = quad_lane & 1, high = quad_lane & 2;
#pragma unroll
  for (int j = 0; j < 4; j += 2) {
    const uint32_t got = ptx::shuffle_xor(odd ? w[j] : w[j + 1], 1);
    w[j] = odd ? got : w[j];
    w[j + 1] = odd ? w[j + 1] : got;
  }
#pragma unroll
  for (int j = 0; j < 2; ++j) {
    const uint32_t got = ptx::shuffle_xor(high ? w[j] : w[j + 2], 2);
    w[j] = high ? got : w[j];
    w[j + 2] = high ? w[j + 2] : got;
  }
}

// Row r of a thread's two, times its weight, to `to`; every lane of the four comes here, and writes if the row is live.
// WHOLE: columns come in whole eights, and rows begin on 16 bytes.
template <class T, bool WHOLE, int COUNT>
DUPLEX_DEVICE void store_row(uint16_t* to, const float (&x)[COUNT], int r, float weight, int columns, bool live,
                             int quad_lane) {
  const auto pair = [&](int n) {  // columns 8 n + 2 quad_lane and the next
    return ptx::pack<T>(x[4 * n + 2 * r] * weight, x[4 * n + 2 * r + 1] * weight);
  };
  if constexpr (WHOLE) {
#pragma unroll
    for (int n = 0; n < COUNT / 4; n += 4) {
      uint32_t words[4] = {pair(n), pair(n + 1), pair(n + 2), pair(n + 3)};
      transpose_quad(words, quad_lane);
      const int column = 8 * (n + quad_lane);
      if (live && column < columns) *reinterpret_cast<Words4*>(to + column) = {words[0], words[1], words[2], words[3]};
    }
  } else if (live) {
#pragma unroll
    for (int n = 0; n < COUNT / 4; ++n) {
      const int column = 8 * n + 2 * quad_lane;
      const uint32_t word = pair(n);
      if (column < columns) to[column] = uint16_t(word);
      if (column + 1 < columns) to[column + 1] = uint16_t(word >> 16);
    }
  }
}

// The thread's rows n and n + 8 of a sequence stored from `row` on; rows from `length` on belong to others.
template <class T, int COUNT>
DUPLEX_DEVICE void store_rows(const Rows& to, int batch, int row, int head, int n, int length, int columns,
                              const float (&x)[COUNT], const float (&weight)[2], int quad_lane) {
  const auto store = [&]<bool WHOLE>() {
#pragma unroll
    for (int r = 0; r < 2; ++r)
      store_row<T, WHOLE>(to.at(batch, int64_t(row) + n + 8 * r, head), x, r, weight[r], columns, n + 8 * r < length,
                          quad_lane);
  };
  columns % 8 == 0 ? store.template operator()<true>() : store.template operator()<false>();
}

DUPLEX_DEVICE void store_lse(const ForwardArguments& a, const Work& w, int i, const float (&lse)[2], int quad_lane) {
  float* to = a.lse + w.batch * a.lse_batch + w.head * a.lse_head + w.row_q + i;
#pragma unroll
  for (int r = 0; r < 2; ++r)
    if (quad_lane == 0 && i + 8 * r < w.len_q) to[8 * r] = lse[r];
}

}  // namespace duplex
