// One sequence: its tokens, and the pages that hold their keys and values.
#pragma once

#include <stdint.h>

#include <vector>

#include "runtime/prefix_index.h"

namespace duplex::runtime {

class Cache;

constexpr int32_t UNKNOWN = -1;  // a token whose slot was reserved by count

enum class State : uint8_t { LIVE, SWAPPED, FREED };

// How much of the sequence is in the prefix index: the node of its `depth`-th page there. That page holds the same as
// the sequence's own page and may be another one, indexed first by a sequence of equal tokens.
struct Tip {
  Node node;
  uint32_t stamp = 0;  // of a page
  int64_t depth = 0;
};

struct Sequence {
  const Cache* owner = nullptr;
  State state = State::LIVE;
  size_t place = 0;             // among the sequences of the cache
  std::vector<int32_t> tokens;  // (length,)
  std::vector<int32_t> pages;   // (ceil(length / page_size),), none while swapped out
  int64_t committed = 0;        // leading tokens whose keys and values are written in all layers
  int64_t cached = 0;           // leading tokens that were there when the sequence came
  int64_t bidirectional_prefix = 0;
  Node root = 0;
  Tip tip{};
  uint64_t visit = 0;  // the last pass over many sequences that met this one

  int64_t length() const { return int64_t(tokens.size()); }
};

}  // namespace duplex::runtime
