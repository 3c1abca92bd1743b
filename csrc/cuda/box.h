// What a tensor map is made of: a tensor of 16-bit numbers and the box that one bulk copy brings.
#pragma once

#include <stdint.h>

namespace duplex {

struct Box {
  const void* data;   // on 16 bytes
  int64_t size[4];    // (head_dim, row, head, batch), each at least 1
  int64_t stride[4];  // in bytes; multiples of 16 but for the first, which is 2
  int columns, rows;  // of the box; its rows are swizzled, so columns are 64 or 32
};

}  // namespace duplex
