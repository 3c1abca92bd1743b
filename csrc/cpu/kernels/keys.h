// Where a block of keys and values comes from: rows of a tensor, or slots of pages that may be quantised.
#pragma once

#include "common/problem.h"
#include "cpu/kernels/pack.h"

namespace duplex::DUPLEX_ISA {

template <class E>
constexpr bool QUANTISED = sizeof(E) == 1;

// The keys of one head of one sequence, as rows of a tensor.
template <class P, class E>
struct DenseKeys {
  const Problem& p;
  int64_t b, row_k, kv;

  static constexpr bool SCALED = false;

  void pack_keys(typename P::unit* to, int64_t units, int64_t j0, int count, int padded) const {
    Pack<P>::rows(to, units, p.k.at<E>(b, row_k + j0, kv), p.k.row, count, padded, int(p.head_dim));
  }
  void pack_values(typename P::unit* to, int64_t units, int64_t j0, int count, int padded) const {
    Pack<P>::pairs(to, units, p.v.at<E>(b, row_k + j0, kv), p.v.row, count, padded, int(p.head_dim_v));
  }
  void prefetch(int64_t j, int count) const {
    prefetch_rows(p.k.at<E>(b, row_k + j, kv), p.k.row, count, p.head_dim);
    prefetch_rows(p.v.at<E>(b, row_k + j, kv), p.v.row, count, p.head_dim_v);
  }
};

// What queries of type E meet in pages that hold elements of type S. A block is gathered row by row into `stage`,
// quantised numbers as they are (exact in any product's type); their scales go to scores and weights.
template <class P, class E, class S>
struct PagedKeys {
  const Problem& p;
  const Pages& pages;
  const int32_t* table;  // of the sequence
  int64_t kv;
  E* stage;                    // KEYS rows of the larger head_dim
  int64_t prefix, begin, end;  // keys that some query sees: before prefix, and from begin to end

  static constexpr bool SCALED = QUANTISED<S>;

  const S* row(const View& view, int64_t j) const {
    return view.at<S>(table[j / pages.page_size], j % pages.page_size, kv);
  }

  // What no query sees may lie in pages that are no longer this sequence's: it is 0 here.
  bool seen(int64_t j) const { return j < prefix || (begin <= j && j < end); }

  void gather(const View& view, int64_t j0, int count, int dim) const {
    for (int n = 0; n < count; ++n) {
      E* to = stage + n * dim;
      if (!seen(j0 + n)) {
        memset(to, 0, dim * sizeof(E));
        continue;
      }
      const S* from = row(view, j0 + n);
      if constexpr (QUANTISED<S>) {
        int x = 0;
        for (; x + LANES <= dim; x += LANES) narrow(to + x, widen(from + x));
        if (x < dim) narrow_partial(to + x, widen_partial(from + x, dim - x), dim - x);
      } else {
        memcpy(to, from, dim * sizeof(E));
      }
    }
  }
  void pack_keys(typename P::unit* to, int64_t units, int64_t j0, int count, int padded) const {
    const int dim = int(p.head_dim);
    gather(pages.k, j0, count, dim);
    Pack<P>::rows(to, units, stage, dim, count, padded, dim);
  }
  void pack_values(typename P::unit* to, int64_t units, int64_t j0, int count, int padded) const {
    const int dim = int(p.head_dim_v);
    gather(pages.v, j0, count, dim);
    Pack<P>::pairs(to, units, stage, dim, count, padded, dim);
  }
  void prefetch(int64_t j, int count) const {
    for (int n = 0; n < count; ++n) {
      prefetch_rows(row(pages.k, j + n), 0, 1, p.head_dim);
      prefetch_rows(row(pages.v, j + n), 0, 1, p.head_dim_v);
    }
  }

  // What the numbers of keys j0 .. j0 + count are worth; 0 where no query sees them and past the end.
  void scales(const ScaleView& view, float* to, int64_t j0, int count, int padded) const {
    for (int n = 0; n < padded; ++n) {
      const int64_t j = j0 + n, page = n < count ? table[j / pages.page_size] : 0;
      to[n] = n >= count || !seen(j) ? 0.0f
              : view                 ? view.data[page * view.page + j % pages.page_size * view.slot + kv * view.head]
                                     : 1.0f;
    }
  }
};

}  // namespace duplex::DUPLEX_ISA
