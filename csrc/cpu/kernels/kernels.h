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
  float* dq_sum;     // float32 accumulator of dq for the unit at hand, (group, len_q, head_dim), or null
  float* ddistance;  // (batch, heads_q, 2 * radius + 1), or null
};

struct BackwardTask {
  int32_t b, h_kv;
  int64_t row_begin, row_end;  // queries
  int64_t key_begin, key_end;  // keys; key_begin a multiple of the key block
  bool keys, queries;          // which gradients this task writes: dk and dv, dq
};

struct BackwardKernel {
  int tile, key_block;
  size_t (*scratch)(const Problem&);
  void (*delta)(const Problem&, const View& dout, const float* dlse, float* delta, int64_t b, int64_t h);
  void (*run)(const Problem&, const Gradients&, const BackwardTask&, void* scratch);
};

// The gradient of a bias, one slice at a time: see backward_bias.cpp.
struct BiasTask {
  int64_t b_begin, b_end, h_begin, h_end;  // the calls that share the slice
};

struct BiasGradient {
  void* data;
  int64_t batch, head, row, col;  // strides, 0 where the bias is broadcast
};

struct BiasKernel {
  size_t (*scratch)(const Problem&);
  void (*run)(const Problem&, const Gradients&, const BiasGradient&, const BiasTask&, void* scratch);
};

#define DUPLEX_DECLARE_ISA(isa)       \
  namespace isa {                     \
  extern const ForwardKernel forward; \
  }
DUPLEX_DECLARE_ISA(portable)
DUPLEX_DECLARE_ISA(avx2)
DUPLEX_DECLARE_ISA(avx512)
DUPLEX_DECLARE_ISA(avx512_bf16)
#undef DUPLEX_DECLARE_ISA

}  // namespace duplex
