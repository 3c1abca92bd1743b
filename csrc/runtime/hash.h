// A fast hash of token ids. It only finds: whoever looks something up compares the tokens too.
#pragma once

#include <stdint.h>
#include <string.h>

#include <span>
#include <string_view>

namespace duplex::runtime {

inline uint64_t mix(uint64_t a, uint64_t b) {
  const unsigned __int128 product = static_cast<unsigned __int128>(a) * b;
  return uint64_t(product) ^ uint64_t(product >> 64);
}

inline uint64_t hash_tokens(uint64_t seed, std::span<const int32_t> tokens) {
  uint64_t hash = mix(seed ^ tokens.size(), 0x9E3779B97F4A7C15u);
  size_t n = 0;
  for (; n + 2 <= tokens.size(); n += 2) {
    uint64_t pair;
    memcpy(&pair, &tokens[n], sizeof pair);
    hash = mix(hash ^ pair, 0xD6E8FEB86659FD93u);
  }
  if (n < tokens.size()) hash = mix(hash ^ uint32_t(tokens[n]), 0xD6E8FEB86659FD93u);
  return mix(hash, 0xA0761D6478BD642Fu);
}

inline uint64_t hash_bytes(uint64_t seed, std::string_view bytes) {
  uint64_t hash = seed ^ bytes.size();
  for (const char byte : bytes) hash = mix(hash ^ uint8_t(byte), 0xD6E8FEB86659FD93u);
  return hash;
}

}  // namespace duplex::runtime
