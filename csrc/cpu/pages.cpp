#include "cpu/pages.h"

namespace duplex {

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
