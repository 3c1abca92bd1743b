// What crosses into the kernels.
#pragma once

#include <stdint.h>

#include "cuda/distance_sums.h"
#include "cuda/lengths.h"
#include "cuda/row_sums.h"
#include "cuda/schedule.h"

namespace duplex {

// What makes a score out of <q, k> (docs/semantics.md); null where there is no such term.
struct Terms {
  float scale, softcap;
  const float* distance_bias;  // (heads_q, 2 * radius + 1)
  int32_t radius;
  const float* alibi_slopes;  // (heads_q,)
};

// 16-bit numbers by (batch, row, head, column), strides in elements; columns are contiguous.
struct Rows {
  void* data;
  int64_t batch, row, head;

  DUPLEX_HOST_DEVICE uint16_t* at(int64_t b, int64_t r, int64_t h) const {
    return static_cast<uint16_t*>(data) + b * batch + r * row + h * head;
  }
};

struct ForwardArguments {
  Lengths lengths;
  Terms terms;
  const float* sink;  // (heads_q,) or null
  int32_t heads_q, group, section, head_dim_v;
  Entries entries;
  Order order;

  void* out;  // 16-bit, (batch, row, head, head_dim_v) with strides in elements
  int64_t out_batch, out_row, out_head;
  float* lse;  // row stride 1
  int64_t lse_batch, lse_head;

  DUPLEX_HOST_DEVICE Tiles tiles() const { return {entries, order, heads_q, section}; }
  DUPLEX_HOST_DEVICE Rows rows() const { return {out, out_batch, out_row, out_head}; }
};

struct BackwardArguments {
  Lengths lengths;
  Terms terms;
  int32_t group, head_dim, head_dim_v;
  Tiles row_tiles, key_tiles;  // of dq, of dk and dv
  RowSums sums;
  Rows dq, dk, dv;
  DistanceSums distances;  // of the dq kernel, whose own result is not wanted where dq is null
  float* dq_sums;          // of the fused kernel: (head, padded row, its head_dim), in an order of its own; begin as 0
};

struct RowSumsArguments {
  Lengths lengths;
  int32_t heads, head_dim_v;
  Rows dout, out;
  const float *lse, *dlse;  // row stride 1; dlse may be null
  int64_t lse_batch, lse_head;
  RowSums sums;
  Rows copy;  // of dout, where bulk copies cannot read it, else null; its rows begin on 16 bytes
};

struct SinkArguments {
  Lengths lengths;
  const float* sink;
  RowSums sums;
  float* dsink;  // (heads,)
};

// Rows that belong to no sequence, of queries or of keys.
struct OutsideArguments {
  Lengths lengths;
  bool keys;
  int32_t heads, columns;
  Rows rows;   // become 0
  float* lse;  // becomes -inf; may be null
  int64_t lse_batch, lse_head;
};

}  // namespace duplex
