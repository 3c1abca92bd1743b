// The second implementation of csrc/cuda/ptx.cuh: the same functions on the emulated machine.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <utility>

#include "block.h"
#include "cuda/numbers.h"
#include "cuda/swizzle.h"

#define DUPLEX_DEVICE inline
#define DUPLEX_KERNEL(THREADS) inline void
#define DUPLEX_KERNEL_SHARING(THREADS, BLOCKS) inline void
#define DUPLEX_PARAMETER const

namespace duplex::ptx {

using emulation::block;
using TensorMap = emulation::TensorMap;

inline int thread_index() { return block->current; }
inline int block_index() { return block->index; }
inline int blocks() { return block->blocks; }
inline uint32_t shared_base() { return emulation::SHARED_BEGIN; }

inline bool elect() {
  bool elected = false;
  block->meet("elect", 0, elected, [](auto&& of) { of(0) = true; });
  return elected;
}
inline int uniform(int x) {
  block->meet("shfl.idx", 0, x, [](auto&& of) {
    for (int lane = 1; lane < 32; ++lane) of(lane) = of(0);
  });
  return x;
}
inline int anew(int x) { return x; }
inline void let_next_launch_begin() {}
inline void wait_for_launch_before() { block->wait_for_launch_before(); }
inline float shuffle(float x, int lane) {
  struct Given {
    float x;
    int lane;
  } given{x, lane};
  block->meet("shfl.idx of a lane each", 0, given, [](auto&& of) {
    float all[32];
    for (int lane = 0; lane < 32; ++lane) all[lane] = of(lane).x;
    for (int lane = 0; lane < 32; ++lane) of(lane).x = all[of(lane).lane];
  });
  return given.x;
}
inline uint32_t shuffle_xor(uint32_t x, int mask) {
  block->meet("shfl.bfly", mask, x, [mask](auto&& of) {
    for (int lane = 0; lane < 32; ++lane)
      if (lane < (lane ^ mask)) std::swap(of(lane), of(lane ^ mask));
  });
  return x;
}
inline float shuffle_xor(float x, int mask) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  bits = shuffle_xor(bits, mask);
  std::memcpy(&x, &bits, 4);
  return x;
}

inline uint32_t reduce_max(uint32_t x) {
  block->meet("redux.max", 0, x, [](auto&& of) {
    for (int lane = 0; lane < 32; ++lane) of(0) = of(lane) > of(0) ? of(lane) : of(0);
    for (int lane = 1; lane < 32; ++lane) of(lane) = of(0);
  });
  return x;
}
inline bool any(bool x) {
  block->meet("vote.any", 0, x, [](auto&& of) {
    for (int lane = 0; lane < 32; ++lane) of(0) |= of(lane);
    for (int lane = 1; lane < 32; ++lane) of(lane) = of(0);
  });
  return x;
}

inline int32_t add_to(int32_t* to, int32_t x) { return __atomic_fetch_add(to, x, __ATOMIC_RELAXED); }

inline void shared_store(uint32_t address, int x) { block->store(address, &x, 4); }
inline int shared_load(uint32_t address) {
  int x;
  block->load(address, &x, 4);
  return x;
}
inline void shared_store(uint32_t address, float x) { block->store(address, &x, 4); }
inline float shared_load_float(uint32_t address) {
  float x;
  block->load(address, &x, 4);
  return x;
}
inline void shared_load2(uint32_t address, float (&x)[2]) { block->load(address, x, 8); }
inline void shared_zero16(uint32_t address) {
  const char zeros[16] = {};
  block->store(address, zeros, 16);
}
inline void shared_store16(uint32_t address, const Words4& x) { block->store(address, &x, 16); }
inline Words4 shared_load16(uint32_t address) {
  Words4 x;
  block->load(address, &x, 16);
  return x;
}
inline void fence_async_proxy(const std::source_location& at = std::source_location::current()) {
  block->fence_async_proxy(at);
}

inline void block_sync() { block->named(0, block->threads, true); }
inline void warp_sync() { block->warp_sync(); }
inline void named_sync(int barrier, int threads) { block->named(barrier, threads, true); }
inline void named_arrive(int barrier, int threads) { block->named(barrier, threads, false); }

inline void barrier_init(uint32_t barrier, int arrivals) { block->barrier_init(barrier, arrivals); }
inline void barrier_init_fence() {}
inline void barrier_arrive(uint32_t barrier) { block->barrier_arrive(barrier, 0); }
inline void barrier_expect(uint32_t barrier, int bytes) { block->barrier_arrive(barrier, bytes); }
inline void barrier_wait(uint32_t barrier, int parity) { block->barrier_wait(barrier, parity); }

inline void prefetch(const TensorMap&) {}
inline void copy_box(uint32_t to, const TensorMap& map, uint32_t barrier, int c0, int c1, int c2, int c3) {
  block->copy({map, to, barrier, {c0, c1, c2, c3}, false});
}

inline void copy_bytes(uint32_t to, const void* from, int bytes, uint32_t barrier) {
  emulation::Copy copy{{}, to, barrier, {}, false};
  copy.map.data = static_cast<const char*>(from);
  copy.bytes = bytes;
  block->copy(copy);
}

inline void reduce_bytes(float* to, uint32_t from, int bytes) { block->reduce(to, from, bytes); }
inline void reduce_commit() { block->reduce_commit(); }
template <int PENDING>
void reduce_wait_read() {
  block->reduce_wait(PENDING, true);
}
template <int PENDING>
void reduce_wait() {
  block->reduce_wait(PENDING, false);
}

template <int COUNT>
void more_registers() {
  int nothing = 0;
  block->meet("setmaxnreg", COUNT, nothing, [](auto&&) {});
}
template <int COUNT>
void fewer_registers() {
  int nothing = 0;
  block->meet("setmaxnreg", COUNT, nothing, [](auto&&) {});
}

inline float exp2(float x) { return std::exp2(x); }
inline float log2(float x) { return std::log2(x); }
inline float divide(float a, float b) { return a / b; }
inline float fma(float a, float b, float c) { return std::fma(a, b, c); }

inline float float_of(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}
inline uint32_t bits_of(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return bits;
}
inline float half_to_float(uint16_t bits) {
  _Float16 x;
  std::memcpy(&x, &bits, 2);
  return float(x);
}
inline uint32_t byte_permute(uint32_t low, uint32_t high, uint32_t which) {
  const uint64_t bytes = low | uint64_t(high) << 32;
  uint32_t x = 0;
  for (int n = 0; n < 4; ++n) x |= uint32_t(bytes >> 8 * (which >> 4 * n & 7) & 0xFF) << 8 * n;
  return x;
}

template <class T>
uint16_t round_to(float x) {
  if constexpr (T::BITS == FLOAT16_BITS) {
    const _Float16 y = _Float16(x);
    uint16_t bits;
    std::memcpy(&bits, &y, 2);
    return bits;
  }
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  if (std::isnan(x)) return 0x7FFF;
  return uint16_t((bits + 0x7FFF + (bits >> 16 & 1)) >> 16);
}
template <class T>
uint32_t pack(float low, float high) {
  return uint32_t(round_to<T>(low)) | uint32_t(round_to<T>(high)) << 16;
}

template <class F>
uint32_t of_halves(uint32_t x, uint32_t y, F&& f) {
  const auto half = [](uint32_t bits) { return half_to_float(uint16_t(bits)); };
  return pack<Float16>(f(half(x), half(y)), f(half(x >> 16), half(y >> 16)));
}
inline uint32_t multiply2(uint32_t x, uint32_t y) {
  return of_halves(x, y, [](float a, float b) { return a * b; });
}
inline uint32_t add2(uint32_t x, uint32_t y) {
  return of_halves(x, y, [](float a, float b) { return a + b; });
}
inline uint32_t float8_pair(uint16_t x) {
  const auto widen = [](int bits) {
    const int exponent = bits >> 3 & 15, mantissa = bits & 7;
    if ((bits & 0x7F) == 0x7F) return float(NAN);
    const float size = std::ldexp(float(exponent == 0 ? mantissa : 8 + mantissa), (exponent == 0 ? 1 : exponent) - 10);
    return bits & 0x80 ? -size : size;
  };
  return pack<Float16>(widen(x & 0xFF), widen(x >> 8));
}

template <class T>
void mma(float* d, const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  block->mma(d, a, {b0, b1}, T::BITS == BFLOAT16_BITS);
}
inline void load_matrices(uint32_t (&x)[4], uint32_t row) { block->load_matrices(x, row, false); }
inline void load_matrices_transposed(uint32_t (&x)[4], uint32_t row) { block->load_matrices(x, row, true); }
inline void store_matrices(uint32_t row, const uint32_t (&x)[4]) { block->store_matrices(row, x); }
inline uint32_t transpose_matrix(uint32_t x) {
  block->meet("movmatrix", 0, x, [](auto&& of) {
    uint16_t matrix[8][8];
    for (int lane = 0; lane < 32; ++lane)
      for (int half = 0; half < 2; ++half) matrix[lane / 4][2 * (lane % 4) + half] = uint16_t(of(lane) >> 16 * half);
    for (int lane = 0; lane < 32; ++lane)
      of(lane) = matrix[2 * (lane % 4)][lane / 4] | uint32_t(matrix[2 * (lane % 4) + 1][lane / 4]) << 16;
  });
  return x;
}
template <int UNIT>
void copy_async(uint32_t to, const void* from, int bytes) {
  block->copy_async(to, from, UNIT, bytes);
}
inline void copy_commit() { block->copy_commit(); }
template <int PENDING>
void copy_wait() {
  block->copy_wait(PENDING);
}

template <class T>
void unpack(uint32_t x, float& low, float& high) {
  const auto widen = [](uint16_t bits) {
    if constexpr (T::BITS == FLOAT16_BITS) {
      _Float16 y;
      std::memcpy(&y, &bits, 2);
      return float(y);
    }
    const uint32_t word = uint32_t(bits) << 16;
    float y;
    std::memcpy(&y, &word, 4);
    return y;
  };
  low = widen(uint16_t(x));
  high = widen(uint16_t(x >> 16));
}

inline void wgmma_fence() { block->lane().fenced = block->fault.kind != emulation::Fault::PRODUCT_FENCE; }
inline void wgmma_commit() { ++block->lane().commits; }
template <int PENDING>
void wgmma_wait() {
  block->wait_for_products(PENDING);
}
template <int COUNT>
void settle(float (&)[COUNT]) {}
template <int COUNT>
void forget(float (&x)[COUNT]) {
  for (float& number : x) number = NAN;
}
template <int COUNT>
void settle(uint32_t (&)[COUNT][4]) {}

template <class T, Major MAJOR_A, Major MAJOR_B, int HALF>
void wgmma(float (&d)[HALF], uint64_t a, uint64_t b, bool accumulate) {
  emulation::Product p{};
  p.n = 2 * HALF;
  p.bf16 = T::BITS == BFLOAT16_BITS;
  p.a_is_shared = true;
  p.a_is_mn = MAJOR_A == Major::MN;
  p.b_is_mn = MAJOR_B == Major::MN;
  p.accumulate = accumulate;
  p.a = a;
  p.b = b;
  block->issue(p, d, nullptr);
}
template <class T, Major MAJOR_B, int HALF>
void wgmma(float (&d)[HALF], const uint32_t (&a)[4], uint64_t b, bool accumulate) {
  emulation::Product p{};
  p.n = 2 * HALF;
  p.bf16 = T::BITS == BFLOAT16_BITS;
  p.b_is_mn = MAJOR_B == Major::MN;
  p.accumulate = accumulate;
  p.b = b;
  block->issue(p, d, a);
}

}  // namespace duplex::ptx
