// Scores and their online softmax, on accumulators as wgmma and mma.sync leave them: a thread has two rows, 8 apart, of
// which it holds columns 8 g + 2 (lane % 4) + {0, 1}. (Milakov and Gimelshein, "Online normalizer calculation for
// softmax", 2018.) Rows are queries and columns keys; with KEYS_DOWN the reverse.
//
// Where a score is nothing but a positive scale * <q, k> (no TERMS), scale * log2(e) is one factor in the exponent, and
// references are in units of log2; else scores and references are natural.
#pragma once

#include <math.h>

#include "cuda/work.cuh"

namespace duplex {

// Which of a thread's two rows an accumulator belongs to, and its column, less 2 * (lane % 4).
DUPLEX_DEVICE constexpr int row_of(int i) { return i / 2 % 2; }
DUPLEX_DEVICE constexpr int column_of(int i) { return i / 4 * 8 + i % 2; }
// How far its key lies behind its query, less the same of the thread's first accumulator; and its key alone.
template <bool KEYS_DOWN>
DUPLEX_DEVICE constexpr int distance_of(int i) {
  return KEYS_DOWN ? 8 * row_of(i) - column_of(i) : column_of(i) - 8 * row_of(i);
}
template <bool KEYS_DOWN>
DUPLEX_DEVICE constexpr int key_of(int i) {
  return KEYS_DOWN ? 8 * row_of(i) : column_of(i);
}

// To about 1 ulp, small arguments too: the polynomial is that of Cephes' tanhf.
DUPLEX_DEVICE float tanh(float x) {
  const float z = x * x, size = fabsf(x);
  float p = ptx::fma(-5.70498872745e-3f, z, 2.06390887954e-2f);
  p = ptx::fma(p, z, -5.37397155531e-2f);
  p = ptx::fma(p, z, 1.33314422036e-1f);
  p = ptx::fma(p, z, -3.33332819422e-1f);
  const float e = ptx::exp2(size * (-2 * LOG2E)), large = ptx::divide(1 - e, 1 + e);
  return size < 0.625f ? ptx::fma(p * z, x, x) : x < 0 ? -large : large;
}

// The first terms of a score on a block of products: scale and soft cap. What the cap multiplies the n-th gradient
// by goes to bend(n, factor).
template <int COUNT, class F>
DUPLEX_DEVICE void scale_and_cap(float (&x)[COUNT], const Terms& t, F&& bend) {
#pragma unroll
  for (int n = 0; n < COUNT; ++n) x[n] *= t.scale;
  if (t.softcap > 0) {
    const float inverse = 1 / t.softcap;
#pragma unroll
    for (int n = 0; n < COUNT; ++n) {
      const float y = tanh(x[n] * inverse);
      x[n] = y * t.softcap;
      bend(n, 1 - y * y);
    }
  }
}

// All of them; i and j are query and key of the thread's first number.
template <bool KEYS_DOWN, int COUNT, class F>
DUPLEX_DEVICE void add_terms(float (&x)[COUNT], const Terms& t, int head, int i, int j, int offset, F&& bend) {
  scale_and_cap(x, t, bend);
  const int distance = j - (i + offset);  // of the thread's first number
  if (t.distance_bias) {
    const float* middle = t.distance_bias + int64_t(head) * (2 * t.radius + 1) + t.radius;
#pragma unroll
    for (int n = 0; n < COUNT; ++n) x[n] += middle[clamp32(distance + distance_of<KEYS_DOWN>(n), -t.radius, t.radius)];
  }
  if (t.alibi_slopes) {
    const float slope = t.alibi_slopes[head];
#pragma unroll
    for (int n = 0; n < COUNT; ++n) x[n] -= slope * fabsf(float(distance + distance_of<KEYS_DOWN>(n)));
  }
}

// -inf where the span hides a key; i and j as above.
template <bool KEYS_DOWN, int COUNT>
DUPLEX_DEVICE void hide(float (&x)[COUNT], const Place& w, int i, int j) {
  const int live = w.len_k - j, prefix = w.prefix - j, place = i + w.offset - j;
  const int low = place - w.left, high = place + w.right;
#pragma unroll
  for (int n = 0; n < COUNT; ++n) {
    const int key = key_of<KEYS_DOWN>(n), distance = distance_of<KEYS_DOWN>(n);
    const bool seen = (key < live) & ((key < prefix) | ((low <= distance) & (distance <= high)));  // without branches
    x[n] = seen ? x[n] : -INFINITY;
  }
}

// Exponentials need not wait for anybody.
struct NoTurns {
  DUPLEX_DEVICE float take(float factor, bool) const { return factor; }
  DUPLEX_DEVICE void pass(bool) const {}
};

struct Softmax {
  float largest[2], total[2];  // total: of this thread's columns alone

  // A sink is a key with this score and no value; one lane of four has it.
  DUPLEX_DEVICE void start(const float* sink, int head, float unit, int quad_lane) {
    const float score = sink ? sink[head] / unit : -INFINITY;
    for (int r = 0; r < 2; ++r) {
      largest[r] = score;
      total[r] = quad_lane == 0 && score != -INFINITY ? 1.f : 0.f;
    }
  }

  // Scores to probabilities, relative to the largest score so far; `decay` is what earlier ones shrink by. Exponentials
  // are worked out between turns.take(factor, false), which returns the factor, and turns.pass(false): what these take
  // and return depends on what comes before, and what comes after on them, so that no compiler moves a score's
  // exponential across.
  template <bool MAY_BE_EMPTY, bool TERMS, int COUNT, class Turns = NoTurns>
  DUPLEX_DEVICE void next(float (&x)[COUNT], float log2_scale, float (&decay)[2], const Turns& turns = {}) {
    float of_columns[2][2] = {{x[0], x[1]}, {x[2], x[3]}}, reference[2];  // two chains a row
#pragma unroll
    for (int n = 4; n < COUNT; ++n) of_columns[row_of(n)][n % 2] = fmaxf(of_columns[row_of(n)][n % 2], x[n]);
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float most = fmaxf(of_columns[r][0], of_columns[r][1]);
      most = fmaxf(most, ptx::shuffle_xor(most, 1));
      most = fmaxf(most, ptx::shuffle_xor(most, 2));
      const float now = fmaxf(largest[r], TERMS ? most : most * log2_scale);
      reference[r] = MAY_BE_EMPTY && now == -INFINITY ? 0.f : now;
      decay[r] = ptx::exp2(TERMS ? (largest[r] - reference[r]) * LOG2E : largest[r] - reference[r]);
      largest[r] = now;
      total[r] *= decay[r];
    }
    const auto impossible = [](float x) { return ptx::bits_of(x) == 0x7F800001; };  // no maximum is this NaN
    const float factor = turns.take(TERMS ? LOG2E : log2_scale, impossible(largest[0]) | impossible(largest[1]));
#pragma unroll
    for (int n = 0; n < COUNT; ++n) {
      const float at = reference[row_of(n)];
      x[n] = ptx::exp2(TERMS ? (x[n] - at) * factor : ptx::fma(x[n], factor, -at));
      total[row_of(n)] += x[n];
    }
    turns.pass((total[0] < 0) | (total[1] < 0));
  }

  // What rows are multiplied by in the end, and their log-sum-exp.
  DUPLEX_DEVICE void finish(float unit, float (&weight)[2], float (&lse)[2]) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      total[r] += ptx::shuffle_xor(total[r], 1);
      total[r] += ptx::shuffle_xor(total[r], 2);
      const bool seen = total[r] != 0;
      weight[r] = seen ? 1 / total[r] : 0;
      lse[r] = seen ? largest[r] * unit + ptx::log2(total[r]) * LN2 : -INFINITY;
    }
  }
};

}  // namespace duplex
