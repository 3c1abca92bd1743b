// paged_append and copy_pages: what writes into the pages.
#include <algorithm>

#include "cuda/call.h"
#include "cuda/device.h"
#include "cuda/operators.h"
#include "cuda/paged/append.h"

namespace duplex {
void paged_append(DUPLEX_APPEND_PARAMETERS) {
  block_table = table_of(block_table);
  const Device device(device_index(k));
  const Pages pages = pages_of(k_pages, v_pages, k_scales, v_scales, block_table);
  const Rope rope = rope_of(rope_cos, rope_sin, rope_interleaved);
  const int64_t vector = 16 / element_size(k), stored = element_size(k_pages);
  expect(k.size(0) < FAR && k_pages.size(0) < FAR, "at most 2^29 tokens and pages");
  paged::Append a{};
  a.keys = {view(k), pages.k, pages.k_scales, sets_scales(k_scales, k_pages), int32_t(k.size(2)), rope};
  a.values = {view(v), pages.v, pages.v_scales, sets_scales(v_scales, v_pages), int32_t(v.size(2)), Rope{}};
  a.dtype = dtype_of(k);
  a.storage = pages.storage;
  a.table = pages.table;
  a.table_row = pages.table_row;
  a.positions = static_cast<const int32_t*>(positions.const_data_ptr());
  a.cu = data<int32_t>(cu_seqlens);
  a.tokens = block_table.size(0) * block_table.size(1) > 0 ? k.size(0) : 0;
  a.heads = int32_t(k.size(1));
  a.batch = int32_t(block_table.size(0));
  a.max_pages = int32_t(block_table.size(1));
  expect(pages.page_size < FAR, "pages of fewer than 2^29 slots");
  a.page_size = Divider::of(std::max<int64_t>(pages.page_size, 1));
  a.num_pages = int32_t(k_pages.size(0));
  a.vectors = aligned(k, 16) && aligned(v, 16) && aligned(k_pages, vector * stored) &&
              aligned(v_pages, vector * stored) && k.size(2) % vector == 0 && v.size(2) % vector == 0 &&
              (rope_interleaved ? 2 * rope.reach : rope.reach) % vector == 0;
  paged::append(a, device.stream);
}

void copy_pages(Tensor k_pages, Tensor v_pages, Tensor src, Tensor dst, OptionalTensor k_scales,
                OptionalTensor v_scales) {
  const Device device(device_index(k_pages));
  expect(k_pages.size(0) < FAR && src.size(0) < FAR, "at most 2^29 pages");
  const auto copy = [&](const Tensor& t) {
    const int64_t bytes = element_size(t), dim = t.dim() > 3 ? t.size(3) : 1;
    paged::copy_pages(
        {t.data_ptr(), t.stride(0) * bytes, t.stride(1) * bytes, t.stride(2) * bytes, dim * bytes, int32_t(t.size(1)),
         int32_t(t.size(2)), int32_t(t.size(0)), int32_t(src.size(0)),
         static_cast<const int32_t*>(src.const_data_ptr()), static_cast<const int32_t*>(dst.const_data_ptr())},
        device.processors, device.stream);
  };
  copy(k_pages);
  copy(v_pages);
  for (const OptionalTensor* t : {&k_scales, &v_scales})
    if (are_of_pages(*t, k_pages)) copy(**t);
}

}  // namespace duplex
