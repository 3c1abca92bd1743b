#include "cpu/isa.h"

#include <stdlib.h>

#ifdef DUPLEX_HAVE_AMX
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include <stdexcept>
#include <string_view>

namespace duplex {
namespace {

#ifdef DUPLEX_HAVE_AVX2
bool has_bf16() {
  return __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512vnni") &&
         __builtin_cpu_supports("avx512bf16");
}

constexpr Isa AVX512_BF16 = {"avx512_bf16",         has_bf16,
                             &avx512_bf16::forward, &avx512_bf16::backward,
                             &avx512_bf16::bias,    &avx512_bf16::merge,
                             &avx512_bf16::decode,  &avx512_bf16::parts,
                             &avx512_bf16::append};
#endif

#ifdef DUPLEX_HAVE_AMX
// The kernel keeps room for a thread's tiles only where a process has asked for it. (Linux,
// Documentation/arch/x86/xstate.rst)
bool may_use_tiles() {
  constexpr int ARCH_REQ_XCOMP_PERM = 0x1023, XFEATURE_XTILEDATA = 18;
  constexpr unsigned AMX_BF16 = 1u << 22, AMX_TILE = 1u << 24;
  unsigned a, b, c, d;
  return __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d & AMX_BF16) && (d & AMX_TILE) &&
         syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) == 0;
}

bool has_amx() {
  static const bool has = has_bf16() && may_use_tiles();
  return has;
}

constexpr Isa with_matrix_unit(const char* name, bool (*supported)(), const ForwardKernel& forward,
                               const BackwardKernel& backward) {
  Isa isa = AVX512_BF16;
  isa.name = name;
  isa.supported = supported;
  isa.forward = &forward;
  isa.backward = &backward;
  isa.others = &AVX512_BF16;
  return isa;
}
#endif

// For tests alone: only by name.
constexpr std::string_view EMULATED = "amx_emulated";

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
#endif
#ifdef DUPLEX_HAVE_AMX
    with_matrix_unit(EMULATED.data(), has_bf16, amx_emulated::forward, amx_emulated::backward),
#endif
#ifdef DUPLEX_HAVE_AVX2
    AVX512_BF16,
#endif
#ifdef DUPLEX_HAVE_AMX
    with_matrix_unit("amx", has_amx, amx::forward, amx::backward),
#endif
};

const Isa& widest() {
  const Isa* best = ISAS;
  for (const Isa& isa : ISAS)
    if (isa.supported() && isa.name != EMULATED) best = &isa;
  return *best;
}

}  // namespace

std::vector<std::string> supported_isas() {
  std::vector<std::string> names;
  for (const Isa& isa : ISAS)
    if (isa.supported() && isa.name != EMULATED) names.push_back(isa.name);
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

const Isa& isa_for(DType dtype) {
  const Isa& isa = current_isa();
  return isa.others && dtype != DType::BFLOAT16 ? *isa.others : isa;
}

}  // namespace duplex
