// paged_append and copy_pages: what writes into the pages. Nothing is written when an argument is wrong.
#include <algorithm>
#include <cstring>
#include <vector>

#include "cpu/isa.h"
#include "cpu/paged.h"
#include "cpu/pages.h"
#include "cpu/parallel.h"

namespace duplex {
namespace {

constexpr int64_t TOKENS_A_TASK = 16;

struct Place {
  int64_t token, position, page, slot;
};

// Where each token goes. Throws where a position or a page is none, and where two tokens meet.
std::vector<Place> places(const Pages& pages, int64_t num_pages, int64_t batch, int64_t max_pages, int64_t tokens,
                          const int32_t* positions, const int32_t* cu, int64_t limit) {
  std::vector<Place> found;
  found.reserve(tokens);
  for (int64_t b = 0; b < batch; ++b) {
    const int32_t* row = pages.table + b * pages.table_row;
    for (int64_t t = cu ? cu[b] : b, end = cu ? cu[b + 1] : b + 1; t < end; ++t) {
      const int64_t position = positions[t];
      if (position == -1) continue;
      if (position < 0 || position >= max_pages * pages.page_size)
        wrong_value("positions",
                    "-1 or a position that the block table holds (up to " +
                        std::to_string(max_pages * pages.page_size - 1) + ")",
                    position);
      if (position >= limit)
        wrong_value("positions", "a position of rope_cos (up to " + std::to_string(limit - 1) + ")", position);
      const int64_t page = row[position / pages.page_size];
      if (page < 0 || page >= num_pages)
        wrong_value("block_table", "pages 0 to " + std::to_string(num_pages - 1), page);
      found.push_back({t, position, page, position % pages.page_size});
    }
  }
  return found;
}

void check_apart(const std::vector<Place>& found, int64_t page_size) {
  std::vector<int64_t> slots;
  slots.reserve(found.size());
  for (const Place& p : found) slots.push_back(p.page * page_size + p.slot);
  std::sort(slots.begin(), slots.end());
  if (std::adjacent_find(slots.begin(), slots.end()) != slots.end())
    throw std::invalid_argument("positions: expected a slot of its own for each token, got two tokens for one slot");
}

// Rows of one page that lie one after another are one copy.
void copy_page(const Tensor& t, int64_t src, int64_t dst) {
  const int64_t bytes = element_size(t), slots = t.size(1), heads = t.size(2), dim = t.dim() > 3 ? t.size(3) : 1;
  char* data = static_cast<char*>(t.data_ptr());
  const auto at = [&](int64_t page, int64_t s, int64_t h) {
    return data + (page * t.stride(0) + s * t.stride(1) + h * t.stride(2)) * bytes;
  };
  const bool whole = t.stride(2) == dim && t.stride(1) == heads * dim;
  if (whole) {
    std::memcpy(at(dst, 0, 0), at(src, 0, 0), slots * heads * dim * bytes);
    return;
  }
  for (int64_t s = 0; s < slots; ++s)
    for (int64_t h = 0; h < heads; ++h) std::memcpy(at(dst, s, h), at(src, s, h), dim * bytes);
}

}  // namespace

void paged_append(DUPLEX_APPEND_PARAMETERS) {
  block_table = table_of(block_table);
  const int64_t batch = block_table.size(0), tokens = k.size(0);
  const auto* cu = data<int32_t>(cu_seqlens);
  if (cu) check_cu("cu_seqlens", cu, batch, tokens, tokens, "cu_seqlens");
  AppendProblem p{};
  p.dtype = dtype_of(k);
  p.pages = pages_of(k_pages, v_pages, k_scales, v_scales, block_table);
  p.k = view(k);
  p.v = view(v);
  p.heads = k.size(1);
  p.head_dim = k.size(2);
  p.head_dim_v = v.size(2);
  p.rope = rope_of(rope_cos, rope_sin, rope_interleaved);
  p.set_k_scales = sets_scales(k_scales, k_pages);
  p.set_v_scales = sets_scales(v_scales, v_pages);
  const std::vector<Place> found =
      places(p.pages, k_pages.size(0), batch, block_table.size(1), tokens,
             static_cast<const int32_t*>(positions.const_data_ptr()), cu, rope_cos ? rope_cos->size(0) : INT64_MAX);
  check_apart(found, p.pages.page_size);
  const AppendKernel& kernel = *current_isa().append;
  const int64_t count = int64_t(found.size());
  parallel_tasks((count + TOKENS_A_TASK - 1) / TOKENS_A_TASK, 0, [&](int64_t task, void*) {
    for (int64_t n = task * TOKENS_A_TASK; n < std::min(count, (task + 1) * TOKENS_A_TASK); ++n)
      kernel.run(p, found[n].token, found[n].position, found[n].page, found[n].slot);
  });
}

void copy_pages(Tensor k_pages, Tensor v_pages, Tensor src, Tensor dst, OptionalTensor k_scales,
                OptionalTensor v_scales) {
  const auto* from = static_cast<const int32_t*>(src.const_data_ptr());
  const auto* to = static_cast<const int32_t*>(dst.const_data_ptr());
  parallel_tasks(src.size(0), 0, [&](int64_t n, void*) {
    for (const Tensor* t : {&k_pages, &v_pages}) copy_page(*t, from[n], to[n]);
    for (const OptionalTensor* t : {&k_scales, &v_scales})
      if (are_of_pages(*t, k_pages)) copy_page(**t, from[n], to[n]);
  });
}

}  // namespace duplex
