#include "cpu/isa.h"

#include <stdlib.h>

#include <stdexcept>

namespace duplex {
namespace {

const Isa ISAS[] = {
    {"portable", [] { return true; }, &portable::forward, &portable::backward, &portable::bias, &portable::merge,
     &portable::decode, &portable::parts, &portable::append},
#ifdef DUPLEX_HAVE_AVX2
    {"avx2",
     [] { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c"); },
     &avx2::forward, &avx2::backward, &avx2::bias, &avx2::merge, &avx2::decode, &avx2::parts, &avx2::append},
    {"avx512",
     [] {
       return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
              __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
     },
     &avx512::forward, &avx512::backward, &avx512::bias, &avx512::merge, &avx512::decode, &avx512::parts,
     &avx512::append},
    {"avx512_bf16", [] { return __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512bf16"); },
     &avx512_bf16::forward, &avx512_bf16::backward, &avx512_bf16::bias, &avx512_bf16::merge, &avx512_bf16::decode,
     &avx512_bf16::parts, &avx512_bf16::append},
#endif
};

const Isa& widest() {
  const Isa* best = ISAS;
  for (const Isa& isa : ISAS)
    if (isa.supported()) best = &isa;
  return *best;
}

}  // namespace

std::vector<std::string> supported_isas() {
  std::vector<std::string> names;
  for (const Isa& isa : ISAS)
    if (isa.supported()) names.push_back(isa.name);
  return names;
}

const Isa& current_isa() {
  static const Isa& best = widest();
  const char* wanted = getenv("DUPLEX_ATTN_ISA");
  if (!wanted || !*wanted || best.name == std::string_view(wanted)) return best;
  for (const Isa& isa : ISAS)
    if (isa.name == std::string_view(wanted)) {
      if (isa.supported()) return isa;
      throw std::invalid_argument("DUPLEX_ATTN_ISA: this CPU cannot run " + std::string(wanted));
    }
  std::string known;
  for (const std::string& name : supported_isas()) known += " " + name;
  throw std::invalid_argument("DUPLEX_ATTN_ISA: expected one of" + known + ", got " + wanted);
}

}  // namespace duplex
