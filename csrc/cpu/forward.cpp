// attention_forward: allocates the outputs, cuts the queries into tasks, hands them to the kernel in use.
#include "cpu/forward.h"

#include <algorithm>
#include <cstring>
#include <limits>
#include <vector>

#include "cpu/isa.h"
#include "cpu/parallel.h"

namespace duplex {
namespace {

// Query heads that share a kv head share its packed keys too, as far as a task holds them.
std::vector<ForwardTask> forward_tasks(const Problem& p, const ForwardKernel& kernel, int64_t tiles) {
  const int64_t heads = std::min(p.group(), tiles), block = tiles / heads * kernel.tile;
  std::vector<ForwardTask> tasks;
  for (int64_t b = 0; b < p.batch; ++b) {
    const Sequence s = sequence(p, b);
    const int64_t blocks = (s.len_q + block - 1) / block;
    for (int64_t h = 0; h < p.heads_q; h += std::min(heads, p.group() - h % p.group()))
      for (int64_t x = blocks; x-- > 0;)  // a causal block costs most at the end: start there
        tasks.push_back({s, int32_t(b), int32_t(h), int32_t(std::min(heads, p.group() - h % p.group())),
                         int32_t(std::min(block, s.len_q - x * block)), x * block, 0, s.len_k, -1});
  }
  return tasks;
}

// The largest number of tiles in a task that still gives every thread several tasks.
int64_t tiles_of_task(const Problem& p, const ForwardKernel& kernel) {
  const int64_t enough = 4 * torch::stable::get_num_threads();
  int64_t rows = 0;
  for (int64_t b = 0; b < p.batch; ++b) rows += sequence(p, b).len_q;
  int64_t tiles = kernel.tiles;
  while (tiles > 1 && rows * p.heads_q < enough * tiles * kernel.tile) --tiles;
  return tiles;
}

// Rows that belong to no sequence: 0 and -inf.
void clear_rows(const Problem& p, int64_t b, int64_t begin, int64_t end) {
  if (begin >= end) return;
  const size_t width = p.heads_q * p.head_dim_v * (p.dtype == DType::FLOAT32 ? 4 : 2);
  std::memset(
      static_cast<char*>(p.out.data) + (b * p.out.batch + begin * p.out.row) * (width / (p.heads_q * p.head_dim_v)), 0,
      (end - begin) * width);
  for (int64_t h = 0; h < p.heads_q; ++h) {
    float* lse = p.lse + b * p.lse_batch + h * p.lse_head;
    std::fill(lse + begin, lse + end, -std::numeric_limits<float>::infinity());
  }
}

void clear_padding(const Problem& p, int64_t rows_stored) {
  if (p.cu_q) return clear_rows(p, 0, p.cu_q[p.batch], rows_stored);
  if (!p.len_q && !p.start_q) return;
  parallel_tasks(p.batch, 0, [&](int64_t b, void*) {
    const Sequence s = sequence(p, b);
    clear_rows(p, b, 0, s.row_q);
    clear_rows(p, b, s.row_q + s.len_q, rows_stored);
  });
}

// A few queries of every sequence: decoding, where the keys of each are one page. That kernel reads a dense bias, which
// is indexed by stored rows and keys, from the first of them. For one row it is 16 times cheaper than the forward
// kernel, whose tasks are query heads: so many threads may be left without one.
bool is_decoding(const Problem& p, const CallArguments& call, const DecodeKernel& kernel) {
  const bool shifted = p.start_q || p.start_k;
  const int64_t threads = std::min<int64_t>(torch::stable::get_num_threads(), p.batch * p.heads_q);
  return p.batch > 0 && p.rows_q > 0 && p.rows_k > 0 && !call.batch_invariant && !p.dropout && !(shifted && p.bias) &&
         p.rows_q <= kernel.most_rows(p.rows_k, bool(p.bias)) && p.head_dim % kernel.dims == 0 &&
         p.head_dim_v % kernel.dims == 0 && 16 * p.batch * p.heads_kv >= p.rows_q * threads;
}

// The view from a row of a sequence on.
View from(View x, const Problem& p, int64_t b, int64_t row) {
  const int64_t bytes = p.dtype == DType::FLOAT32 ? 4 : 2;
  x.data = static_cast<char*>(x.data) + (b * x.batch + row * x.row) * bytes;
  return x;
}

// kv heads of a task: memory is read well in its order only, so where the heads of a key lie side by side, all that
// leave every thread a task.
int64_t decoded_together(const Problem& p) { return p.k.head < p.k.row ? leaving_none_idle(p.heads_kv, p.batch) : 1; }

void decode(const Problem& p, const DecodeKernel& kernel) {
  const int64_t together = decoded_together(p), parts = (p.heads_kv + together - 1) / together;
  parallel_tasks(p.batch * parts, kernel.scratch(p, p.rows_q), [&](int64_t index, void* scratch) {
    const int64_t b = index / parts, kv = index % parts * together, heads = std::min(together, p.heads_kv - kv);
    const Sequence s = sequence(p, b);
    if (s.len_q == 0) return;
    const int32_t page = 0;
    const View k = from(p.k, p, b, s.row_k), v = from(p.v, p, b, s.row_k);
    const Pages pages{k, v, {}, {}, Storage::AS_QUERIES, &page, 0, std::max<int64_t>(s.len_k, 1)};
    const int32_t first = int32_t(kv * p.group()), count = int32_t(heads * p.group());
    kernel.run(p, pages, {s, int32_t(b), first, count, int32_t(s.len_q), 0, 0, s.len_k, -1}, scratch);
  });
}

}  // namespace

std::tuple<Tensor, Tensor> attention_forward(DUPLEX_CALL_PARAMETERS) {
  const CallArguments call DUPLEX_CALL_ARGUMENTS;
  const int64_t heads = call.heads_q(), dim_v = v.size(v.dim() - 1);
  const bool packed = call.packed();
  Tensor out = packed ? new_tensor(q, {q.size(0), heads, dim_v}) : new_tensor(q, {q.size(0), q.size(1), heads, dim_v});
  Tensor lse = packed ? new_float(q, {heads, q.size(0)}) : new_float(q, {q.size(0), heads, q.size(1)});
  const Problem p = problem_of(call, out, lse);
  const Isa& isa = isa_for(p.dtype);
  const ForwardKernel& kernel = *isa.forward;
  clear_padding(p, packed ? q.size(0) : q.size(1));
  if (is_decoding(p, call, *isa.decode)) {
    decode(p, *isa.decode);
    return {std::move(out), std::move(lse)};
  }
  const std::vector<ForwardTask> tasks = forward_tasks(p, kernel, tiles_of_task(p, kernel));
  parallel_tasks(int64_t(tasks.size()), kernel.scratch(p, 1),
                 [&](int64_t index, void* scratch) { kernel.run(p, nullptr, tasks[index], scratch); });
  return {std::move(out), std::move(lse)};
}

}  // namespace duplex
