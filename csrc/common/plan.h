// How a step of paged attention is cut into tiles: once a step, from lengths and block tables on the host, for every
// layer. Plain rows of eight int32, so that a plan is one tensor that a CUDA graph can keep. It has at least as many
// rows as slots: a GPU's workspace follows from its shape alone.
#pragma once

#include <stdint.h>

#include <algorithm>
#include <stdexcept>
#include <string>
#include <vector>

#include "common/span.h"

namespace duplex {

// The tile's rows against the tile's keys, for every head.
struct PlanTile {
  int32_t sequence;            // whose row of the block table leads to the keys
  int32_t row_begin, row_end;  // packed queries; of several sequences where the keys are a prefix that they share
  int32_t key_begin, key_end;
  int32_t slot;  // where the partial results of its rows begin; -1: they are final
  int32_t shared;
  int32_t unused;
};

// Rows whose results lie in parts: part n of row r is at slot + n * stride + (r - row_begin), for each of two runs.
struct PlanMerge {
  int32_t row_begin, row_end;
  int32_t shared_slot, shared_count, shared_stride;
  int32_t own_slot, own_count, unused;  // the stride of a sequence's own parts is row_end - row_begin
};

// The first row of a plan.
struct PlanHeader {
  int32_t tiles, merges, slots, rows;  // slots: rows of partial results; rows: packed queries that belong to a sequence
  int32_t batch;
  int32_t shared;       // tiles of rows that see all of their keys: not for calls with a bias or distance terms
  int32_t fixed_split;  // as in PlanOptions
  int32_t fingerprint;  // of the lengths, prefixes and the window that it was made for
};
static_assert(sizeof(PlanTile) == 32 && sizeof(PlanMerge) == 32 && sizeof(PlanHeader) == 32);

struct Plan {
  PlanHeader header{};
  std::vector<PlanTile> tiles;
  std::vector<PlanMerge> merges;
};

// The batch as the host sees it; tables and lengths as in paged_attention.
struct PlanBatch {
  int64_t batch, page_size, table_row;
  const int32_t *seqlens_k, *cu_q, *prefix, *table;  // cu_q null: one row a sequence; prefix may be null
  int64_t left, right;
  bool top_left;

  int64_t row(int64_t b) const { return cu_q ? cu_q[b] : b; }
  Span span(int64_t b) const {
    const int64_t len_k = seqlens_k[b], len_q = row(b + 1) - row(b);
    const int64_t seen = prefix ? std::clamp<int64_t>(prefix[b], 0, len_k) : 0;
    return {len_k, seen, top_left ? 0 : len_k - len_q, left, right};
  }
};

inline int32_t fingerprint(const PlanBatch& p) {
  uint32_t hash = 2166136261u;  // FNV-1a over words
  const auto add = [&](int64_t x) { hash = (hash ^ uint32_t(x) ^ uint32_t(x >> 32)) * 16777619u; };
  for (int64_t x : {p.page_size, p.left, p.right, int64_t(p.top_left)}) add(x);
  for (int64_t b = 0; b < p.batch; ++b) {
    add(p.seqlens_k[b]);
    add(p.row(b + 1));
    add(p.prefix ? p.prefix[b] : 0);
  }
  return int32_t(hash);
}

struct PlanOptions {
  int64_t block_rows;       // of a tile at most
  int64_t workers;          // tiles that run at once
  int64_t fixed_split = 0;  // keys of every part, counted from key 0; 0: as many parts as keep the workers busy
  int64_t shared_rows = 0;  // rows from which a shared prefix is worth a tile of its own; 0: never
  int64_t shared_by_few = UNBOUNDED;  // keys from which it is for fewer rows too
};

constexpr int64_t FIXED_SPLIT = 2048;  // keys of a part where parts must not depend on the batch, in any backend
constexpr int64_t LEAST_SPLIT = 512;   // keys: below it, a merge costs more than it gains
constexpr int64_t LEAST_SHARED = 256;  // keys of a prefix worth a tile of its own
constexpr int64_t PART_STEP = 64;      // keys: parts begin this many apart, so that kernels read runs of slots
constexpr int64_t TILES_A_WORKER = 4;  // so that the longest leaves little idling at the end

namespace plan_detail {

// Keys that some row of [i0, i1) of the sequence may see, from a multiple of PART_STEP on.
struct KeyRange {
  int64_t begin, end;
};
inline KeyRange visible_keys(const Span& span, int64_t i0, int64_t i1) {
  const int64_t end = std::clamp<int64_t>(std::max(span.last(i1 - 1) + 1, span.prefix), 0, span.len_k);
  const int64_t begin = std::min(span.next(i0, i1, 0), end) / PART_STEP * PART_STEP;
  return {begin, end};
}

// Sequences from b on that start with the same full pages, all of whose rows see all of those keys.
struct Group {
  int64_t count, keys;
};
inline Group shared_prefix(const PlanBatch& p, int64_t b) {
  Group best{1, 0};
  const auto all_seen = [&](int64_t s) -> int64_t {  // leading keys that every row of s sees
    const Span span = p.span(s);
    const int64_t rows = p.row(s + 1) - p.row(s);
    if (rows <= 0 || span.first(rows - 1) > 0) return span.prefix;
    return std::clamp<int64_t>(std::max(span.last(0) + 1, span.prefix), 0, span.len_k);
  };
  int64_t pages = all_seen(b) / p.page_size;
  const int32_t* first = p.table + b * p.table_row;
  for (int64_t s = b + 1; s < p.batch && pages > 0; ++s) {
    const int32_t* row = p.table + s * p.table_row;
    const int64_t limit = std::min(pages, all_seen(s) / p.page_size);
    const int64_t same = std::mismatch(first, first + limit, row).first - first;
    if (same * p.page_size < LEAST_SHARED) break;
    if (same * (s - b) * p.page_size < best.keys * (best.count - 1))
      break;  // one more sequence would cost the others more of their prefix than it gains
    pages = same;
    best = {s - b + 1, same * p.page_size};
  }
  return best;
}

}  // namespace plan_detail

inline Plan make_plan(const PlanBatch& p, const PlanOptions& options) {
  using namespace plan_detail;
  struct Shared {
    int64_t sequence, row_begin, row_end, keys, slot, parts;
  };
  struct Block {
    int64_t sequence, row_begin, row_end, group;  // of `shared`, or -1
    KeyRange keys;
    int64_t parts;
    bool is_final() const { return group < 0 && parts <= 1; }
  };
  std::vector<Shared> shared;
  std::vector<Block> blocks;
  int64_t total = 0;
  for (int64_t b = 0; b < p.batch;) {
    Group group = options.shared_rows > 0 ? shared_prefix(p, b) : Group{1, 0};
    const bool worth = group.count > 1 && (p.row(b + group.count) - p.row(b) >= options.shared_rows ||
                                           group.keys >= options.shared_by_few);
    if (!worth) group = {1, 0};
    if (worth) {
      shared.push_back({b, p.row(b), p.row(b + group.count), group.keys, 0, 0});
      total += group.keys;
    }
    for (const int64_t end = b + group.count; b < end; ++b) {
      const Span span = p.span(b);
      const int64_t first = p.row(b), rows = p.row(b + 1) - first;
      for (int64_t i = 0; i < rows; i += options.block_rows) {
        const int64_t i1 = std::min(rows, i + options.block_rows);
        KeyRange keys = visible_keys(span, i, i1);
        keys.begin = std::max(keys.begin, group.keys);
        keys.end = std::max(keys.end, keys.begin);
        total += keys.end - keys.begin;
        blocks.push_back({b, first + i, first + i1, worth ? int64_t(shared.size()) - 1 : -1, keys, 0});
      }
    }
  }

  const int64_t even = total / std::max<int64_t>(options.workers * TILES_A_WORKER, 1);
  const int64_t split = options.fixed_split ? options.fixed_split : std::max(LEAST_SPLIT, even);
  const auto step_of = [&](KeyRange keys) {
    const int64_t parts = std::max<int64_t>(1, (keys.end - keys.begin + split / 2) / split);
    return ((keys.end - keys.begin + parts - 1) / parts + PART_STEP - 1) / PART_STEP * PART_STEP;
  };
  const auto parts_of = [&](KeyRange keys) -> int64_t {
    if (keys.begin == keys.end) return 0;
    if (options.fixed_split) return (keys.end - 1) / split - keys.begin / split + 1;
    return (keys.end - keys.begin + step_of(keys) - 1) / step_of(keys);
  };
  const auto cut = [&](KeyRange keys, auto&& part) {
    const int64_t step = step_of(keys);
    for (int64_t j = keys.begin, end; j < keys.end; j = end) {
      end = std::min(keys.end, options.fixed_split ? (j / split + 1) * split : j + step);
      part(int32_t(j), int32_t(end));
    }
  };

  int64_t most = 0;  // slots, before any is written down in 32 bits
  for (Shared& s : shared) {
    s.parts = parts_of({0, s.keys});
    most += s.parts * (s.row_end - s.row_begin);
  }
  for (Block& b : blocks) {
    b.parts = parts_of(b.keys);
    if (!b.is_final()) most += b.parts * (b.row_end - b.row_begin);
  }
  if (most > INT32_MAX)
    throw std::invalid_argument(
        "q: expected at most 2147483647 rows of partial results, by fewer new tokens a call, got " +
        std::to_string(most));

  Plan plan;
  int64_t slots = 0;
  for (Shared& s : shared) {
    const int64_t rows = s.row_end - s.row_begin;
    s.slot = slots;
    cut({0, s.keys}, [&](int32_t begin, int32_t end) {
      for (int64_t r = s.row_begin; r < s.row_end; r += options.block_rows)
        plan.tiles.push_back({int32_t(s.sequence), int32_t(r), int32_t(std::min(s.row_end, r + options.block_rows)),
                              begin, end, int32_t(slots + r - s.row_begin), 1, 0});
      slots += rows;
    });
  }
  for (const Block& b : blocks) {
    const int32_t first = int32_t(slots);
    const auto add = [&](int32_t begin, int32_t end) {
      plan.tiles.push_back({int32_t(b.sequence), int32_t(b.row_begin), int32_t(b.row_end), begin, end,
                            b.is_final() ? -1 : int32_t(slots), 0, 0});
      if (!b.is_final()) slots += b.row_end - b.row_begin;
    };
    cut(b.keys, add);
    if (b.is_final() && b.parts == 0) add(0, 0);  // rows that see nothing are written too
    if (b.is_final()) continue;
    PlanMerge merge{int32_t(b.row_begin), int32_t(b.row_end), 0, 0, 0, first, int32_t(b.parts), 0};
    if (b.group >= 0) {
      const Shared& s = shared[b.group];
      merge.shared_slot = int32_t(s.slot + b.row_begin - s.row_begin);
      merge.shared_count = int32_t(s.parts);
      merge.shared_stride = int32_t(s.row_end - s.row_begin);
    }
    plan.merges.push_back(merge);
  }
  const auto cost = [](const PlanTile& t) { return int64_t(t.row_end - t.row_begin + 4) * (t.key_end - t.key_begin); };
  std::stable_sort(plan.tiles.begin(), plan.tiles.end(),
                   [&](const PlanTile& a, const PlanTile& b) { return cost(a) > cost(b); });
  plan.header = {int32_t(plan.tiles.size()),
                 int32_t(plan.merges.size()),
                 int32_t(slots),
                 int32_t(p.row(p.batch)),
                 int32_t(p.batch),
                 0,
                 int32_t(options.fixed_split),
                 fingerprint(p)};
  for (const PlanTile& tile : plan.tiles) plan.header.shared += tile.shared;
  return plan;
}

}  // namespace duplex
