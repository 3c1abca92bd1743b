// What each instruction set offers to the host code. Everything here is plain data, so that a kernel compiled for one
// instruction set shares no inline code with another.
#pragma once

#include <stddef.h>

#include "common/problem.h"

namespace duplex {

struct ForwardTask {
  int32_t b, h;
  int64_t row;  // first query, counted in the sequence
  int32_t rows;
};

struct ForwardKernel {
  int tile;     // queries in a tile
  int queries;  // queries in a task at most: a multiple of tile
  size_t (*scratch)(const Problem&);
  void (*run)(const Problem&, const ForwardTask&, void* scratch);
};

struct Gradients {
  View dout, dq, dk, dv;
  float* delta;      // laid out as lse: rowsum(dout * out) - dlse
  float* dq_sum;     // set by the kernel
  float* ddistance;  // (batch, heads_q, 2 * radius + 1), or null
};

struct BackwardTask {
  int32_t b, h_kv;
  int64_t row_begin, row_end;  // queries
  int64_t key_begin, key_end;  // keys; key_begin is a multiple of key_block
  bool keys, queries;          // what this task writes: dk and dv, dq
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
  }
DUPLEX_DECLARE_ISA(portable)
DUPLEX_DECLARE_ISA(avx2)
DUPLEX_DECLARE_ISA(avx512)
DUPLEX_DECLARE_ISA(avx512_bf16)
#undef DUPLEX_DECLARE_ISA

}  // namespace duplex
