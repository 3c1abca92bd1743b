#include "cpu/pages.h"

namespace duplex {

using torch::headeronly::ScalarType;

namespace {

ScaleView scale_view(const OptionalTensor& t) {
  if (!t) return {};
  const auto stride = [&](int d) { return t->size(d) == 1 ? 0 : t->stride(d); };
  return {static_cast<const float*>(t->const_data_ptr()), stride(0), stride(1), stride(2)};
}

Storage storage_of(const Tensor& pages) {
  switch (pages.scalar_type()) {
    case ScalarType::Char: return Storage::INT8;
    case ScalarType::Float8_e4m3fn: return Storage::FLOAT8_E4M3;
    default: return Storage::AS_QUERIES;
  }
}

}  // namespace

Pages pages_of(const Tensor& k_pages, const Tensor& v_pages, const OptionalTensor& k_scales,
               const OptionalTensor& v_scales, const Tensor& block_table) {
  Pages p{};
  p.k = view(k_pages);
  p.v = view(v_pages);
  p.k_scales = scale_view(k_scales);
  p.v_scales = scale_view(v_scales);
  p.storage = storage_of(k_pages);
  p.table = static_cast<const int32_t*>(block_table.const_data_ptr());
  p.table_row = block_table.stride(0);
  p.page_size = k_pages.size(1);
  return p;
}

Rope rope_of(const OptionalTensor& cos, const OptionalTensor& sin, bool interleaved) {
  if (!cos || cos->size(0) == 0) return {};
  return {static_cast<const float*>(cos->const_data_ptr()), static_cast<const float*>(sin->const_data_ptr()),
          cos->size(0), cos->size(1), interleaved};
}

void check_cu(const std::string& name, const int32_t* cu, int64_t count, int64_t rows, int64_t longest,
              const std::string& longest_name) {
  if (cu[0] != 0) wrong_value(name, "0 first", cu[0]);
  for (int64_t b = 0; b < count; ++b) {
    if (cu[b + 1] < cu[b]) wrong_value(name, "entries that never decrease", cu[b + 1]);
    if (cu[b + 1] - cu[b] > longest)
      wrong_value(longest_name, "at least the longest sequence (" + std::to_string(cu[b + 1] - cu[b]) + ")", longest);
  }
  if (cu[count] > rows)
    wrong_value(name, "a last entry up to the rows given (" + std::to_string(rows) + ")", cu[count]);
}

}  // namespace duplex
