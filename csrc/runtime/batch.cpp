#include "runtime/batch.h"

#include <algorithm>
#include <numeric>
#include <stdexcept>
#include <string>

namespace duplex::runtime {
namespace {

void require_room(const char* what, int64_t needed, int64_t room) {
  if (needed > room)
    throw std::invalid_argument("out: expected room for " + std::to_string(needed) + " " + what + ", got " +
                                std::to_string(room));
}

}  // namespace

void Batch::fill(const BatchArrays& arrays, int32_t page_size) const {
  require_room("sequences", int64_t(seqs.size()), arrays.batch);
  require_room("pages a sequence", max_pages, arrays.max_pages);
  require_room("new tokens", new_tokens, arrays.tokens);
  for (size_t b = 0; b < seqs.size(); ++b)
    if (int64_t(seqs[b]->pages.size()) * page_size < ends[b])
      throw std::invalid_argument("batch: expected sequences as they were when it was made, got one with fewer pages");
  int32_t *row = arrays.block_table, *position = arrays.positions, *offset = arrays.cu_seqlens_q;
  *offset++ = 0;
  for (size_t b = 0; b < seqs.size(); ++b, row += arrays.max_pages) {
    const int64_t pages = (ends[b] + page_size - 1) / page_size;
    std::copy_n(seqs[b]->pages.data(), pages, row);
    std::fill(row + pages, row + arrays.max_pages, 0);
    arrays.seqlens_k[b] = int32_t(ends[b]);
    const int64_t count = ends[b] - starts[b];
    std::iota(position, position + count, int32_t(starts[b]));
    position += count;
    *offset++ = int32_t(position - arrays.positions);
  }
  std::fill(row, arrays.block_table + arrays.batch * arrays.max_pages, 0);
  std::fill(arrays.seqlens_k + seqs.size(), arrays.seqlens_k + arrays.batch, 0);
  std::fill(offset, arrays.cu_seqlens_q + arrays.batch + 1, int32_t(new_tokens));
  std::fill(position, arrays.positions + arrays.tokens, -1);
}

}  // namespace duplex::runtime
