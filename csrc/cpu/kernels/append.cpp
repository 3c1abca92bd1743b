// New keys and values into their slots: rotated in float32, rounded as the queries' dtype, then quantised where asked.
#include "cpu/kernels/kernels.h"
#include "cpu/kernels/keys.h"

namespace duplex::DUPLEX_ISA {
namespace {

constexpr float INT8_LARGEST = 127, FLOAT8_LARGEST = 448;

template <class E>
void rotate_head(const Rope& rope, const E* from, E* to, int64_t dim, int64_t position) {
  const int64_t at = clamp(position, 0, rope.positions - 1) * rope.reach;
  const float *cos = rope.cos + at, *sin = rope.sin + at;
  const auto one = [](const E* x) { return widen_partial(x, 1)[0]; };
  const int64_t reach = rope.reach;
  int64_t x = 0;
  if (!rope.interleaved)
    for (; x + LANES <= reach; x += LANES) {
      const vfloat a = widen(from + x), b = widen(from + reach + x), c = load<vfloat>(cos + x),
                   s = load<vfloat>(sin + x);
      narrow(to + x, a * c - b * s);
      narrow(to + reach + x, b * c + a * s);
    }
  for (; x < reach; ++x) {
    const int64_t first = rope.interleaved ? 2 * x : x, second = rope.interleaved ? 2 * x + 1 : x + reach;
    const float a = one(from + first), b = one(from + second);
    narrow_partial(to + first, splat(a * cos[x] - b * sin[x]), 1);
    narrow_partial(to + second, splat(b * cos[x] + a * sin[x]), 1);
  }
  memcpy(to + 2 * reach, from + 2 * reach, (dim - 2 * reach) * sizeof(E));
}

float largest_magnitude(const float* x, int64_t dim) {
  float top = 0;
  for (int64_t d = 0; d < dim; ++d) {
    const float magnitude = __builtin_fabsf(x[d]);
    top = magnitude > top || magnitude != magnitude ? magnitude : top;
  }
  return top;
}

// To nearest, ties to even; what is no number becomes 0, its scale tells.
int8_t to_int8(float x) {
  x = x > INT8_LARGEST ? INT8_LARGEST : x < -INT8_LARGEST ? -INT8_LARGEST : x;
  return x != x ? 0 : int8_t(__builtin_nearbyintf(x));
}

uint8_t to_float8(float x) {
  uint32_t bits;
  memcpy(&bits, &x, 4);
  const uint8_t sign = uint8_t(bits >> 24 & 0x80);
  float magnitude = __builtin_fabsf(x);
  if (x != x) return sign | 0x7f;
  if (magnitude >= FLOAT8_LARGEST) return sign | 0x7e;
  if (magnitude < 0x1p-6f) return sign | uint8_t(int(__builtin_nearbyintf(magnitude * 512.0f)));  // subnormal: m * 2^-9
  memcpy(&bits, &magnitude, 4);
  bits += 0x7ffff + (bits >> 20 & 1);  // three bits of mantissa stay
  return sign | uint8_t((bits >> 20) - (120 << 3));
}

template <class E>
void store_head(const E* from, int64_t dim, Storage storage, void* to, const ScaleView& scales, int64_t scale_at,
                bool set_scale) {
  if (storage == Storage::AS_QUERIES) {
    memcpy(to, from, dim * sizeof(E));
    return;
  }
  float wide[256];
  for (int64_t x = 0; x < dim; x += LANES) {
    const int count = int(dim - x < LANES ? dim - x : LANES);
    const vfloat v = widen_partial(from + x, count);
    memcpy(wide + x, &v, count * sizeof(float));
  }
  float* scale = const_cast<float*>(scales.data) + scale_at;
  if (set_scale) *scale = largest_magnitude(wide, dim) / (storage == Storage::INT8 ? INT8_LARGEST : FLOAT8_LARGEST);
  const float worth = *scale;
  for (int64_t x = 0; x < dim; ++x) {
    const float number = worth > 0 ? wide[x] / worth : 0.0f;
    if (storage == Storage::INT8)
      static_cast<int8_t*>(to)[x] = to_int8(number);
    else
      static_cast<uint8_t*>(to)[x] = to_float8(number);
  }
}

template <class E>
void append_token(const AppendProblem& p, int64_t token, int64_t position, int64_t page, int64_t slot) {
  const bool quantised = p.pages.storage != Storage::AS_QUERIES;
  E turned[256];
  const auto place = [&](const View& view, int64_t h) -> void* {
    return quantised ? (void*)view.at<uint8_t>(page, slot, h) : (void*)view.at<E>(page, slot, h);
  };
  const auto scale_at = [&](const ScaleView& s, int64_t h) { return page * s.page + slot * s.slot + h * s.head; };
  for (int64_t h = 0; h < p.heads; ++h) {
    const E* k = p.k.at<E>(0, token, h);
    if (p.rope) {
      rotate_head<E>(p.rope, k, turned, p.head_dim, position);
      k = turned;
    }
    store_head(k, p.head_dim, p.pages.storage, place(p.pages.k, h), p.pages.k_scales, scale_at(p.pages.k_scales, h),
               p.set_k_scales);
    store_head(p.v.at<E>(0, token, h), p.head_dim_v, p.pages.storage, place(p.pages.v, h), p.pages.v_scales,
               scale_at(p.pages.v_scales, h), p.set_v_scales);
  }
}

}  // namespace

const AppendKernel append = {
    [](const AppendProblem& p, int64_t token, int64_t position, int64_t page, int64_t slot) {
      switch (p.dtype) {
        case DType::FLOAT32: return append_token<float>(p, token, position, page, slot);
        case DType::FLOAT16: return append_token<f16>(p, token, position, page, slot);
        case DType::BFLOAT16: return append_token<bf16>(p, token, position, page, slot);
        case DType::BOOL: return;
      }
    },
    [](const Rope& rope, DType dtype, const void* from, void* to, int64_t dim, int64_t position) {
      switch (dtype) {
        case DType::FLOAT32: return rotate_head(rope, (const float*)from, (float*)to, dim, position);
        case DType::FLOAT16: return rotate_head(rope, (const f16*)from, (f16*)to, dim, position);
        case DType::BFLOAT16: return rotate_head(rope, (const bf16*)from, (bf16*)to, dim, position);
        case DType::BOOL: return;
      }
    }};

}  // namespace duplex::DUPLEX_ISA
