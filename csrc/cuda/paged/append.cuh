// A few lanes of a warp take a row: one head of one token, at most 8 numbers a lane.
#pragma once

#include <math.h>

#include "cuda/paged/append.h"
#include "cuda/paged/rope.cuh"
#include "cuda/paged/sequence.h"

namespace duplex::paged {

constexpr int APPEND_THREADS = 128, APPEND_NUMBERS = 8;
constexpr float INT8_LARGEST = 127, FLOAT8_LARGEST = 448;

// To nearest, ties to even; what is no number becomes 0, its scale tells.
DUPLEX_DEVICE uint8_t to_int8(float x) {
  return x != x ? 0 : uint8_t(int8_t(rintf(fminf(fmaxf(x, -INT8_LARGEST), INT8_LARGEST))));
}

// To the nearest float8_e4m3fn, ties to even, by whole numbers: for any card.
DUPLEX_DEVICE uint8_t to_float8(float x) {
  const uint32_t bits = ptx::bits_of(x), sign = bits >> 24 & 0x80, size = bits & 0x7FFFFFFF;
  const float magnitude = ptx::float_of(size);
  if (x != x) return uint8_t(sign | 0x7F);
  if (magnitude >= FLOAT8_LARGEST) return uint8_t(sign | 0x7E);
  if (magnitude < 0x1p-6f) return uint8_t(sign | uint32_t(int(rintf(magnitude * 512))));  // subnormal: m * 2^-9
  return uint8_t(sign | (((size + 0x7FFFF + (size >> 20 & 1)) >> 20) - (120 << 3)));      // three bits of mantissa stay
}

// The largest magnitude of `width` lanes' numbers, NaN if one is.
DUPLEX_DEVICE float largest_of(const float (&x)[APPEND_NUMBERS], int width) {
  float most = 0;
#pragma unroll
  for (int n = 0; n < APPEND_NUMBERS; ++n) {
    const float size = fabsf(x[n]);
    most = size > most || size != size ? size : most;
  }
  for (int mask = 1; mask < width; mask *= 2) {
    const float other = ptx::shuffle_xor(most, mask);
    most = other > most || other != other ? other : most;
  }
  return most;
}

template <class T, int COUNT>
DUPLEX_KERNEL(APPEND_THREADS)
append_kernel(DUPLEX_PARAMETER Append a, int width) {
  using Stored = typename T::Stored;
  const AppendSide& side = ptx::block_index() % 2 ? a.values : a.keys;
  const int thread = ptx::thread_index();
  const int64_t n = int64_t(ptx::block_index() / 2) * (APPEND_THREADS / width) + thread / width;
  const int64_t token = n / a.heads;
  const int head = int(n % a.heads);
  bool live = token < a.tokens;
  const int32_t position = live ? a.positions[token] : -1;
  const int64_t sequence = live && a.cu ? sequence_of(a.cu, token, a.batch) : token;
  live = live && sequence < a.batch && position >= 0 && position / a.page_size < a.max_pages;
  const int32_t page = live ? a.table[sequence * a.table_row + position / a.page_size] : -1;
  live = live && page >= 0 && page < a.num_pages;
  const int slot = live ? position % a.page_size : 0;

  const Stored* row = side.from.template at<Stored>(0, live ? token : 0, head);
  float x[APPEND_NUMBERS / COUNT][COUNT];
  float (&all)[APPEND_NUMBERS] = reinterpret_cast<float (&)[APPEND_NUMBERS]>(x);
#pragma unroll
  for (int c = 0; c < APPEND_NUMBERS / COUNT; ++c) {
    const int column = (c * width + thread % width) * COUNT;
#pragma unroll
    for (int e = 0; e < COUNT; ++e) x[c][e] = 0;
    if (live && column < side.dim) load_rotated<T>(row, column, position, side.rope, x[c]);
  }

  float worth = 1;
  if (a.storage != Storage::AS_QUERIES) {
    float* scale = const_cast<float*>(side.scales.data) + (live ? page : 0) * side.scales.page +
                   slot * side.scales.slot + head * side.scales.head;
    if (side.set_scales) {
      worth = largest_of(all, width) / (a.storage == Storage::INT8 ? INT8_LARGEST : FLOAT8_LARGEST);
      if (live && thread % width == 0) *scale = worth;
    } else if (live) {
      worth = *scale;
    }
  }
  if (!live) return;
#pragma unroll
  for (int c = 0; c < APPEND_NUMBERS / COUNT; ++c) {
    const int column = (c * width + thread % width) * COUNT;
    if (column >= side.dim) continue;
    if (a.storage == Storage::AS_QUERIES) {
      store_vector<T>(side.to.template at<Stored>(page, slot, head) + column, x[c]);
      continue;
    }
    Vector<uint8_t, COUNT> bytes;
#pragma unroll
    for (int e = 0; e < COUNT; ++e) {
      const float number = worth > 0 ? x[c][e] / worth : 0.f;
      bytes.number[e] = a.storage == Storage::INT8 ? to_int8(number) : to_float8(number);
    }
    *reinterpret_cast<Vector<uint8_t, COUNT>*>(side.to.template at<uint8_t>(page, slot, head) + column) = bytes;
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
