// The arrays that say to a step's kernels where each sequence lies.
#pragma once

#include <stdint.h>

#include <memory>
#include <vector>

#include "runtime/sequence.h"

namespace duplex::runtime {

// Where the arrays go, and how large they are. They may be larger than the batch (buffers that a CUDA graph keeps):
// sequences past it have no keys and no queries, tokens past it position -1.
struct BatchArrays {
  int64_t batch, max_pages, tokens;
  int32_t* block_table;   // (batch, max_pages)
  int32_t* seqlens_k;     // (batch,)
  int32_t* cu_seqlens_q;  // (batch + 1,)
  int32_t* positions;     // (tokens,)
};

// Row b computes tokens [start[b], end[b]) of its sequence, which the sequence is then committed to.
struct Batch {
  std::vector<std::shared_ptr<Sequence>> seqs;
  std::vector<int64_t> starts, ends;
  int64_t max_pages = 0, new_tokens = 0, max_seqlen_q = 0, max_seqlen_k = 0;

  void fill(const BatchArrays& arrays, int32_t page_size) const;
};

}  // namespace duplex::runtime
