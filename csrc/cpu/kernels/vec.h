// Vectors of the instruction set a source file is compiled for, through the compiler's vector extension: the same text
// becomes SSE, NEON, AVX2 or AVX-512. Intrinsics appear only where the extension has no word (dot products, half
// floats).
#pragma once

#include <stdint.h>
#include <string.h>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#if defined(__AVX512F__)
#define DUPLEX_LANES 16
#define DUPLEX_ROWS 8
#elif defined(__AVX2__)
#define DUPLEX_LANES 8
#define DUPLEX_ROWS 4
#else
#define DUPLEX_LANES 4
#define DUPLEX_ROWS 4
#endif

namespace duplex::DUPLEX_ISA {

constexpr int LANES = DUPLEX_LANES;  // floats in a vector
constexpr int ROWS = DUPLEX_ROWS;    // rows of a register tile
#if defined(DUPLEX_MATRIX_UNIT)
constexpr int VECS = 4;          // vectors of queries in a tile
constexpr int VECTORS_STEP = 2;  // a multiple of them are filled
#else
constexpr int VECS = 3;  // vectors in a row of a register tile
constexpr int VECTORS_STEP = 1;
#endif
constexpr int TILE = VECS * LANES;  // queries in a tile

typedef float vfloat __attribute__((vector_size(4 * DUPLEX_LANES)));
typedef int32_t vint __attribute__((vector_size(4 * DUPLEX_LANES)));
typedef uint32_t vuint __attribute__((vector_size(4 * DUPLEX_LANES)));

struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};
struct f8 {
  uint8_t bits;  // float8_e4m3fn
};

template <class V, class T>
inline V load(const T* from) {
  static_assert(sizeof(T) == 4);
  V v;
  memcpy(&v, from, sizeof(V));
  return v;
}
template <class V, class T>
inline void store(T* to, V v) {
  static_assert(sizeof(T) == 4);
  memcpy(to, &v, sizeof(V));
}
inline vfloat splat(float x) { return x - vfloat{}; }
inline vint splat(int32_t x) { return x - vint{}; }
inline vfloat select(vint mask, vfloat yes, vfloat no) { return mask ? yes : no; }
// b when either is NaN
#if defined(__AVX512F__)
inline vfloat max(vfloat a, vfloat b) { return (vfloat)_mm512_max_ps((__m512)a, (__m512)b); }
inline vfloat min(vfloat a, vfloat b) { return (vfloat)_mm512_min_ps((__m512)a, (__m512)b); }
#else
inline vfloat max(vfloat a, vfloat b) { return a > b ? a : b; }
inline vfloat min(vfloat a, vfloat b) { return a < b ? a : b; }
#endif
inline vfloat abs(vfloat a) { return (vfloat)((vint)a & 0x7fffffff); }

inline bool any(vint mask) {
#if defined(__AVX512F__)
  return _mm512_test_epi32_mask((__m512i)mask, (__m512i)mask) != 0;
#else
  bool found = false;
  for (int i = 0; i < LANES; ++i) found |= mask[i] != 0;
  return found;
#endif
}

// A product that is rounded before it is added to anything.
inline vfloat rounded(vfloat product) {
  asm("" : "+v"(product));
  return product;
}

// Lane c of the result is lane from[c] of the two vectors one after the other.
inline vint shuffle(vint a, vint b, vint from) {
#if defined(__clang__)
  vint result;
  for (int c = 0; c < LANES; ++c) result[c] = from[c] < LANES ? a[from[c]] : b[from[c] - LANES];
  return result;
#else
  return __builtin_shuffle(a, b, from);
#endif
}

constexpr int LINE = 64;  // bytes that memory brings at once

// Asks for the line at an address. Without the empty statement GCC takes functions that only ask for ones without
// effect, and drops their calls.
inline void ask_for_line(const void* at) {
  __builtin_prefetch(at);
  asm volatile("");
}

inline float sum(vfloat v) {
  float total = 0;
  for (int i = 0; i < LANES; ++i) total += v[i];
  return total;
}

inline vint iota() {
  vint v{};
  for (int i = 0; i < LANES; ++i) v[i] = i;
  return v;
}

constexpr float LOG2E = 1.4426950408889634f, LN2 = 0.6931471805599453f;
constexpr float INF = __builtin_inff();

// 2^x = 2^n * (1 + q): n the nearest integer, q in [-0.3, 0.42]. Minimax in relative error: 2e-9 when EXACT, else 3e-6.
template <bool EXACT>
inline vfloat exp2_reduced(vfloat x, vint& n) {
  const float magic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
  const vfloat shifted = x + magic;
  n = (vint)shifted - (vint)splat(magic);
  const vfloat f = x - (shifted - magic);
  if (!EXACT) return f * (0.6931241934f + f * (0.2402409861f + f * (0.0559064250f + f * 0.0095828532f)));
  return f *
         (0.6931472029f +
          f * (0.2402264791f + f * (0.0555033247f + f * (0.0096184374f + f * (0.0013398874f + f * 0.0001535336f)))));
}

// 2^x for x <= 126; exactly 0 from x = -127 down (so -inf gives 0), NaN stays NaN.
template <bool EXACT>
inline vfloat exp2(vfloat x) {
#if defined(__AVX512DQ__)
  // 2^floor(x) * (1 + q), with a polynomial for [0, 1): 2e-9 and 3e-6 as above. No subnormals, which are slow.
  const vfloat f = (vfloat)_mm512_reduce_ps((__m512)x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
  const vfloat q = EXACT
                       ? f * (0.6931470440f +
                              f * (0.2402293060f +
                                   f * (0.0554852805f + f * (0.0096754519f + f * (0.0012467843f + f * 0.0002161293f)))))
                       : f * (0.6930448413f + f * (0.2412802219f + f * (0.0522424459f + f * 0.0134267006f)));
  const __mmask16 normal = _mm512_cmp_ps_mask((__m512)x, _mm512_set1_ps(-126.0f), _CMP_NLT_UQ);
  return (vfloat)_mm512_maskz_scalef_ps(normal, (__m512)(1.0f + q), (__m512)x);
#else
  vint n;
  const vfloat q = exp2_reduced<EXACT>(max(splat(-127.0f), x), n);
  return (vfloat)((vint)(1.0f + q) + (n << 23));
#endif
}

// tanh(x) = (e^2x - 1) / (e^2x + 1), with e^2x - 1 = 2^n q + (2^n - 1) so that small x keep their digits.
inline vfloat tanh(vfloat x) {
  const vfloat clamped = max(min(abs(x), splat(15.0f)), splat(0.0f));
  vint n;
  const vfloat q = exp2_reduced<true>(clamped * (2 * LOG2E), n);
  const vfloat power = (vfloat)((n + 127) << 23);
  const vfloat m1 = power * q + (power - 1.0f);
  const vfloat t = m1 / (m1 + 2.0f);
  const vfloat result = (vfloat)((vint)t | ((vint)x & (int32_t)0x80000000));
  return x != x ? x : result;
}

#if defined(__AVX512F__)
typedef __m256i half_vector;
inline vfloat widen(const bf16* from) {
  return (vfloat)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)from)), 16);
}
inline vfloat widen(const f16* from) { return (vfloat)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)from)); }
inline void narrow(f16* to, vfloat v) { _mm256_storeu_si256((__m256i*)to, _mm512_cvtps_ph((__m512)v, 0)); }
#elif defined(__AVX2__)
inline vfloat widen(const bf16* from) {
  return (vfloat)_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)from)), 16);
}
inline vfloat widen(const f16* from) { return (vfloat)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)from)); }
inline void narrow(f16* to, vfloat v) { _mm_storeu_si128((__m128i*)to, _mm256_cvtps_ph((__m256)v, 0)); }
#else
inline float to_float(f16 h) {
  const uint32_t sign = uint32_t(h.bits & 0x8000) << 16, magnitude = uint32_t(h.bits & 0x7fff) << 13;
  uint32_t bits;
  if (magnitude >= 0x0f800000) {
    bits = magnitude + 0x70000000;  // infinity and NaN: exponent 31 becomes 255
  } else {
    float scaled;  // exponent bias 15 becomes 127; subnormals are normalised by the multiplication
    memcpy(&scaled, &magnitude, 4);
    scaled *= 0x1p112f;
    memcpy(&bits, &scaled, 4);
  }
  bits |= sign;
  float x;
  memcpy(&x, &bits, 4);
  return x;
}
inline f16 to_f16(float x) {
  uint32_t bits;
  memcpy(&bits, &x, 4);
  const uint16_t sign = (bits >> 16) & 0x8000;
  bits &= 0x7fffffff;
  if (bits > 0x7f800000) return {uint16_t(sign | 0x7e00)};
  if (bits >= 0x477ff000) return {uint16_t(sign | 0x7c00)};
  if (bits < 0x38800000) {  // subnormal: let the adder round at 2^-24
    float magnitude;
    memcpy(&magnitude, &bits, 4);
    magnitude += 0.5f;
    memcpy(&bits, &magnitude, 4);
    return {uint16_t(sign | (bits - 0x3f000000))};
  }
  bits += 0xc8000fff + ((bits >> 13) & 1);
  return {uint16_t(sign | (bits >> 13))};
}
inline vfloat widen(const bf16* from) {
  vuint v{};
  for (int i = 0; i < LANES; ++i) v[i] = uint32_t(from[i].bits) << 16;
  return (vfloat)v;
}
inline vfloat widen(const f16* from) {
  vfloat v{};
  for (int i = 0; i < LANES; ++i) v[i] = to_float(from[i]);
  return v;
}
inline void narrow(f16* to, vfloat v) {
  for (int i = 0; i < LANES; ++i) to[i] = to_f16(v[i]);
}
#endif

// bfloat16 bits in the low half of each lane, rounded to nearest even; NaN stays NaN.
inline vuint bf16_bits(vfloat v) {
  const vuint bits = (vuint)v;
  const vuint rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  return v != v ? (bits >> 16) | 0x40 : rounded;
}

// float8_e4m3fn read as float16 is 2^8 too small, subnormals included; its one NaN comes out as 480.
inline vfloat float8_value(vfloat as_half) {
  const vfloat v = as_half * 256.0f;
  return select(abs(v) > 448.0f, splat(__builtin_nanf("")), v);
}
#if defined(__AVX512F__)
inline vfloat widen(const int8_t* from) {
  return (vfloat)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)from)));
}
inline vfloat widen(const f8* from) {
  const __m256i words = _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i*)from));
  const __m256i halves = _mm256_and_si256(_mm256_slli_epi16(words, 7), _mm256_set1_epi16(short(0xBFFF)));
  return float8_value((vfloat)_mm512_cvtph_ps(halves));
}
#elif defined(__AVX2__)
inline vfloat widen(const int8_t* from) {
  return (vfloat)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)from)));
}
inline vfloat widen(const f8* from) {
  const __m128i words = _mm_cvtepi8_epi16(_mm_loadl_epi64((const __m128i*)from));
  const __m128i halves = _mm_and_si128(_mm_slli_epi16(words, 7), _mm_set1_epi16(short(0xBFFF)));
  return float8_value((vfloat)_mm256_cvtph_ps(halves));
}
#else
inline vfloat widen(const int8_t* from) {
  vfloat v{};
  for (int i = 0; i < LANES; ++i) v[i] = from[i];
  return v;
}
inline vfloat widen(const f8* from) {
  vfloat v{};
  for (int i = 0; i < LANES; ++i)
    v[i] = to_float(f16{uint16_t((from[i].bits & 0x80) << 8 | (from[i].bits & 0x7f) << 7)});
  return float8_value(v);
}
#endif

inline vfloat widen(const float* from) { return load<vfloat>(from); }
inline void narrow(float* to, vfloat v) { store(to, v); }
inline void narrow(bf16* to, vfloat v) {
  const vuint bits = bf16_bits(v);
#if defined(__AVX512F__)
  _mm256_storeu_si256((__m256i*)to, _mm512_cvtepi32_epi16((__m512i)bits));
#else
  for (int i = 0; i < LANES; ++i) to[i].bits = uint16_t(bits[i]);
#endif
}

}  // namespace duplex::DUPLEX_ISA
