// What each instruction set offers to the host code. Everything here is plain data, so that a kernel compiled for one
// instruction set shares no inline code with another.
#pragma once

#include <stddef.h>

#include "common/problem.h"

namespace duplex {

// Queries of some heads, all of one kv head, against keys [key_begin, key_end) of their sequence.
struct ForwardTask {
  Sequence seq;
  int32_t b, h, heads;
  int32_t rows;  // of each head
  int64_t row;   // first query, counted in the sequence
  int64_t key_begin, key_end;
  int64_t slot;  // where its partial results begin in the problem's parts; -1: they are final
};

struct ForwardKernel {
  int tile;                                             // queries of one head in a tile
  int tiles;                                            // in a task at most
  size_t (*scratch)(const Problem&, int64_t heads_kv);  // for tasks of at most that many kv heads
  void (*run)(const Problem&, const Pages*, const ForwardTask&, void* scratch);  // no pages: keys are the problem's
};

// Few queries of whole kv heads: reads each page once, in order. It takes head dims that are multiples of `dims`.
struct DecodeKernel {
  int rows, dims;

  // Beyond them the forward kernel's tiles of queries cost less. A dense bias is added number by number here.
  int64_t most_rows(int64_t keys, bool bias) const {
    constexpr int64_t SHORT = 256;
    const int64_t most = keys < SHORT ? clamp(keys / 8, 4, 8) : rows;
    return bias ? most / 2 : most;
  }

  size_t (*scratch)(const Problem&, int64_t rows);
  void (*run)(const Problem&, const Pages&, const ForwardTask&, void* scratch);  // task.heads: of whole kv heads
};

// One row of final results from `count` partial ones; the sink joins here.
struct PartsKernel {
  void (*run)(const Problem&, int64_t row, const int64_t* slots, int count);
};

struct AppendProblem {
  DType dtype;
  Pages pages;
  View k, v;  // of the new tokens
  int64_t heads, head_dim, head_dim_v;
  Rope rope;
  bool set_k_scales, set_v_scales;  // a scale for each token and head: set here, not read
};

struct AppendKernel {
  void (*run)(const AppendProblem&, int64_t token, int64_t position, int64_t page, int64_t slot);
  void (*rotate)(const Rope&, DType, const void* from, void* to, int64_t head_dim, int64_t position);  // one head
};

struct Gradients {
  View dout, dq, dk, dv;
  float* delta;                           // laid out as lse: rowsum(dout * out) - dlse
  float* dq_sum;                          // set by the kernel
  float* ddistance;                       // (batch, heads_q, 2 * radius + 1), or null
  RowTable drow_distance, dcol_distance;  // contiguous, or not wanted
  float* row_ends;                        // set by the kernel
};

struct BackwardTask {
  int32_t b, h_kv;
  int64_t row_begin, row_end;  // queries
  int64_t key_begin, key_end;  // keys; key_begin is a multiple of key_block
  bool keys, queries;          // what this task writes: dk, dv and dcol_distance; dq and drow_distance
};

struct BackwardKernel {
  int tile, key_block;
  size_t (*scratch)(const Problem&, int64_t rows);  // for tasks of at most that many queries
  void (*delta)(const Problem&, const View& dout, const float* dlse, float* delta, int64_t b, int64_t h);
  void (*run)(const Problem&, const Gradients&, const BackwardTask&, void* scratch);
};

// The gradient of a dense bias. A task owns a part of it and sums over every call that reads this part.
struct BiasTask {
  int64_t b, h;                // indices into the bias: its own, or 0 where it is broadcast
  int64_t row_begin, row_end;  // rows as stored
  int64_t key_begin, key_end;  // columns as stored
};

struct BiasKernel {
  int rows, keys;  // of a task at most; the whole range where the bias is broadcast
  size_t (*scratch)(const Problem&);
  void (*run)(const Problem&, const Gradients&, const BiasView& dbias, const BiasTask&, void* scratch);
};

struct MergePart {
  View out;
  const float* lse;
  int64_t lse_batch, lse_head, lse_row;
};

struct MergeProblem {
  DType dtype;
  int count;
  const MergePart* parts;
  int64_t rows, dim;
  View out;
  float* lse;
  int64_t lse_batch, lse_head;  // row stride is 1
};

struct MergeKernel {
  void (*run)(const MergeProblem&, int64_t b, int64_t h);
};

#define DUPLEX_DECLARE_ISA(isa)         \
  namespace isa {                       \
  extern const ForwardKernel forward;   \
  extern const BackwardKernel backward; \
  extern const BiasKernel bias;         \
  extern const MergeKernel merge;       \
  extern const DecodeKernel decode;     \
  extern const PartsKernel parts;       \
  extern const AppendKernel append;     \
  }
DUPLEX_DECLARE_ISA(portable)
DUPLEX_DECLARE_ISA(avx2)
DUPLEX_DECLARE_ISA(avx512)
DUPLEX_DECLARE_ISA(avx512_bf16)
#undef DUPLEX_DECLARE_ISA

// By the matrix unit, bfloat16 alone; the rest is avx512_bf16's.
#define DUPLEX_DECLARE_MATRIX_ISA(isa)  \
  namespace isa {                       \
  extern const ForwardKernel forward;   \
  extern const BackwardKernel backward; \
  }
DUPLEX_DECLARE_MATRIX_ISA(amx)
DUPLEX_DECLARE_MATRIX_ISA(amx_emulated)
#undef DUPLEX_DECLARE_MATRIX_ISA

}  // namespace duplex
