// A few lanes of a warp take the keys or the values of a token, some heads one after the other: where they go, and what
// turns them, is looked up once.
#pragma once

#include <math.h>

#include "cuda/lanes.cuh"
#include "cuda/paged/append.h"
#include "cuda/paged/rope.cuh"
#include "cuda/paged/sequence.h"

namespace duplex::paged {

constexpr int APPEND_THREADS = 128;

template <class T, Storage S>
using Kept = std::conditional_t<S == Storage::AS_QUERIES, typename T::Stored, uint8_t>;

template <Storage S>
constexpr float LARGEST = S == Storage::INT8 ? 127 : 448;

// To nearest, ties to even. Of int8, what is no number becomes 0, its scale tells; float8_e4m3fn by whole numbers, for
// any card.
template <Storage S>
DUPLEX_DEVICE uint8_t to_byte(float x) {
  constexpr float MOST = LARGEST<S>;
  if constexpr (S == Storage::INT8) {
    return x != x ? 0 : uint8_t(int8_t(rintf(fminf(fmaxf(x, -MOST), MOST))));
  } else {
    const uint32_t bits = ptx::bits_of(x), sign = bits >> 24 & 0x80, size = bits & 0x7FFFFFFF;
    const float magnitude = ptx::float_of(size);
    if (x != x) return uint8_t(sign | 0x7F);
    if (magnitude >= MOST) return uint8_t(sign | 0x7E);
    if (magnitude < 0x1p-6f) return uint8_t(sign | uint32_t(int(rintf(magnitude * 512))));  // subnormal: m * 2^-9
    return uint8_t(sign | (((size + 0x7FFFF + (size >> 20 & 1)) >> 20) - (120 << 3)));  // three bits of mantissa stay
  }
}

// Pairs of runs that a lane has, of a row of at most 256 numbers.
template <int COUNT>
constexpr int APPEND_PAIRS = COUNT > 1 ? 1 : 4;

// A lane's part of a row. Runs that turn about each other are a pair: they lie apart, or, where numbers are
// interleaved, side by side, as those do that do not turn.
template <class T, int COUNT>
struct AppendRow {
  static constexpr int PAIRS = APPEND_PAIRS<COUNT>;
  struct Loaded {
    Run<T, COUNT> run[PAIRS][2];
  };

  const AppendSide& side;
  const Lanes& lanes;
  int column[PAIRS][2];
  float x[PAIRS][2][COUNT], cos[PAIRS][COUNT], sin[PAIRS][COUNT];

  DUPLEX_DEVICE AppendRow(const AppendSide& side, const Lanes& lanes) : side(side), lanes(lanes) {
#pragma unroll
    for (int p = 0; p < PAIRS; ++p) {
      const bool apart = turns(p) && !side.rope.interleaved;
      column[p][0] = apart ? first(p) : 2 * first(p);
      column[p][1] = column[p][0] + (apart ? int(side.rope.reach) : COUNT);
    }
  }

  DUPLEX_DEVICE int first(int pair) const { return (pair * lanes.width() + lanes.lane()) * COUNT; }
  DUPLEX_DEVICE bool turns(int pair) const { return first(pair) < int(side.rope.reach); }

  // f(pair, half) of each run that the row has.
  template <class F>
  DUPLEX_DEVICE void each_run(F&& f) const {
#pragma unroll
    for (int p = 0; p < PAIRS; ++p)
#pragma unroll
      for (int h = 0; h < 2; ++h)
        if (column[p][h] < side.dim) f(p, h);
  }

  DUPLEX_DEVICE Loaded load(const typename T::Stored* from) const {
    Loaded loaded{};
    each_run([&](int p, int h) { loaded.run[p][h] = load_run<T, COUNT>(from + column[p][h]); });
    return loaded;
  }

  DUPLEX_DEVICE void load_rope(int32_t position) {
    const Rope& rope = side.rope;
    const int64_t last = rope.positions - 1, at = position < 0 ? 0 : position > last ? last : position;
#pragma unroll
    for (int p = 0; p < PAIRS; ++p) {
      if (!turns(p)) continue;
      load_floats(rope.cos + at * rope.reach + first(p), cos[p]);
      load_floats(rope.sin + at * rope.reach + first(p), sin[p]);
    }
  }

  // x is what was loaded, turned.
  DUPLEX_DEVICE void turn(const Loaded& loaded) {
#pragma unroll
    for (int p = 0; p < PAIRS; ++p) {
#pragma unroll
      for (int h = 0; h < 2; ++h) widen_run<T>(loaded.run[p][h], x[p][h]);
      if (!turns(p)) continue;
      float (&pair)[2 * COUNT] = reinterpret_cast<float (&)[2 * COUNT]>(x[p]);
      if (side.rope.interleaved)
#pragma unroll
        for (int n = 0; n < COUNT; ++n) paged::turn(pair[2 * n], pair[2 * n + 1], cos[p][n], sin[p][n]);
      else
#pragma unroll
        for (int n = 0; n < COUNT; ++n) paged::turn(pair[n], pair[COUNT + n], cos[p][n], sin[p][n]);
    }
  }

  // To numbers of the type, as if they had been turned before.
  DUPLEX_DEVICE void round() {
#pragma unroll
    for (int p = 0; p < PAIRS; ++p)
#pragma unroll
      for (int h = 0; h < 2; ++h) widen_run<T>(narrow_run<T>(x[p][h]), x[p][h]);
  }

  // The largest magnitude of the whole row, NaN if there is one.
  DUPLEX_DEVICE float largest() const {
    float most = 0;
    each_run([&](int p, int h) {
#pragma unroll
      for (int n = 0; n < COUNT; ++n) {
        const float size = fabsf(x[p][h][n]);
        most = size > most || size != size ? size : most;
      }
    });
    for (int mask = 1; mask < lanes.width(); mask *= 2) {
      const float other = ptx::shuffle_xor(most, mask);
      most = other > most || other != other ? other : most;
    }
    return most;
  }

  DUPLEX_DEVICE void store(typename T::Stored* to) const {
    each_run([&](int p, int h) { *reinterpret_cast<Run<T, COUNT>*>(to + column[p][h]) = narrow_run<T>(x[p][h]); });
  }

  template <Storage S>
  DUPLEX_DEVICE void store_bytes(uint8_t* to, float worth) const {
    each_run([&](int p, int h) {
      Vector<uint8_t, COUNT> bytes;
#pragma unroll
      for (int n = 0; n < COUNT; ++n) bytes.number[n] = to_byte<S>(worth > 0 ? x[p][h][n] / worth : 0.f);
      *reinterpret_cast<Vector<uint8_t, COUNT>*>(to + column[p][h]) = bytes;
    });
  }
};

struct Slot {
  int32_t position, page, slot;  // page -1: the token is skipped
};

DUPLEX_DEVICE Slot slot_of(const Append& a, int32_t token) {
  const Slot none{-1, -1, 0};
  if (token >= int32_t(a.tokens)) return none;
  const int32_t position = a.positions[token], sequence = a.cu ? sequence_of(a.cu, token, a.batch) : token;
  if (sequence >= a.batch || position < 0) return none;
  const int32_t n = int32_t(a.page_size.quotient(uint32_t(position)));
  if (n >= a.max_pages) return none;
  const int32_t page = a.table[sequence * a.table_row + n];
  return page < 0 || page >= a.num_pages ? none : Slot{position, page, position - n * int32_t(a.page_size.divisor)};
}

// Keys and values take turns, block by block, and so do the slices of their heads.
template <class T, Storage S, int COUNT>
DUPLEX_KERNEL_SHARING(APPEND_THREADS, S == Storage::AS_QUERIES ? 8 : 6)
append_kernel(DUPLEX_PARAMETER Append a, int log2_lanes, int slices) {
  const Lanes lanes(log2_lanes);
  const int block = ptx::block_index() / 2, slice = block % slices;
  const int32_t token = block / slices * (APPEND_THREADS >> log2_lanes) + lanes.row();
  const AppendSide& side = ptx::block_index() % 2 ? a.values : a.keys;
  AppendRow<T, COUNT> row(side, lanes);
  const auto* from = side.from.template at<typename T::Stored>(0, token < int32_t(a.tokens) ? token : 0, slice);
  auto next = row.load(from);
  const Slot slot = slot_of(a, token);
  const bool live = slot.page >= 0;
  row.load_rope(slot.position);
  auto* to = side.to.template at<Kept<T, S>>(slot.page, slot.slot, slice);
  for (int head = slice; head < a.heads; head += slices, to += slices * side.to.head) {
    const auto now = next;
    if (head + slices < a.heads) next = row.load(from += slices * side.from.head);
    row.turn(now);
    if constexpr (S == Storage::AS_QUERIES) {
      if (live) row.store(to);
    } else {
      row.round();
      float worth = 1, *scale = const_cast<float*>(side.scales.data) + slot.page * side.scales.page +
                                slot.slot * side.scales.slot + head * side.scales.head;
      if (side.set_scales) {
        worth = row.largest() / LARGEST<S>;
        if (live && lanes.lane() == 0) *scale = worth;
      } else if (live) {
        worth = *scale;
      }
      if (live) row.template store_bytes<S>(to, worth);
    }
  }
}

// The blocks of a page's copies follow one another; ids past the pool are skipped.
template <class Unit>
DUPLEX_KERNEL(APPEND_THREADS)
copy_kernel(DUPLEX_PARAMETER CopyPages c, int blocks) {
  const int n = ptx::block_index() / blocks, units = int(c.row_bytes / int64_t(sizeof(Unit)));
  const int64_t src = c.src[n], dst = c.dst[n], whole = int64_t(c.slots) * c.heads * units;
  if (src < 0 || src >= c.num_pages || dst < 0 || dst >= c.num_pages) return;
  for (int64_t at = int64_t(ptx::block_index() % blocks) * APPEND_THREADS + ptx::thread_index(); at < whole;
       at += int64_t(blocks) * APPEND_THREADS) {
    const int64_t row = at / units, unit = at % units;
    char* to = static_cast<char*>(c.data) + row / c.heads * c.slot + row % c.heads * c.head + unit * sizeof(Unit);
    *reinterpret_cast<Unit*>(to + dst * c.page) = *reinterpret_cast<const Unit*>(to + src * c.page);
  }
}

}  // namespace duplex::paged
