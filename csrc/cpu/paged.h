// The operators of the paged cache; schemas as in duplex_attn, less the backend's name.
#pragma once

#include "common/paged_arguments.h"

namespace duplex {

void paged_attention(DUPLEX_PAGED_PARAMETERS);

void paged_append(DUPLEX_APPEND_PARAMETERS);

void copy_pages(Tensor k_pages, Tensor v_pages, Tensor src, Tensor dst, OptionalTensor k_scales,
                OptionalTensor v_scales);

// int32 (rows, 8): a header, then its tiles and merges (common/plan.h). For tiles of at most block_rows rows and so
// many workers; 0 for those of the CPU kernels.
Tensor plan(Tensor block_table, Tensor seqlens_k, OptionalTensor cu_seqlens_q, OptionalTensor prefix, int64_t page_size,
            std::optional<int64_t> left, std::optional<int64_t> right, bool top_left, bool batch_invariant,
            int64_t block_rows, int64_t workers);

// Throws where a plan does not belong to these lengths and this mask, for backends that cannot look.
void check_plan(Tensor plan, Tensor block_table, Tensor seqlens_k, OptionalTensor cu_seqlens_q, OptionalTensor prefix,
                int64_t page_size, std::optional<int64_t> left, std::optional<int64_t> right, bool top_left,
                bool batch_invariant);

}  // namespace duplex
