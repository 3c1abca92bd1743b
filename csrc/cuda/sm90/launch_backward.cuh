// What the launches of the backward kernels share.
#pragma once

#include <algorithm>

#include "cuda/device.cuh"
#include "cuda/sm90/gradients.cuh"
#include "cuda/sm90/variants.h"

#define DUPLEX_JOIN(a, b) a##b
#define DUPLEX_NAME(a, b) DUPLEX_JOIN(a, b)

namespace duplex::sm90 {

inline int blocks_of(const BackwardLaunch& l, const Tiles& tiles) {
  return int(std::min<int64_t>(tiles.entries.count(l.arguments.lengths) * tiles.heads, l.processors));
}

template <class S>
BackwardMaps maps_of(BackwardLaunch& l) {
  l.q.columns = l.dout.columns = S::Rows::PANEL;
  l.k.columns = l.v.columns = S::Keys::PANEL;
  l.q.rows = l.dout.rows = S::BLOCK_M;
  l.k.rows = l.v.rows = S::BLOCK_N;
  return {encode(l.q), encode(l.k), encode(l.v), encode(l.dout)};
}

}  // namespace duplex::sm90
