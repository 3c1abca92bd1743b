// The primitives of Hopper, one kernel each: what goes in is given, what comes out is kept as it is. The same text runs
// emulated and on a card.
#include "cuda/device.cuh"
#include "image.cuh"
#include "report.h"

using namespace duplex;

namespace duplex::probes {

// D += A B by descriptors that count from the image's start; d is (128, HALF), a thread's accumulators a row.
template <class T, Major MAJOR_A, Major MAJOR_B, int HALF>
DUPLEX_KERNEL(128)
product(const int* image, int words, uint64_t a, uint64_t b, int accumulate, float* d) {
  const uint64_t at = write_image(image, words) >> 4;
  ptx::fence_async_proxy();
  ptx::block_sync();
  float x[HALF];
  for (int n = 0; n < HALF; ++n) x[n] = d[ptx::thread_index() * HALF + n];
  ptx::wgmma_fence();
  ptx::wgmma<T, MAJOR_A, MAJOR_B>(x, a + at, b + at, accumulate);
  ptx::wgmma_commit();
  ptx::wgmma_wait<0>();
  ptx::settle(x);
  for (int n = 0; n < HALF; ++n) d[ptx::thread_index() * HALF + n] = x[n];
}

// The same with A from registers: (128, 4) words.
template <class T, Major MAJOR_B, int HALF>
DUPLEX_KERNEL(128)
product_registers(const int* image, int words, const uint32_t* a, uint64_t b, int accumulate, float* d) {
  const uint64_t at = write_image(image, words) >> 4;
  ptx::fence_async_proxy();
  ptx::block_sync();
  float x[HALF];
  uint32_t registers[4];
  for (int n = 0; n < HALF; ++n) x[n] = d[ptx::thread_index() * HALF + n];
  for (int n = 0; n < 4; ++n) registers[n] = a[ptx::thread_index() * 4 + n];
  ptx::wgmma_fence();
  ptx::wgmma<T, MAJOR_B>(x, registers, b + at, accumulate);
  ptx::wgmma_commit();
  ptx::wgmma_wait<0>();
  ptx::settle(x);
  for (int n = 0; n < HALF; ++n) d[ptx::thread_index() * HALF + n] = x[n];
}

// A box at (c0, c1, c2, c3), as it lies in shared memory.
DUPLEX_KERNEL(128)
copy(DUPLEX_PARAMETER ptx::TensorMap map, int bytes, int c0, int c1, int c2, int c3, int* image) {
  const uint32_t barrier = ptx::shared_base(), to = barrier + 1024;
  if (ptx::thread_index() == 0) {
    ptx::barrier_init(barrier, 1);
    ptx::barrier_init_fence();
  }
  ptx::block_sync();
  if (ptx::thread_index() == 0) {
    ptx::barrier_expect(barrier, bytes);
    ptx::copy_box(to, map, barrier, c0, c1, c2, c3);
  }
  ptx::barrier_wait(barrier, 0);
  for (int n = ptx::thread_index(); n < bytes / 4; n += 128) image[n] = ptx::shared_load(to + 4 * n);
}

// (32, 4) words to rows at places[lane] bytes of the image, which comes out whole.
DUPLEX_KERNEL(128)
matrices_stored(const uint32_t* x, const int* places, int words, int* image) {
  const uint32_t at = write_image(image, words);
  ptx::block_sync();
  const int thread = ptx::thread_index();
  if (thread < 32) {
    const uint32_t given[4] = {x[4 * thread], x[4 * thread + 1], x[4 * thread + 2], x[4 * thread + 3]};
    ptx::store_matrices(at + places[thread], given);
  }
  ptx::block_sync();
  for (int n = thread; n < words; n += 128) image[n] = ptx::shared_load(at + 4 * n);
}

// An image of float32 added to what is in memory.
DUPLEX_KERNEL(128)
reduction(const int* image, int words, float* to) {
  const uint32_t from = write_image(image, words);
  ptx::fence_async_proxy();
  ptx::block_sync();
  if (ptx::thread_index() > 0) return;
  ptx::reduce_bytes(to, from, 4 * words);
  ptx::reduce_commit();
  ptx::reduce_wait<0>();
}

// Of 128 threads, who is elected.
DUPLEX_KERNEL(128) elected(uint32_t* out) { out[ptx::thread_index()] = ptx::elect(); }

// Pairs of bytes.
DUPLEX_KERNEL(128) float8_pairs(const uint16_t* x, int count, uint32_t* out) {
  for (int n = ptx::thread_index(); n < count; n += 128) out[n] = ptx::float8_pair(x[n]);
}

}  // namespace duplex::probes

namespace {
constexpr int SHARED = 96 * 1024;
constexpr Major K = Major::K, MN = Major::MN;
}  // namespace

EXPORTED const char* probe_product(int which, const int* image, int words, uint64_t a, uint64_t b, int accumulate,
                                   float* d) {
  const auto go = [&]<auto KERNEL>() {
    launch<KERNEL>("", 1, 128, SHARED, nullptr, image, words, a, b, accumulate, d);
  };
  return report([&] {
    switch (which) {
      case 0: return go.operator()<probes::product<Bfloat16, K, K, 32>>();
      case 1: return go.operator()<probes::product<Float16, K, K, 48>>();
      case 2: return go.operator()<probes::product<Bfloat16, K, MN, 64>>();
      case 3: return go.operator()<probes::product<Float16, MN, MN, 96>>();
      case 4: return go.operator()<probes::product<Bfloat16, MN, K, 128>>();
      case 5: return go.operator()<probes::product<Bfloat16, MN, MN, 16>>();
    }
  });
}

EXPORTED const char* probe_product_registers(int which, const int* image, int words, const uint32_t* a, uint64_t b,
                                             int accumulate, float* d) {
  const auto go = [&]<auto KERNEL>() {
    launch<KERNEL>("", 1, 128, SHARED, nullptr, image, words, a, b, accumulate, d);
  };
  return report([&] {
    switch (which) {
      case 0: return go.operator()<probes::product_registers<Bfloat16, MN, 32>>();
      case 1: return go.operator()<probes::product_registers<Float16, MN, 48>>();
      case 2: return go.operator()<probes::product_registers<Bfloat16, K, 64>>();
    }
  });
}

EXPORTED const char* probe_copy(const Box* box, int c0, int c1, int c2, int c3, int* image) {
  return report([&] {
    launch<probes::copy>("", 1, 128, SHARED, nullptr, encode(*box), box->columns * box->rows * 2, c0, c1, c2, c3,
                         image);
  });
}

EXPORTED const char* probe_matrices_stored(const uint32_t* x, const int* places, int words, int* image) {
  return report([&] { launch<probes::matrices_stored>("", 1, 128, SHARED, nullptr, x, places, words, image); });
}

EXPORTED const char* probe_reduction(const int* image, int words, float* to) {
  return report([&] { launch<probes::reduction>("", 1, 128, SHARED, nullptr, image, words, to); });
}

EXPORTED const char* probe_elected(uint32_t* out) {
  return report([&] { launch<probes::elected>("", 1, 128, SHARED, nullptr, out); });
}

EXPORTED const char* probe_float8_pairs(const uint16_t* x, int count, uint32_t* out) {
  return report([&] { launch<probes::float8_pairs>("", 1, 128, SHARED, nullptr, x, count, out); });
}
