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

// The thread's rows i and i + 8 of a tile, times their weight; rows from len_q on belong to others.
template <class T, int COUNT>
DUPLEX_DEVICE void store_rows(const ForwardArguments& a, const Work& w, const float (&out)[COUNT], int i, int quad_lane,
                              const float (&weight)[2], const float (&lse)[2]) {
  const bool packed = a.lengths.cu_q != nullptr, whole = a.head_dim_v % 8 == 0;
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const bool live = i + 8 * r < w.len_q;
    const int64_t row = w.row_q + i + 8 * r, batch = packed ? 0 : w.batch;
    uint16_t* to = static_cast<uint16_t*>(a.out) + batch * a.out_batch + row * a.out_row + w.head * a.out_head;
#pragma unroll
    for (int g = 0; g < COUNT / 16; ++g) {  // 32 columns
      uint32_t words[4];
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const float* x = out + 4 * (4 * g + j) + 2 * r;
        words[j] = ptx::pack<T>(x[0] * weight[r], x[1] * weight[r]);
      }
      if (whole) {
        transpose_quad(words, quad_lane);
        const int column = 32 * g + 8 * quad_lane;
        if (live && column < a.head_dim_v)
          *reinterpret_cast<Words4*>(to + column) = {words[0], words[1], words[2], words[3]};
      } else if (live) {
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          const int column = 32 * g + 8 * j + 2 * quad_lane;
          if (column < a.head_dim_v) to[column] = uint16_t(words[j]);
          if (column + 1 < a.head_dim_v) to[column + 1] = uint16_t(words[j] >> 16);
        }
      }
    }
    if (live && quad_lane == 0) a.lse[batch * a.lse_batch + w.head * a.lse_head + row] = lse[r];
  }
}

}  // namespace duplex
