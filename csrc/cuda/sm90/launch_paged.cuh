// What the launches over pages share.
#pragma once

#include <algorithm>

#include "cuda/device.cuh"
#include "cuda/sm90/paged.h"
#include "cuda/sm90/pages.cuh"

namespace duplex::sm90 {

template <class Keys>
PagedArguments arguments_of(const PagedLaunch& l, paged::Which which, int32_t units) {
  Box k = l.k, v = l.v;
  k.columns = v.columns = Keys::PANEL;
  return {l.call, {encode(k), encode(v), k.rows}, which, units};
}

// A plan's tiles are ranked, so blocks take one after the other; others the hardware hands out.
inline int blocks_of(const PagedLaunch& l, int32_t units, int tile_rows, int at_once) {
  const int shares = units * l.call.heads_kv * paged::packing(l.call.group(), tile_rows).chunks;
  return l.call.plan ? std::min(shares, at_once * l.processors) : shares;
}

}  // namespace duplex::sm90
