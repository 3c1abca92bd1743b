// One primitive each, alone: what goes in is given, what comes out is kept as it is. The same text runs emulated and on
// a card.
#pragma once

#include "cuda/ptx.cuh"

namespace duplex::probes {

// Shared memory as given, less its first kilobyte, which is for barriers.
DUPLEX_DEVICE uint32_t write_image(const int* image, int words) {
  const uint32_t at = ptx::shared_base() + 1024;
  for (int n = ptx::thread_index(); n < words; n += 128) ptx::shared_store(at + 4 * n, image[n]);
  return at;
}

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

// The reverse: (32, 4) words to rows at places[lane] bytes of the image, which comes out whole.
DUPLEX_KERNEL(128)
matrices_stored(const uint32_t* x, const int* places, int* image, int words) {
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

// (128, 4): a shuffle's result, the warp's first value, who is elected, a packed pair.
template <class T>
DUPLEX_KERNEL(128)
lanes(int mask, const float* x, uint32_t* out) {
  const int thread = ptx::thread_index();
  out[4 * thread] = ptx::shuffle_xor(uint32_t(thread), mask);
  out[4 * thread + 1] = uint32_t(ptx::uniform(thread));
  out[4 * thread + 2] = ptx::elect();
  out[4 * thread + 3] = ptx::pack<T>(x[2 * thread], x[2 * thread + 1]);
}

}  // namespace duplex::probes
