// What the launches over pages share.
#pragma once

#include <algorithm>

#include "cuda/device.cuh"
#include "cuda/sm90/paged.h"
#include "cuda/sm90/pages.cuh"

namespace duplex::sm90 {

template <class S>
PagedArguments arguments_of(const PagedLaunch& l, paged::Which which, int32_t units) {
  Box k = l.k, v = l.v;
  k.columns = v.columns = S::Keys::PANEL;
  return {l.call, {encode(k), encode(v), k.rows}, paged::Grid::of(l.call, S::BLOCK_M, which, units)};
}

// A plan's tiles are ranked, so blocks take one after the other; others the hardware hands out.
inline int blocks_of(const PagedLaunch& l, const paged::Grid& grid, int at_once) {
  return l.call.plan ? std::min(grid.shares(), at_once * l.processors) : grid.shares();
}

}  // namespace duplex::sm90
