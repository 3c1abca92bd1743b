// New keys and values on their way into the pages, and pages on their way into others.
#pragma once

#include "common/problem.h"
#include "cuda/divider.h"

namespace duplex::paged {

struct AppendSide {  // of keys, or of values
  View from;         // (token, head)
  View to;           // (page, slot, head)
  ScaleView scales;
  bool set_scales;  // one for each token and head; else they are read
  int32_t dim;
  Rope rope;
};

struct Append {
  AppendSide keys, values;
  DType dtype;
  Storage storage;
  const int32_t *table, *positions, *cu;  // cu null: one token a sequence
  int64_t table_row, tokens;
  int32_t heads, batch, max_pages, num_pages;
  Divider page_size;
  bool vectors;  // rows on 16 bytes, and no run of 16 bytes that ends inside what turns
};

void append(const Append& a, void* stream);

struct CopyPages {
  void* data;  // (page, slot, head) of rows, with strides in bytes
  int64_t page, slot, head;
  int64_t row_bytes;
  int32_t slots, heads, num_pages, count;
  const int32_t *src, *dst;
};

void copy_pages(const CopyPages& c, int processors, void* stream);

}  // namespace duplex::paged
