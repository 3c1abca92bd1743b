// attention_backward: allocates the gradients, cuts the work into tasks, reduces what tasks share.
#include "cpu/backward.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "cpu/isa.h"
#include "cpu/parallel.h"

namespace duplex {
namespace {

// One task for each (sequence, kv head), the dearest first: five products a tile. With too few of them for the threads,
// keys and queries are cut into tasks of their own: seven products, but every thread works.
std::vector<BackwardTask> backward_tasks(const Problem& p, const BackwardKernel& kernel, bool keys, bool queries,
                                         bool whole_heads) {
  const int64_t heads = p.batch * p.heads_kv, threads = torch::stable::get_num_threads();
  const int64_t rounds = (heads + threads - 1) / threads;
  const bool split = !whole_heads && rounds * threads * 5 > heads * 7;
  const int64_t query_block = 4 * kernel.tile;
  std::vector<BackwardTask> tasks;
  for (int32_t b = 0; b < p.batch; ++b) {
    const Sequence s = sequence(p, b);
    for (int32_t h = 0; h < p.heads_kv; ++h) {
      if (!split) {
        tasks.push_back({b, h, 0, s.len_q, 0, s.len_k, keys, queries});
        continue;
      }
      for (int64_t j = 0; keys && j < s.len_k; j += kernel.key_block)
        tasks.push_back({b, h, 0, s.len_q, j, std::min(j + kernel.key_block, s.len_k), true, false});
      for (int64_t i = 0; queries && i < s.len_q; i += query_block)
        tasks.push_back({b, h, i, std::min(i + query_block, s.len_q), 0, s.len_k, false, true});
    }
  }
  const auto cost = [](const BackwardTask& t) { return (t.row_end - t.row_begin) * (t.key_end - t.key_begin); };
  std::stable_sort(tasks.begin(), tasks.end(), [&](const auto& a, const auto& b) { return cost(a) > cost(b); });
  return tasks;
}

std::vector<BiasTask> bias_tasks(const Problem& p, const BiasKernel& kernel, const BiasView& dbias, int64_t batch,
                                 int64_t heads) {
  std::vector<BiasTask> tasks;
  const int64_t rows = dbias.row ? kernel.rows : std::max<int64_t>(p.rows_q, 1);
  const int64_t keys = dbias.col ? kernel.keys : std::max<int64_t>(p.rows_k, 1);
  for (int64_t b = 0; b < batch; ++b)
    for (int64_t h = 0; h < heads; ++h)
      for (int64_t i = 0; i < p.rows_q; i += rows)
        for (int64_t j = 0; j < p.rows_k; j += keys)
          tasks.push_back({b, h, i, std::min(i + rows, p.rows_q), j, std::min(j + keys, p.rows_k)});
  return tasks;
}

// dL/dsink[h] = -sum over rows of exp(sink - lse) * delta: the sink is one more key whose value is 0.
void sink_gradient(const Problem& p, const float* delta, float* dsink) {
  parallel_tasks(p.heads_q, 0, [&](int64_t h, void*) {
    double total = 0;
    for (int64_t b = 0; b < p.batch; ++b) {
      const Sequence s = sequence(p, b);
      const int64_t at = b * p.lse_batch + h * p.lse_head + s.row_q;
      for (int64_t i = 0; i < s.len_q; ++i)
        if (p.lse[at + i] > -INFINITY) total -= std::exp(double(p.sink[h]) - p.lse[at + i]) * delta[at + i];
    }
    dsink[h] = float(total);
  });
}

void sum_over_batch(const Problem& p, const float* parts, float* total) {
  const int64_t width = 2 * p.radius + 1;
  parallel_tasks(p.heads_q, 0, [&](int64_t h, void*) {
    for (int64_t x = 0; x < width; ++x) {
      float sum = 0;
      for (int64_t b = 0; b < p.batch; ++b) sum += parts[(b * p.heads_q + h) * width + x];
      total[h * width + x] = sum;
    }
  });
}

bool last_is_contiguous(const Tensor& t) { return t.size(t.dim() - 1) <= 1 || t.stride(t.dim() - 1) == 1; }

// Whether some rows belong to no sequence: their gradients are 0, and no task writes them.
bool has_padding(const Problem& p, const CallArguments& call) {
  if (call.packed()) return p.cu_q[p.batch] < call.q.size(0) || p.cu_k[p.batch] < call.k.size(0);
  return p.len_q || p.len_k || p.start_q || p.start_k;
}

Tensor gradient_of(const Tensor& t, bool zero) {
  Tensor gradient = new_like(t);
  return zero ? torch::stable::zero_(gradient) : gradient;
}

}  // namespace

GradientTensors attention_backward(Tensor dout, OptionalTensor dlse, Tensor out, Tensor lse, DUPLEX_CALL_PARAMETERS,
                                   int64_t output_mask) {
  const CallArguments call DUPLEX_CALL_ARGUMENTS;
  const auto wanted = [&](int n) { return (output_mask >> n & 1) != 0; };
  const Problem p = problem_of(call, out, lse);
  const Isa& isa = isa_for(p.dtype);
  const bool padded = has_padding(p, call), keys = wanted(1) || wanted(2) || wanted(6),
             queries = wanted(0) || wanted(5);
  if (!last_is_contiguous(dout)) dout = torch::stable::contiguous(dout);
  if (dlse) dlse = torch::stable::contiguous(*dlse);

  const auto none = [&] { return new_float(q, {0}); };
  Tensor dq = queries ? gradient_of(q, padded) : none(), dk = keys ? gradient_of(k, padded) : none(),
         dv = keys ? gradient_of(v, padded) : none();
  Tensor dbias = wanted(3) ? gradient_of(*bias, true) : none();
  Tensor ddistance = wanted(4) ? new_float(q, {p.heads_q, 2 * p.radius + 1}) : none();
  Tensor drow = wanted(5) ? gradient_of(*row_distance_bias, true) : none();
  Tensor dcol = wanted(6) ? gradient_of(*col_distance_bias, true) : none();
  Tensor dsink = wanted(7) ? new_float(q, {p.heads_q}) : none();
  Tensor delta = new_float(q, {lse.numel()});
  Tensor distance_parts = wanted(4) ? new_float(q, {p.batch * p.heads_q, 2 * p.radius + 1}) : none();
  if (wanted(4)) torch::stable::zero_(distance_parts);

  Gradients g{};
  g.dout = view(dout);
  g.delta = static_cast<float*>(delta.data_ptr());
  if (queries) g.dq = view(dq);
  if (keys) {
    g.dk = view(dk);
    g.dv = view(dv);
  }
  if (wanted(5)) g.drow_distance = row_table(drow);
  if (wanted(6)) g.dcol_distance = row_table(dcol);
  if (wanted(4)) g.ddistance = static_cast<float*>(distance_parts.data_ptr());

  const float* dlse_data = dlse ? static_cast<const float*>(dlse->const_data_ptr()) : nullptr;
  parallel_tasks(p.batch * p.heads_q, 0, [&](int64_t index, void*) {
    isa.backward->delta(p, g.dout, dlse_data, g.delta, index / p.heads_q, index % p.heads_q);
  });

  if (queries || keys || wanted(4)) {
    const std::vector<BackwardTask> tasks = backward_tasks(p, *isa.backward, keys, queries, wanted(4));
    int64_t rows = 0;
    for (const BackwardTask& task : tasks)
      if (task.queries) rows = std::max(rows, task.row_end - task.row_begin);
    parallel_tasks(int64_t(tasks.size()), isa.backward->scratch(p, rows),
                   [&](int64_t index, void* scratch) { isa.backward->run(p, g, tasks[index], scratch); });
  }
  if (wanted(3)) {
    BiasView to = p.bias;  // its dtype and broadcasting; dbias itself is contiguous
    to.data = dbias.data_ptr();
    int64_t* const strides[4] = {&to.batch, &to.head, &to.row, &to.col};
    for (int d = 0; d < 4; ++d) *strides[d] = dbias.size(d) == 1 ? 0 : dbias.stride(d);
    const std::vector<BiasTask> tasks = bias_tasks(p, *isa.bias, to, dbias.size(0), dbias.size(1));
    parallel_tasks(int64_t(tasks.size()), isa.bias->scratch(p),
                   [&](int64_t index, void* scratch) { isa.bias->run(p, g, to, tasks[index], scratch); });
  }
  if (wanted(4)) sum_over_batch(p, g.ddistance, static_cast<float*>(ddistance.data_ptr()));
  if (wanted(7)) sink_gradient(p, g.delta, static_cast<float*>(dsink.data_ptr()));
  if (!wanted(0)) dq = none();
  if (!wanted(1)) dk = none();
  if (!wanted(2)) dv = none();
  return {dq, dk, dv, dbias, ddistance, drow, dcol, dsink};
}

}  // namespace duplex
