// The checks of what tables and lengths hold.
#pragma once

#include <stdexcept>
#include <string>

#include "cpu/call.h"

namespace duplex {

[[noreturn]] inline void wrong_value(const std::string& name, const std::string& expected, int64_t got) {
  throw std::invalid_argument(name + ": expected " + expected + ", got " + std::to_string(got));
}

// cu holds count + 1 entries from 0 that never decrease, each step at most `longest`, the last at most `rows`.
void check_cu(const std::string& name, const int32_t* cu, int64_t count, int64_t rows, int64_t longest,
              const std::string& longest_name);

}  // namespace duplex
