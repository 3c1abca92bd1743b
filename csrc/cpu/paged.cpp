// paged_attention: checks what tables and lengths hold, cuts the step by its plan, hands the pieces to the kernels.
#include "cpu/paged.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "common/plan.h"
#include "cpu/isa.h"
#include "cpu/pages.h"
#include "cpu/parallel.h"

namespace duplex {
namespace {

constexpr int64_t BLOCK_ROWS = 384;      // of a tile: what shares one packed block of keys, more or less
constexpr int64_t SHARED_ROWS = 12;      // below it, each sequence's own pass costs less than a common one
constexpr int64_t SHARED_BY_FEW = 1024;  // keys: from here on memory costs more than the products do

PlanBatch plan_batch(const Tensor& block_table, const Tensor& seqlens_k, const OptionalTensor& cu_seqlens_q,
                     const OptionalTensor& prefix, int64_t page_size, std::optional<int64_t> left,
                     std::optional<int64_t> right, bool top_left) {
  return {block_table.size(0),
          page_size,
          block_table.stride(0),
          static_cast<const int32_t*>(seqlens_k.const_data_ptr()),
          data<int32_t>(cu_seqlens_q),
          data<int32_t>(prefix),
          static_cast<const int32_t*>(block_table.const_data_ptr()),
          clamp(left.value_or(UNBOUNDED), -UNBOUNDED, UNBOUNDED),
          clamp(right.value_or(UNBOUNDED), -UNBOUNDED, UNBOUNDED),
          top_left};
}

// Half the threads: tiles of many rows are a task for each few heads, and every part of their keys costs a merge.
int64_t default_workers() { return (int64_t(torch::stable::get_num_threads()) + 1) / 2; }

// block_rows, workers: 0 for those of this backend on this machine.
PlanOptions plan_options(bool batch_invariant, bool may_share, int64_t block_rows = 0, int64_t workers = 0) {
  return {block_rows ? block_rows : BLOCK_ROWS, workers ? workers : default_workers(),
          batch_invariant ? FIXED_SPLIT : 0, may_share && !batch_invariant ? SHARED_ROWS : 0,
          workers ? UNBOUNDED : SHARED_BY_FEW};
}

// Whether the sequences of a shared tile's rows have the same pages where its keys are.
bool shares_pages(const PlanBatch& p, const PlanTile& tile) {
  const int32_t* pages = p.table + tile.sequence * p.table_row;
  const int64_t begin = tile.key_begin / p.page_size, end = (tile.key_end + p.page_size - 1) / p.page_size;
  for (int64_t b = tile.sequence + 1; b < p.batch && p.row(b) < tile.row_end; ++b)
    if (!std::equal(pages + begin, pages + end, p.table + b * p.table_row + begin)) return false;
  return true;
}

// The plan that the caller made, after checking that it belongs to this batch and stays inside it.
Plan read_plan(const Tensor& t, const PlanBatch& batch, int64_t fixed_split) {
  const auto* rows = static_cast<const PlanHeader*>(t.const_data_ptr());
  const int64_t count = t.size(0);
  Plan plan;
  const auto refuse = [&] {
    wrong_value("plan", "the one made for these lengths and pages, this mask and batch_invariant, with sequences",
                plan.header.batch);
  };
  if (count < 1) refuse();
  plan.header = rows[0];
  const PlanHeader& h = plan.header;
  if (h.batch != batch.batch || h.fixed_split != fixed_split || h.fingerprint != fingerprint(batch) ||
      h.rows != batch.row(batch.batch) || h.tiles < 0 || h.merges < 0 || h.slots < 0 ||
      std::max<int64_t>(1 + int64_t(h.tiles) + h.merges, h.slots) > count)
    refuse();
  const auto* tiles = reinterpret_cast<const PlanTile*>(rows + 1);
  const auto* merges = reinterpret_cast<const PlanMerge*>(rows + 1 + h.tiles);
  plan.tiles.assign(tiles, tiles + h.tiles);
  plan.merges.assign(merges, merges + h.merges);
  int64_t shared = 0;
  for (const PlanTile& x : plan.tiles) {
    const int64_t b = x.sequence, size = int64_t(x.row_end) - x.row_begin;
    if (b < 0 || b >= batch.batch || x.row_begin < batch.row(b) || size < 0 || x.key_begin < 0 ||
        x.key_end < x.key_begin || x.key_end > batch.seqlens_k[b] || x.slot < -1 ||
        x.row_end > (x.shared ? h.rows : batch.row(b + 1)) || (x.slot >= 0 && x.slot + size > h.slots) ||
        (x.shared != 0 && x.shared != 1) || (x.shared && !shares_pages(batch, x)))
      refuse();
    shared += x.shared;
  }
  if (shared != h.shared) refuse();  // which tells whether all rows of a tile see all of its keys
  for (const PlanMerge& m : plan.merges) {
    const int64_t size = int64_t(m.row_end) - m.row_begin;
    const auto inside = [&](int64_t slot, int64_t parts, int64_t stride) {
      return parts == 0 || (parts > 0 && parts <= h.slots && slot >= 0 && stride >= 0 &&
                            slot + (parts - 1) * stride + size <= h.slots);
    };
    if (m.row_begin < 0 || size < 0 || m.row_end > h.rows || !inside(m.shared_slot, m.shared_count, m.shared_stride) ||
        !inside(m.own_slot, m.own_count, size))
      refuse();
  }
  return plan;
}

void check_length(int64_t len_k, int64_t held) {
  if (len_k < 0 || len_k > held)
    wrong_value("seqlens_k", "a length up to what the block table holds (" + std::to_string(held) + ")", len_k);
}

void check_contents(const PlanBatch& p, const Tensor& q, const Tensor& k_pages, int64_t max_pages, int64_t max_seqlen_q,
                    const Rope& rope) {
  if (p.cu_q) check_cu("cu_seqlens_q", p.cu_q, p.batch, q.size(0), max_seqlen_q, "max_seqlen_q");
  const int64_t pages = k_pages.size(0);
  for (int64_t b = 0; b < p.batch; ++b) {
    const int64_t len_k = p.seqlens_k[b];
    check_length(len_k, max_pages * p.page_size);
    if (rope && len_k > rope.positions)
      wrong_value("seqlens_k", "a length up to the positions of rope_cos (" + std::to_string(rope.positions) + ")",
                  len_k);
    const int32_t* row = p.table + b * p.table_row;
    for (int64_t n = 0; n * p.page_size < len_k; ++n)
      if (row[n] < 0 || row[n] >= pages) wrong_value("block_table", "pages 0 to " + std::to_string(pages - 1), row[n]);
  }
}

// One tile as tasks. Rows of several sequences see all of the keys that they share.
struct Cut {
  const Problem& p;
  const Pages& pages;
  const PlanBatch& batch;
  const ForwardKernel& forward;
  const DecodeKernel& decode;
  bool may_decode;
  int64_t together;  // kv heads of a tile of few rows, as many as leave every thread one
  std::vector<ForwardTask> few, many;
  int64_t heads_kv = 0;  // of one of `many` at most

  void add(const PlanTile& tile) {
    const int64_t b = tile.sequence, rows = tile.row_end - tile.row_begin, group = p.group();
    if (rows == 0) return;
    ForwardTask task{};
    task.b = int32_t(b);
    if (tile.shared) {
      task.seq = {
          tile.row_begin, rows, 0, tile.key_end, 0, 0, {tile.key_end, 0, tile.key_end - rows, UNBOUNDED, UNBOUNDED}};
    } else {
      const Span span = batch.span(b);
      task.seq = {batch.row(b), batch.row(b + 1) - batch.row(b), 0, span.len_k, 0, 0, span};
      task.row = tile.row_begin - batch.row(b);
    }
    task.key_begin = tile.key_begin;
    task.key_end = tile.key_end;
    task.slot = tile.slot;
    if (may_decode && rows <= decode.most_rows(tile.key_end - tile.key_begin, bool(p.bias))) {
      task.rows = int32_t(rows);
      for (int64_t h = 0; h < p.heads_q; h += together * group) {
        task.h = int32_t(h);
        task.heads = int32_t(std::min(together * group, p.heads_q - h));
        few.push_back(task);
      }
      return;
    }
    // Few rows take several kv heads at once, and so read memory in its order.
    const int64_t at_once = rows <= forward.tile ? std::max<int64_t>(1, forward.tiles / group) : 1;
    const int64_t heads = std::min<int64_t>(at_once * group, forward.tiles);
    const int64_t most = forward.tiles / heads * forward.tile;
    for (int64_t h = 0, count; h < p.heads_q; h += count) {
      count = std::min(heads, heads < group ? group - h % group : p.heads_q - h);
      heads_kv = std::max(heads_kv, (count + group - 1) / group);
      for (int64_t r = 0; r < rows; r += most) {
        ForwardTask piece = task;
        piece.h = int32_t(h);
        piece.heads = int32_t(count);
        piece.row = task.row + r;
        piece.rows = int32_t(std::min(most, rows - r));
        if (piece.slot >= 0) piece.slot += r;
        many.push_back(piece);
      }
    }
  }
};

void clear_rows(const Problem& p, int64_t begin, int64_t end, int64_t row_bytes) {
  for (int64_t r = begin; r < end; ++r)
    for (int64_t h = 0; h < p.heads_q; ++h) {
      char* to =
          static_cast<char*>(p.out.data) + (r * p.out.row + h * p.out.head) * (p.dtype == DType::FLOAT32 ? 4 : 2);
      std::fill(to, to + row_bytes, 0);
      p.lse[h * p.lse_head + r] = -std::numeric_limits<float>::infinity();
    }
}

// q turned by each token's position, in a tensor of its own.
Tensor rotated(const Tensor& q, const PlanBatch& batch, const Rope& rope, const AppendKernel& kernel) {
  Tensor turned = new_like(q);
  const View from = view(q), to = view(turned);
  const DType dtype = dtype_of(q);
  const int64_t bytes = dtype == DType::FLOAT32 ? 4 : 2;
  parallel_tasks(batch.batch, 0, [&](int64_t b, void*) {
    for (int64_t r = batch.row(b); r < batch.row(b + 1); ++r) {
      const int64_t position = batch.seqlens_k[b] - (batch.row(b + 1) - r);
      for (int64_t h = 0; h < q.size(1); ++h)
        kernel.rotate(rope, dtype, static_cast<char*>(from.data) + (r * from.row + h * from.head) * bytes,
                      static_cast<char*>(to.data) + (r * to.row + h * to.head) * bytes, q.size(2), position);
    }
  });
  return turned;
}

}  // namespace

void paged_attention(DUPLEX_PAGED_PARAMETERS) {
  const Isa& isa = isa_for(dtype_of(q));
  block_table = table_of(block_table);
  const PlanBatch batch =
      plan_batch(block_table, seqlens_k, cu_seqlens_q, prefix, k_pages.size(1), left, right, top_left);
  const Rope rope = rope_of(rope_cos, rope_sin, rope_interleaved);
  check_contents(batch, q, k_pages, block_table.size(1), max_seqlen_q, rope);

  Problem p{};
  p.dtype = dtype_of(q);
  p.batch = batch.batch;
  p.heads_q = q.size(1);
  p.heads_kv = k_pages.size(2);
  p.head_dim = q.size(2);
  p.head_dim_v = v_pages.size(3);
  const Tensor turned = rope ? rotated(q, batch, rope, *isa.append) : q;
  p.q = view(turned);
  p.out = view(out);
  p.lse = static_cast<float*>(lse.data_ptr());
  p.lse_head = q.size(0);
  p.left = batch.left;
  p.right = batch.right;
  p.top_left = top_left;
  set_scores(p, bias, distance_bias, alibi_slopes, row_distance_bias, col_distance_bias, sink, scale, softcap);
  const Pages pages = pages_of(k_pages, v_pages, k_scales, v_scales, block_table);

  const bool may_share = !bias && !distance_bias && !alibi_slopes && !row_distance_bias && !col_distance_bias;
  const PlanOptions options = plan_options(batch_invariant, may_share);
  Plan made;
  if (plan) made = read_plan(*plan, batch, options.fixed_split);
  if (!plan || (made.header.shared > 0 && !may_share)) made = make_plan(batch, options);
  Tensor parts = new_float(q, {made.header.slots, p.heads_q, p.head_dim_v});
  Tensor parts_lse = new_float(q, {p.heads_q, made.header.slots});
  p.parts = view(parts);
  p.parts_lse = static_cast<float*>(parts_lse.data_ptr());
  p.parts_lse_head = made.header.slots;

  const bool may_decode =
      !batch_invariant && p.head_dim % isa.decode->dims == 0 && p.head_dim_v % isa.decode->dims == 0;
  const int64_t together = leaving_none_idle(p.heads_kv, std::max<int64_t>(1, int64_t(made.tiles.size())));
  Cut cut{p, pages, batch, *isa.forward, *isa.decode, may_decode, together, {}, {}, 0};
  for (const PlanTile& tile : made.tiles) cut.add(tile);
  clear_rows(p, batch.row(p.batch), q.size(0), p.head_dim_v * (p.dtype == DType::FLOAT32 ? 4 : 2));

  int64_t rows = 0;
  for (const ForwardTask& task : cut.few) rows = std::max<int64_t>(rows, task.rows);
  const int64_t few = int64_t(cut.few.size());
  const size_t scratch = std::max(cut.many.empty() ? 0 : isa.forward->scratch(p, cut.heads_kv),
                                  cut.few.empty() ? 0 : isa.decode->scratch(p, rows));
  parallel_tasks(few + int64_t(cut.many.size()), scratch, [&](int64_t index, void* memory) {
    if (index < few)
      isa.decode->run(p, pages, cut.few[index], memory);
    else
      isa.forward->run(p, &pages, cut.many[index - few], memory);
  });
  parallel_tasks(int64_t(made.merges.size()), 0, [&](int64_t index, void*) {
    const PlanMerge& m = made.merges[index];
    std::vector<int64_t> slots(int64_t(m.shared_count) + m.own_count);
    for (int64_t r = m.row_begin; r < m.row_end; ++r) {
      const int64_t at = r - m.row_begin;
      for (int n = 0; n < m.shared_count; ++n) slots[n] = m.shared_slot + int64_t(n) * m.shared_stride + at;
      for (int n = 0; n < m.own_count; ++n)
        slots[m.shared_count + n] = m.own_slot + int64_t(n) * (m.row_end - m.row_begin) + at;
      isa.parts->run(p, r, slots.data(), int(slots.size()));
    }
  });
}

Tensor plan(Tensor block_table, Tensor seqlens_k, OptionalTensor cu_seqlens_q, OptionalTensor prefix, int64_t page_size,
            std::optional<int64_t> left, std::optional<int64_t> right, bool top_left, bool batch_invariant,
            int64_t block_rows, int64_t workers) {
  block_table = table_of(block_table);
  const PlanBatch batch = plan_batch(block_table, seqlens_k, cu_seqlens_q, prefix, page_size, left, right, top_left);
  if (batch.cu_q) check_cu("cu_seqlens_q", batch.cu_q, batch.batch, INT32_MAX, INT32_MAX, "cu_seqlens_q");
  for (int64_t b = 0; b < batch.batch; ++b) check_length(batch.seqlens_k[b], block_table.size(1) * page_size);
  const Plan made = make_plan(batch, plan_options(batch_invariant, true, block_rows, workers));
  const PlanHeader& h = made.header;
  Tensor t = new_int(block_table, {std::max<int64_t>(1 + int64_t(h.tiles) + h.merges, h.slots), 8});
  auto* rows = static_cast<PlanHeader*>(t.data_ptr());
  std::fill(rows, rows + t.size(0), PlanHeader{});
  rows[0] = h;
  std::copy(made.tiles.begin(), made.tiles.end(), reinterpret_cast<PlanTile*>(rows + 1));
  std::copy(made.merges.begin(), made.merges.end(), reinterpret_cast<PlanMerge*>(rows + 1 + h.tiles));
  return t;
}

void check_plan(Tensor plan, Tensor block_table, Tensor seqlens_k, OptionalTensor cu_seqlens_q, OptionalTensor prefix,
                int64_t page_size, std::optional<int64_t> left, std::optional<int64_t> right, bool top_left,
                bool batch_invariant) {
  block_table = table_of(block_table);
  read_plan(plan, plan_batch(block_table, seqlens_k, cu_seqlens_q, prefix, page_size, left, right, top_left),
            plan_options(batch_invariant, true).fixed_split);
}

}  // namespace duplex
