// One attention call as plain data: what crosses from the torch operators into the kernels.
#pragma once

#include <stdint.h>

#include "common/span.h"

namespace duplex {

enum class DType : int32_t { FLOAT32, FLOAT16, BFLOAT16, BOOL };

// (batch, row, head, dim) with strides in elements; the last dimension is contiguous. Packed tensors have batch = 0.
struct View {
  void* data = nullptr;
  int64_t batch = 0, row = 0, head = 0;

  template <class T>
  DUPLEX_HOST_DEVICE T* at(int64_t b, int64_t r, int64_t h) const {
    return static_cast<T*>(data) + b * batch + r * row + h * head;
  }
};

struct BiasView {
  void* data = nullptr;
  DType dtype = DType::FLOAT32;
  int64_t batch = 0, head = 0, row = 0, col = 0;  // 0 where broadcast

  explicit operator bool() const { return data != nullptr; }
};

// A bias by row of a sequence and by distance, clamped: (batch, heads_q, rows, 2 * radius + 1).
struct RowTable {
  void* data = nullptr;
  DType dtype = DType::FLOAT32;
  int64_t batch = 0, head = 0, row = 0, entry = 0;  // strides
  int64_t radius = 0;

  explicit operator bool() const { return data != nullptr; }
};

// How the pages of a cache hold numbers: in the dtype of the queries, or quantised.
enum class Storage : int32_t { AS_QUERIES, INT8, FLOAT8_E4M3 };

// What a stored number is worth, float32 by (page, slot, head); strides are 0 where it is broadcast.
struct ScaleView {
  const float* data = nullptr;
  int64_t page = 0, slot = 0, head = 0;

  DUPLEX_HOST_DEVICE explicit operator bool() const { return data != nullptr; }
};

// Keys and values in pages: a View's batch is a page, its row a slot of the page.
struct Pages {
  View k, v;
  ScaleView k_scales, v_scales;
  Storage storage;
  const int32_t* table;  // (batch, table_row): key j lies in slot j % page_size of page table[b][j / page_size]
  int64_t table_row, page_size;
};

struct Rope {
  const float *cos = nullptr, *sin = nullptr;  // (positions, reach): pair x of the first 2 * reach dimensions turns
  int64_t positions = 0, reach = 0;
  bool interleaved = false;  // pairs are (2x, 2x + 1), else (x, x + reach)

  DUPLEX_HOST_DEVICE explicit operator bool() const { return cos != nullptr; }
};

struct Problem {
  DType dtype;
  int64_t batch, heads_q, heads_kv, head_dim, head_dim_v;
  int64_t rows_q, rows_k;  // per sequence at most (dense: exactly, before seqlens)
  View q, k, v, out;
  float* lse;
  int64_t lse_batch, lse_head;  // row stride is 1

  View parts;  // float32 partial results by slot and head, of a call whose keys are split
  float* parts_lse;
  int64_t parts_lse_head;

  const int32_t *cu_q, *cu_k, *len_q, *len_k, *start_q, *start_k, *prefix;  // each may be null
  int64_t left, right;
  bool top_left;

  BiasView bias;
  const float* distance_bias;  // (heads_q, 2 * radius + 1)
  int64_t radius;
  const float* alibi_slopes;  // (heads_q,)
  const float* sink;          // (heads_q,)
  RowTable row_distance_bias, col_distance_bias;

  float scale, softcap;
  bool dropout;
  uint64_t drop_below;  // a word below this is dropped
  float keep_scale;
  uint64_t seed;

  int64_t group() const { return heads_q / heads_kv; }
};

// Where sequence b lies. Rows are relative to the view's batch stride; bias indices are rows as stored.
struct Sequence {
  int64_t row_q, len_q, row_k, len_k, bias_row, bias_col;
  Span span;
};

inline int64_t clamp(int64_t x, int64_t low, int64_t high) { return x < low ? low : x > high ? high : x; }

inline Sequence sequence(const Problem& p, int64_t b) {
  Sequence s;
  if (p.cu_q) {
    s.row_q = p.cu_q[b];
    s.len_q = p.cu_q[b + 1] - s.row_q;
    s.row_k = p.cu_k[b];
    s.len_k = p.cu_k[b + 1] - s.row_k;
    s.bias_row = s.bias_col = 0;
  } else {
    s.row_q = s.bias_row = p.start_q ? clamp(p.start_q[b], 0, p.rows_q) : 0;
    s.len_q = clamp(p.len_q ? p.len_q[b] : p.rows_q, 0, p.rows_q - s.row_q);
    s.row_k = s.bias_col = p.start_k ? clamp(p.start_k[b], 0, p.rows_k) : 0;
    s.len_k = clamp(p.len_k ? p.len_k[b] : p.rows_k, 0, p.rows_k - s.row_k);
  }
  s.span.len_k = s.len_k;
  s.span.prefix = p.prefix ? clamp(p.prefix[b], 0, s.len_k) : 0;
  s.span.offset = p.top_left ? 0 : s.len_k - s.len_q;
  s.span.left = p.left;
  s.span.right = p.right;
  return s;
}

}  // namespace duplex
