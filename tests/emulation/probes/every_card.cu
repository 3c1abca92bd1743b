// The primitives of every card, from Ampere on, as those of Hopper beside this.
#include "cuda/device.cuh"
#include "image.cuh"
#include "report.h"

using namespace duplex;

namespace duplex::probes {

// D += A B of a warp, each operand as its registers: d (32, 4), a (32, 4) words, b (32, 2) words.
template <class T>
DUPLEX_KERNEL(32)
warp_product(const uint32_t* a, const uint32_t* b, float* d) {
  const int lane = ptx::thread_index();
  uint32_t registers[4];
  float x[4];
  for (int n = 0; n < 4; ++n) registers[n] = a[4 * lane + n];
  for (int n = 0; n < 4; ++n) x[n] = d[4 * lane + n];
  ptx::mma<T>(x, registers, b[2 * lane], b[2 * lane + 1]);
  for (int n = 0; n < 4; ++n) d[4 * lane + n] = x[n];
}

// (32, 4) words: matrices whose rows begin at places[lane] bytes of the image.
DUPLEX_KERNEL(128)
matrices(const int* image, int words, const int* places, int transposed, uint32_t* out) {
  const uint32_t at = write_image(image, words);
  ptx::block_sync();
  const int lane = ptx::thread_index();
  if (lane >= 32) return;
  uint32_t x[4];
  if (transposed)
    ptx::load_matrices_transposed(x, at + places[lane]);
  else
    ptx::load_matrices(x, at + places[lane]);
  for (int n = 0; n < 4; ++n) out[4 * lane + n] = x[n];
}

// 128 units, of which the thread of each reads so many bytes, as they lie in shared memory.
template <int UNIT>
DUPLEX_KERNEL(128)
copy_units(const unsigned char* from, const int* bytes, int* image) {
  const int thread = ptx::thread_index();
  const uint32_t to = ptx::shared_base() + 1024;
  ptx::copy_async<UNIT>(to + UNIT * thread, from + UNIT * thread, bytes[thread]);
  ptx::copy_commit();
  ptx::copy_wait<0>();
  ptx::block_sync();
  for (int n = thread; n < 32 * UNIT; n += 128) image[n] = ptx::shared_load(to + 4 * n);
}

// 128 units of 16 bytes to shared memory and, each by another thread, back.
DUPLEX_KERNEL(128)
store_and_load(const Words4* from, Words4* to) {
  const int thread = ptx::thread_index();
  ptx::shared_store16(ptx::shared_base() + 16 * thread, from[thread]);
  ptx::warp_sync();
  to[thread ^ 5] = ptx::shared_load16(ptx::shared_base() + 16 * (thread ^ 5));
}

// (128, 4): two shuffles' results, the warp's first value, a packed pair.
template <class T>
DUPLEX_KERNEL(128)
lanes(int mask, const float* x, uint32_t* out) {
  const int thread = ptx::thread_index();
  out[4 * thread] = ptx::shuffle_xor(uint32_t(thread), mask);
  out[4 * thread + 1] = uint32_t(ptx::uniform(thread));
  out[4 * thread + 2] = uint32_t(ptx::shuffle(float(thread), thread * 7 % 32));
  out[4 * thread + 3] = ptx::pack<T>(x[2 * thread], x[2 * thread + 1]);
}

// (128, 3): the largest x of a warp, whether one of them is odd, and a matrix of 8 x 8 transposed.
DUPLEX_KERNEL(128) of_a_warp(const uint32_t* x, uint32_t* out) {
  const int thread = ptx::thread_index();
  out[3 * thread] = ptx::reduce_max(x[thread]);
  out[3 * thread + 1] = ptx::any(x[thread] % 2 != 0);
  out[3 * thread + 2] = ptx::transpose_matrix(x[thread]);
}

// (128, 2): products and sums of two halves each.
DUPLEX_KERNEL(128) halves(const uint32_t* x, const uint32_t* y, uint32_t* out) {
  const int thread = ptx::thread_index();
  out[2 * thread] = ptx::multiply2(x[thread], y[thread]);
  out[2 * thread + 1] = ptx::add2(x[thread], y[thread]);
}

}  // namespace duplex::probes

namespace {
constexpr int SHARED = 96 * 1024;
}  // namespace

EXPORTED const char* probe_warp_product(int bfloat16, const uint32_t* a, const uint32_t* b, float* d) {
  return report([&] {
    if (bfloat16)
      launch<probes::warp_product<Bfloat16>>("", 1, 32, SHARED, nullptr, a, b, d);
    else
      launch<probes::warp_product<Float16>>("", 1, 32, SHARED, nullptr, a, b, d);
  });
}

EXPORTED const char* probe_matrices(const int* image, int words, const int* places, int transposed, uint32_t* out) {
  return report([&] { launch<probes::matrices>("", 1, 128, SHARED, nullptr, image, words, places, transposed, out); });
}

EXPORTED const char* probe_copy_units(int unit, const unsigned char* from, const int* bytes, int* image) {
  const auto go = [&]<auto KERNEL>() { launch<KERNEL>("", 1, 128, SHARED, nullptr, from, bytes, image); };
  return report([&] {
    switch (unit) {
      case 4: return go.operator()<probes::copy_units<4>>();
      case 8: return go.operator()<probes::copy_units<8>>();
      case 16: return go.operator()<probes::copy_units<16>>();
    }
  });
}

EXPORTED const char* probe_store_and_load(const Words4* from, Words4* to) {
  return report([&] { launch<probes::store_and_load>("", 1, 128, SHARED, nullptr, from, to); });
}

EXPORTED const char* probe_lanes(int bfloat16, int mask, const float* x, uint32_t* out) {
  return report([&] {
    if (bfloat16)
      launch<probes::lanes<Bfloat16>>("", 1, 128, SHARED, nullptr, mask, x, out);
    else
      launch<probes::lanes<Float16>>("", 1, 128, SHARED, nullptr, mask, x, out);
  });
}

EXPORTED const char* probe_of_a_warp(const uint32_t* x, uint32_t* out) {
  return report([&] { launch<probes::of_a_warp>("", 1, 128, SHARED, nullptr, x, out); });
}

EXPORTED const char* probe_halves(const uint32_t* x, const uint32_t* y, uint32_t* out) {
  return report([&] { launch<probes::halves>("", 1, 128, SHARED, nullptr, x, y, out); });
}
