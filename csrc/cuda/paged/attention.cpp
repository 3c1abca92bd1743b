// paged_attention: divides the step, describes it to the kernels.
#include <algorithm>
#include <stdexcept>

#include "cuda/call.h"
#include "cuda/device.h"
#include "cuda/operators.h"
#include "cuda/paged/attend.h"

namespace duplex {
namespace paged {

extern const Attention ATTENTION_64, ATTENTION_128, ATTENTION_256;

const Attention& attention(int64_t head_dim) {
  for (const Attention* a : {&ATTENTION_64, &ATTENTION_128, &ATTENTION_256})
    if (head_dim <= a->head_dim) return *a;
  throw std::invalid_argument("the CUDA kernels take a head_dim of at most 256");
}

namespace {

constexpr int64_t TILES_A_PROCESSOR = 4;  // at once, and to spare, so that the longest leaves little idling at the end

// All rows of a sequence and their heads fill no more than the small tile. Not where bits must not depend on how many
// there are.
int tile_rows(const PagedArguments& p, const Call& c) {
  return p.max_seqlen_q * c.group() <= SMALL_ROWS && !p.batch_invariant ? SMALL_ROWS : LARGE_ROWS;
}

// What follows from shapes alone. `parts` of the keys are worth a merge where there are too few blocks for the card.
Division divide(const PagedArguments& p, const Call& c, int block, int processors) {
  const Packing pack = packing(c.group(), tile_rows(p, c));
  const int64_t blocks = (p.max_seqlen_q + pack.rows - 1) / pack.rows;
  const int64_t tiles = std::max<int64_t>(1, c.batch.batch * blocks * c.heads_kv * pack.chunks);
  const int64_t longest = c.batch.longest, wanted = TILES_A_PROCESSOR * processors;
  const int64_t splits = p.batch_invariant
                             ? (longest + FIXED_SPLIT - 1) / FIXED_SPLIT
                             : std::min((wanted + tiles - 1) / tiles, (longest + LEAST_SPLIT - 1) / LEAST_SPLIT);
  return {int32_t(blocks), int32_t(std::max<int64_t>(splits, 1)), pack.rows, block, p.batch_invariant};
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
  c.rope = rope_of(p.rope_cos, p.rope_sin, p.rope_interleaved);
  c.terms = terms_of(p.q.size(2), p.scale, p.softcap, p.distance_bias, p.alibi_slopes);
  c.sink = data<float>(p.sink);
  c.num_pages = int32_t(p.k_pages.size(0));
  c.heads_q = int32_t(p.q.size(1));
  c.heads_kv = int32_t(p.k_pages.size(2));
  c.head_dim = int32_t(p.q.size(2));
  c.head_dim_v = int32_t(p.v_pages.size(3));
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
  const int rows = tile_rows(p, c);
  c.division = divide(p, c, kernels.block_n(c.pages.storage, rows), device.processors);
  // A plan's tiles of shared keys are not for terms that depend on distances.
  const bool planned = plan && !distance_bias && !alibi_slopes && c.batch.batch > 0;
  const Division& d = c.division;
  const int64_t pieces = int64_t(c.batch.batch) * d.blocks * d.splits;
  const int64_t units = planned ? plan->size(0) : std::max<int64_t>(pieces, 1);
  c.slots = int32_t(planned ? units : d.splits > 1 ? pieces * d.rows : 0);
  expect(units * c.heads_q < FAR && pieces * d.rows < FAR, "at most 2^29 tiles");
  const Tensor workspace = new_float(q, {int64_t(c.slots) * c.heads_q * (c.head_dim_v + 1)});
  c.parts = static_cast<float*>(workspace.data_ptr());
  c.parts_lse = c.parts + int64_t(c.slots) * c.heads_q * c.head_dim_v;
  if (planned) {
    c.plan = data<int32_t>(plan);
    c.capacity = int32_t(units);
    kernels.attend(c, bfloat16, LARGE_ROWS, Which::SHARED, int32_t(units), device.stream);
    kernels.attend(c, bfloat16, rows, Which::OWN, int32_t(units), device.stream);
    merge_parts(c, bfloat16, int32_t(units), device.stream);
    return;
  }
  kernels.attend(c, bfloat16, rows, Which::ALL, int32_t(units), device.stream);
  if (d.splits > 1 && pieces > 0) merge_parts(c, bfloat16, c.batch.batch * d.blocks, device.stream);
}

std::tuple<int64_t, int64_t> paged_workers(int64_t device, int64_t heads_kv) {
  return {paged::LARGE_ROWS, std::max<int64_t>(1, Device(int32_t(device)).processors / heads_kv)};
}

}  // namespace duplex
