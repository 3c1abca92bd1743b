// paged_attention: divides the step, describes it to the kernels.
#include <algorithm>
#include <numeric>
#include <stdexcept>

#include "cuda/call.h"
#include "cuda/device.h"
#include "cuda/operators.h"
#include "cuda/paged/attend.h"
#include "cuda/sm90/paged.h"

namespace duplex {
namespace paged {

extern const Attention ATTENTION_64, ATTENTION_128, ATTENTION_256;

const Attention& attention(int64_t head_dim) {
  for (const Attention* a : {&ATTENTION_64, &ATTENTION_128, &ATTENTION_256})
    if (head_dim <= a->head_dim) return *a;
  throw std::invalid_argument("the CUDA kernels take a head_dim of at most 256");
}

namespace {

// What a tile costs besides its keys, and what the merge of parts does, in keys that a tile reads meanwhile.
constexpr int64_t START_COST = 96, MERGE_COST = 128, PART_COST = 4;

// All rows of a sequence and their heads fill no more than the small tile. Not where bits must not depend on how many
// there are.
bool is_small(const PagedArguments& p, const Call& c) {
  return p.max_seqlen_q * c.group <= SMALL_ROWS && !p.batch_invariant;
}

// How many slots of a page a bulk copy brings, so that boxes fill pages and blocks of keys, and parts begin with one; 0
// where it brings none: rows of a swizzled tile come by eights, and bytes by twos. Strides of scales take 32 bits
// there.
int box_rows(const Call& c, const sm90::PagedVariant& v) {
  const bool odd = c.pages.storage != Storage::AS_QUERIES && (c.head_dim % 2 || c.head_dim_v % 2);
  const int64_t rows = std::gcd(std::gcd(c.pages.page_size, v.block_n), 64);
  const auto fits = [](const ScaleView& s) { return std::max({s.page, s.slot, s.head}) <= INT32_MAX; };
  const bool near = fits(c.pages.k_scales) && fits(c.pages.v_scales);
  return c.num_pages > 0 && rows >= 8 && !odd && near ? int(rows) : 0;
}

// What runs tiles: a kernel of every card, or one of Hopper's.
struct Chosen {
  const sm90::PagedVariant* hopper;  // or null
  int tile_rows, block_n, box_rows;
  int blocks;  // on a multiprocessor at once
};
Chosen choose(const Call& c, const Attention& of_every_card, bool small, int capability) {
  if (capability == 90 && (small || c.pages.storage == Storage::AS_QUERIES)) {
    const int64_t head_dim = std::max(c.head_dim, c.head_dim_v);
    const sm90::PagedVariant& v =
        small ? sm90::decode_variant(head_dim, c.pages.storage) : sm90::paged_variant(head_dim);
    if (const int rows = box_rows(c, v)) return {&v, v.block_m, v.block_n, rows, v.blocks};
  }
  const int rows = small ? SMALL_ROWS : LARGE_ROWS;
  return {nullptr, rows, of_every_card.block_n(c.pages.storage, rows), 0, 2};
}

// Parts of the keys by which tiles end soonest, of which the card does so many at once.
int64_t splits_of(int64_t tiles, int64_t longest, int64_t at_once) {
  const int64_t most = std::clamp<int64_t>((longest + LEAST_SPLIT - 1) / LEAST_SPLIT, 1, at_once);
  int64_t best = 1, least = INT64_MAX;
  for (int64_t splits = 1; splits <= most; ++splits) {
    const int64_t rounds = (tiles * splits + at_once - 1) / at_once;
    const int64_t cost = rounds * (longest / splits + START_COST) + (splits > 1 ? MERGE_COST + PART_COST * splits : 0);
    if (cost < least) best = splits, least = cost;
  }
  return best;
}

// What follows from shapes alone.
Division divide(const PagedArguments& p, const Call& c, const Chosen& by, int processors) {
  const Packing pack = packing(c.group, by.tile_rows);
  const int64_t blocks = (p.max_seqlen_q + pack.rows - 1) / pack.rows;
  const int64_t tiles = std::max<int64_t>(1, c.batch.batch * blocks * c.heads_kv * pack.chunks);
  const int64_t longest = c.batch.longest;
  const int64_t splits =
      p.batch_invariant ? (longest + FIXED_SPLIT - 1) / FIXED_SPLIT : splits_of(tiles, longest, by.blocks * processors);
  return {Divider::of(std::max<int64_t>(blocks, 1)), Divider::of(std::max<int64_t>(splits, 1)), pack.rows,
          Divider::of(by.block_n), p.batch_invariant};
}

Call describe(const PagedArguments& p) {
  const int64_t longest = p.k_pages.size(0) ? p.block_table.size(1) * p.k_pages.size(1) : 0;
  expect(p.q.size(0) < FAR && longest < FAR && p.k_pages.size(0) < FAR, "at most 2^29 rows, keys and pages");
  Call c{};
  c.batch = {static_cast<const int32_t*>(p.seqlens_k.const_data_ptr()),
             data<int32_t>(p.cu_seqlens_q),
             data<int32_t>(p.prefix),
             int32_t(p.block_table.size(0)),
             int32_t(p.q.size(0)),
             int32_t(std::min<int64_t>(p.max_seqlen_q, p.q.size(0))),
             int32_t(longest),
             bound_of(p.left),
             bound_of(p.right),
             p.top_left};
  c.q = view(p.q);
  c.out = view(p.out);
  c.lse = static_cast<float*>(p.lse.data_ptr());
  c.pages = pages_of(p.k_pages, p.v_pages, p.k_scales, p.v_scales, p.block_table);
  expect(c.pages.page_size < FAR, "pages of fewer than 2^29 slots");
  c.page_size = Divider::of(std::max<int64_t>(c.pages.page_size, 1));
  c.rope = rope_of(p.rope_cos, p.rope_sin, p.rope_interleaved);
  c.terms = terms_of(p.q.size(2), p.scale, p.softcap, p.distance_bias, p.alibi_slopes);
  c.sink = data<float>(p.sink);
  c.num_pages = int32_t(p.k_pages.size(0));
  c.heads_q = int32_t(p.q.size(1));
  c.heads_kv = int32_t(p.k_pages.size(2));
  c.group = c.heads_kv ? c.heads_q / c.heads_kv : 1;
  c.head_dim = int32_t(p.q.size(2));
  c.head_dim_v = int32_t(p.v_pages.size(3));
  const int64_t turning = p.rope_interleaved ? 2 * c.rope.reach : c.rope.reach;
  c.q_vectors = aligned(p.q, 16) && c.head_dim % 8 == 0 && turning % 8 == 0;
  c.out_vectors = aligned(p.out, 16) && c.head_dim_v % 8 == 0;
  return c;
}

}  // namespace
}  // namespace paged

void paged_attention(DUPLEX_PAGED_PARAMETERS) {
  using namespace paged;
  block_table = table_of(block_table);
  const PagedArguments p DUPLEX_PAGED_ARGUMENTS;
  const bool bfloat16 = is_bfloat16(q);
  expect(!bias, "no bias");
  expect(!row_distance_bias && !col_distance_bias, "no row_distance_bias and no col_distance_bias");
  const Device device(device_index(q));
  Call c = describe(p);
  if (q.size(0) * c.heads_q == 0) return;
  const Attention& kernels = attention(std::max(c.head_dim, c.head_dim_v));
  const Chosen large = choose(c, kernels, false, device.capability);
  const Chosen own = is_small(p, c) ? choose(c, kernels, true, device.capability) : large;
  c.division = divide(p, c, own, device.processors);
  // A plan's tiles of shared keys are not for terms that depend on distances.
  const bool planned = plan && !distance_bias && !alibi_slopes && c.batch.batch > 0;
  const int64_t blocks = int64_t(c.batch.batch) * c.division.blocks.divisor, splits = c.division.splits.divisor;
  const int64_t pieces = blocks * splits, rows = pieces * c.division.rows;
  const int64_t units = planned ? plan->size(0) : std::max<int64_t>(pieces, 1);
  c.slots = int32_t(planned ? units : splits > 1 ? rows : 0);
  expect(units * c.heads_q < FAR && rows < FAR, "at most 2^29 tiles");
  const Tensor workspace = new_float(q, {int64_t(c.slots) * c.heads_q * (c.head_dim_v + 1)});
  c.parts = static_cast<float*>(workspace.data_ptr());
  c.parts_lse = c.parts + int64_t(c.slots) * c.heads_q * c.head_dim_v;
  const auto attend = [&](const Chosen& by, Which which) {
    if (!by.hopper) return kernels.attend(c, bfloat16, by.tile_rows, which, int32_t(units), device.stream);
    sm90::PagedLaunch l{c,
                        box_of(k_pages, k_pages),
                        box_of(v_pages, v_pages),
                        bfloat16,
                        has_terms(c.terms),
                        device.processors,
                        device.stream};
    l.k.rows = l.v.rows = by.box_rows;
    by.hopper->launch(l, which, int32_t(units));
  };
  if (planned) {
    c.plan = data<int32_t>(plan);
    c.capacity = int32_t(units);
    attend(large, Which::SHARED);
    attend(own, Which::OWN);
    merge_parts(c, bfloat16, int32_t(units), device);
    return;
  }
  attend(own, Which::ALL);
  if (splits > 1 && pieces > 0) merge_parts(c, bfloat16, int32_t(blocks), device);
}

std::tuple<int64_t, int64_t> paged_workers(int64_t device, int64_t heads_kv) {
  const Device card(static_cast<int32_t>(device));
  const int rows = card.capability == 90 ? sm90::paged_variant(64).block_m : paged::LARGE_ROWS;
  return {rows, std::max<int64_t>(1, card.processors / heads_kv)};
}

}  // namespace duplex
