// Where a block of keys and values comes from: rows of a tensor, or slots of pages that may be quantised.
#pragma once

#include "common/problem.h"
#include "cpu/kernels/score.h"

namespace duplex::DUPLEX_ISA {

template <class E>
constexpr bool QUANTISED = sizeof(E) == 1;

// Keys are packed in blocks of so many rows, one for each kv head.
#if defined(DUPLEX_MATRIX_UNIT)
constexpr int PACKED = 256;
#else
constexpr int PACKED = KEYS;
#endif

// The keys of one head of one sequence, as rows of a tensor.
template <class P, class E>
struct DenseKeys {
  const Problem& p;
  int64_t b, row_k, kv;

  static constexpr bool SCALED = false;

  int kv_heads() const { return 1; }
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

// What queries of type E meet in pages that hold elements of type S. Rows are packed straight from their slots,
// quantised numbers as they are (exact in any product's type); their scales go to scores and weights.
template <class P, class E, class S>
struct PagedKeys {
  const Problem& p;
  const Pages& pages;
  const int32_t* table;        // of the sequence
  int64_t kv, heads;           // the first kv head, and how many are read together, in the order of memory
  E* stage;                    // two rows of the larger head_dim
  int64_t prefix, begin, end;  // keys that some query sees: before prefix, and from begin to end

  static constexpr bool SCALED = QUANTISED<S>;

  // What no query sees may lie in pages that are no longer this sequence's: it is 0 here.
  bool seen(int64_t j) const { return j < prefix || (begin <= j && j < end); }

  // False also for keys that only prefix and window together cover.
  bool all_seen(int64_t j, int count) const { return j + count <= prefix || (begin <= j && j + count <= end); }

  // Calls act(n, rows, row of key j0 + n) for the runs of keys in [0, count) that lie in neighbouring slots.
  template <class Act>
  void each_run(const View& view, int64_t j0, int count, const Act& act) const {
    int64_t page = j0 / pages.page_size, slot = j0 % pages.page_size;
    for (int n = 0, rows; n < count; n += rows, ++page, slot = 0) {
      rows = int(clamp(pages.page_size - slot, 0, count - n));
      act(n, rows, view.at<S>(table[page], slot, kv));
    }
  }

  // Calls act(n, row of key j0 + n) for n in [0, count).
  template <class Act>
  void each_row(const View& view, int64_t j0, int count, const Act& act) const {
    each_run(view, j0, count, [&](int n, int rows, const S* from) {
      for (int r = 0; r < rows; ++r) act(n + r, from + r * view.row);
    });
  }

  // A row as the queries' type, converted to place n of `stage` where it is quantised.
  const E* converted(const S* from, int64_t j, int n, int dim) const {
    alignas(64) static const char zeros[1024] = {};  // a row of the largest head_dim
    if (!seen(j)) return (const E*)zeros;
    if constexpr (QUANTISED<S>) {
      E* to = stage + n * dim;
      int x = 0;
      for (; x + LANES <= dim; x += LANES) narrow(to + x, widen(from + x));
      if (x < dim) narrow_partial(to + x, widen_partial(from + x, dim - x), dim - x);
      return to;
    } else {
      return from;
    }
  }
  int kv_heads() const { return int(heads); }
  // Rows as stored, zeros from `count` on.
  void pack_rows(typename P::unit* to, int64_t units, const View& view, int dim, int64_t j0, int count,
                 int padded) const {
    each_run(view, j0, count, [&](int n, int rows, const S* from) {
      for (int64_t h = 0; h < heads; ++h) {
        typename P::unit* at = to + (h * PACKED + n) * units;
        const S* of_head = from + h * view.head;
        if constexpr (!SCALED)
          if (all_seen(j0 + n, rows)) {
            Pack<P>::rows(at, units, of_head, view.row, rows, rows, dim);
            continue;
          }
        for (int r = 0; r < rows; ++r)
          Pack<P>::rows(at + r * units, units, converted(of_head + r * view.row, j0 + n + r, 0, dim), 0, 1, 1, dim);
      }
    });
    for (int64_t h = 0; h < heads; ++h)
      memset(to + (h * PACKED + count) * units, 0, (padded - count) * units * sizeof(*to));
  }
  void pack_keys(typename P::unit* to, int64_t units, int64_t j0, int count, int padded) const {
    pack_rows(to, units, pages.k, int(p.head_dim), j0, count, padded);
  }
  void pack_values(typename P::unit* to, int64_t units, int64_t j0, int count, int padded) const {
    const int dim = int(p.head_dim_v);
    if constexpr (P::STEP == 1)
      pack_rows(to, units, pages.v, dim, j0, count, padded);
    else
      pack_pairs(to, units, dim, j0, count, padded);
  }
  // Two values to a unit.
  void pack_pairs(typename P::unit* to, int64_t units, int dim, int64_t j0, int count, int padded) const {
    const S* last = nullptr;
    const auto pack = [&](int n, const S* const* from, int rows) {
      for (int64_t h = 0; h < heads; ++h) {
        const E* of_head[2] = {};
        for (int r = 0; r < rows; ++r) of_head[r] = converted(from[r] + h * pages.v.head, j0 + n + r, r, dim);
        Pack<P>::unit_row(to + (h * PACKED + n) / 2 * units, units, of_head, rows, dim);
      }
    };
    each_row(pages.v, j0, count, [&](int n, const S* from) {
      const S* const both[2] = {n % 2 ? last : from, from};
      if (n % 2 || n == count - 1) pack(n / 2 * 2, both, n % 2 + 1);
      last = from;
    });
    const int packed = (count + 1) / 2;
    for (int64_t h = 0; h < heads; ++h)
      memset(to + (h * PACKED / 2 + packed) * units, 0, (padded / 2 - packed) * units * sizeof(*to));
  }
  void prefetch(int64_t j, int count) const {
    each_row(pages.k, j, count, [&](int, const S* row) { prefetch_rows(row, pages.k.head, int(heads), p.head_dim); });
    each_row(pages.v, j, count, [&](int, const S* row) { prefetch_rows(row, pages.v.head, int(heads), p.head_dim_v); });
  }

  // What the numbers of keys j0 .. j0 + count are worth; 0 where no query sees them and past the end.
  void scales(const ScaleView& view, int64_t kv, float* to, int64_t j0, int count, int padded) const {
    int64_t page = j0 / pages.page_size, slot = j0 % pages.page_size;
    for (int n = 0; n < count; ++page, slot = 0) {
      const float* at = view ? view.data + table[page] * view.page + slot * view.slot + kv * view.head : nullptr;
      for (; n < count && slot < pages.page_size; ++n, ++slot) {
        to[n] = !seen(j0 + n) ? 0.0f : at ? *at : 1.0f;
        if (at) at += view.slot;
      }
    }
    for (int n = count; n < padded; ++n) to[n] = 0;
  }
};

}  // namespace duplex::DUPLEX_ISA
