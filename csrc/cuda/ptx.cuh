// Everything that touches the hardware: thin wrappers of PTX instructions (PTX ISA 8.x; sections are named). Kernels
// reach shared memory by its 32-bit address and only from here, so that the tests can put another machine underneath.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <stdint.h>

#include "cuda/numbers.h"

#define DUPLEX_DEVICE __device__ __forceinline__
#define DUPLEX_KERNEL(THREADS) __global__ void __launch_bounds__(THREADS, 1)
// With so many blocks on a multiprocessor.
#define DUPLEX_KERNEL_SHARING(THREADS, BLOCKS) __global__ void __launch_bounds__(THREADS, BLOCKS)
#define DUPLEX_PARAMETER const __grid_constant__

namespace duplex::ptx {

struct alignas(64) TensorMap {
  unsigned char opaque[128];  // a CUtensorMap, made by csrc/cuda/tensor_map.cpp
};

// Where am I.

DUPLEX_DEVICE int thread_index() { return int(threadIdx.x); }
DUPLEX_DEVICE int block_index() { return int(blockIdx.x); }
DUPLEX_DEVICE int blocks() { return int(gridDim.x); }

// The first byte of the block's dynamic shared memory; a swizzled tile wants it a multiple of 1024.
DUPLEX_DEVICE uint32_t shared_base() {
  extern __shared__ __align__(1024) unsigned char memory[];
  return uint32_t(__cvta_generic_to_shared(memory));
}

// One and the same lane of a converged warp gets true.
DUPLEX_DEVICE bool elect() {
  uint32_t elected;
  asm volatile("{\n.reg .pred p;\nelect.sync _|p, 0xffffffff;\nselp.u32 %0, 1, 0, p;\n}" : "=r"(elected));
  return elected;
}

// A value that is the same in every lane, in a register that the compiler knows to be so.
DUPLEX_DEVICE int uniform(int x) { return __shfl_sync(0xffffffff, x, 0); }

// x, as if it were not known: what follows from it is computed here, not kept in registers from before.
DUPLEX_DEVICE int anew(int x) {
  asm volatile("" : "+r"(x));
  return x;
}

// One launch under another (section "griddepcontrol"): one that was made ahead (stream.h) begins when all blocks of
// the one before it have come here, and may read nothing of theirs before its own wait. Nothing in code for other cards
// than Hopper.
DUPLEX_DEVICE void let_next_launch_begin() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;");
#endif
}
DUPLEX_DEVICE void wait_for_launch_before() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// What another lane has.
DUPLEX_DEVICE float shuffle(float x, int lane) { return __shfl_sync(0xffffffff, x, lane); }
DUPLEX_DEVICE float shuffle_xor(float x, int mask) { return __shfl_xor_sync(0xffffffff, x, mask); }
DUPLEX_DEVICE uint32_t shuffle_xor(uint32_t x, int mask) { return __shfl_xor_sync(0xffffffff, x, mask); }

// Of what the lanes of a warp have: the largest, and whether it holds for any.
DUPLEX_DEVICE uint32_t reduce_max(uint32_t x) { return __reduce_max_sync(0xffffffff, x); }
DUPLEX_DEVICE bool any(bool x) { return __any_sync(0xffffffff, x); }

// Adds to a number that other blocks add to as well, and returns what was there.
DUPLEX_DEVICE int32_t add_to(int32_t* to, int32_t x) { return atomicAdd(to, x); }

// Shared memory by ordinary loads and stores: the generic proxy.

DUPLEX_DEVICE void shared_store(uint32_t address, int x) {
  asm volatile("st.shared.s32 [%0], %1;" ::"r"(address), "r"(x) : "memory");
}
DUPLEX_DEVICE int shared_load(uint32_t address) {
  int x;
  asm volatile("ld.shared.s32 %0, [%1];" : "=r"(x) : "r"(address) : "memory");
  return x;
}
DUPLEX_DEVICE void shared_store(uint32_t address, float x) {
  asm volatile("st.shared.f32 [%0], %1;" ::"r"(address), "f"(x) : "memory");
}
DUPLEX_DEVICE float shared_load_float(uint32_t address) {
  float x;
  asm volatile("ld.shared.f32 %0, [%1];" : "=f"(x) : "r"(address) : "memory");
  return x;
}
DUPLEX_DEVICE void shared_load2(uint32_t address, float (&x)[2]) {
  asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];" : "=f"(x[0]), "=f"(x[1]) : "r"(address) : "memory");
}
DUPLEX_DEVICE void shared_zero16(uint32_t address) {
  asm volatile("st.shared.v4.b32 [%0], {%1, %1, %1, %1};" ::"r"(address), "r"(0) : "memory");
}
DUPLEX_DEVICE void shared_store16(uint32_t address, const Words4& x) {
  asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(x.word[0]), "r"(x.word[1]),
               "r"(x.word[2]), "r"(x.word[3])
               : "memory");
}
DUPLEX_DEVICE Words4 shared_load16(uint32_t address) {
  Words4 x;
  asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];"
               : "=r"(x.word[0]), "=r"(x.word[1]), "=r"(x.word[2]), "=r"(x.word[3])
               : "r"(address)
               : "memory");
  return x;
}

// Makes the thread's own ordinary writes visible to tensor cores and copy engine, once a barrier has passed them on.
DUPLEX_DEVICE void fence_async_proxy() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// Barriers of threads. Named ones are 1 to 15; `threads` counts those that sync and those that arrive.

DUPLEX_DEVICE void block_sync() { __syncthreads(); }
DUPLEX_DEVICE void warp_sync() { __syncwarp(); }
DUPLEX_DEVICE void named_sync(int barrier, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}
DUPLEX_DEVICE void named_arrive(int barrier, int threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}

// mbarrier objects: 8 bytes of shared memory. A wait returns when the phase of the given parity has completed.

DUPLEX_DEVICE void barrier_init(uint32_t barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}
// After the inits of a thread, before others use the barriers.
DUPLEX_DEVICE void barrier_init_fence() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }
DUPLEX_DEVICE void barrier_arrive(uint32_t barrier) {
  asm volatile("{\n.reg .b64 state;\nmbarrier.arrive.shared::cta.b64 state, [%0];\n}" ::"r"(barrier) : "memory");
}
DUPLEX_DEVICE void barrier_expect(uint32_t barrier, int bytes) {
  asm volatile("{\n.reg .b64 state;\nmbarrier.arrive.expect_tx.shared::cta.b64 state, [%0], %1;\n}" ::"r"(barrier),
               "r"(bytes)
               : "memory");
}
DUPLEX_DEVICE void barrier_wait(uint32_t barrier, int parity) {
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "again:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@!done bra again;\n"
      "}" ::"r"(barrier),
      "r"(parity)
      : "memory");
}

// Bulk copies by tensor map: a box from (c0, c1, c2, c3), innermost first, into shared memory. What lies outside the
// tensor arrives as 0; the barrier counts the bytes of the whole box.

DUPLEX_DEVICE void prefetch(const TensorMap& map) { asm volatile("prefetch.tensormap [%0];" ::"l"(&map) : "memory"); }
DUPLEX_DEVICE void copy_box(uint32_t to, const TensorMap& map, uint32_t barrier, int c0, int c1, int c2, int c3) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3, %4, %5}], "
      "[%6];" ::"r"(to),
      "l"(&map), "r"(c0), "r"(c1), "r"(c2), "r"(c3), "r"(barrier)
      : "memory");
}

// Bytes as they lie: a multiple of 16 of them, from and to multiples of 16.
DUPLEX_DEVICE void copy_bytes(uint32_t to, const void* from, int bytes, uint32_t barrier) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(to),
               "l"(__cvta_generic_to_global(from)), "r"(bytes), "r"(barrier)
               : "memory");
}

// The other way: bytes of shared memory, as float32, are added to those in global memory, with the same alignments. A
// thread's reductions since its last commit are a group; a wait is until at most PENDING of its groups have not been
// read from shared memory, or are not yet in global memory.

DUPLEX_DEVICE void reduce_bytes(float* to, uint32_t from, int bytes) {
  asm volatile(
      "cp.reduce.async.bulk.global.shared::cta.bulk_group.add.f32 [%0], [%1], %2;" ::"l"(__cvta_generic_to_global(to)),
      "r"(from), "r"(bytes)
      : "memory");
}
DUPLEX_DEVICE void reduce_commit() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }
template <int PENDING>
DUPLEX_DEVICE void reduce_wait_read() {
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(PENDING) : "memory");
}
template <int PENDING>
DUPLEX_DEVICE void reduce_wait() {
  asm volatile("cp.async.bulk.wait_group %0;" ::"n"(PENDING) : "memory");
}

// Registers move between the warpgroups of a block.

template <int COUNT>
DUPLEX_DEVICE void more_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(COUNT));
}
template <int COUNT>
DUPLEX_DEVICE void fewer_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(COUNT));
}

// Arithmetic.

DUPLEX_DEVICE float exp2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
DUPLEX_DEVICE float log2(float x) { return __log2f(x); }
// To 2 ulp, of b up to 2^126.
DUPLEX_DEVICE float divide(float a, float b) { return __fdividef(a, b); }
DUPLEX_DEVICE float fma(float a, float b, float c) { return __fmaf_rn(a, b, c); }

DUPLEX_DEVICE float float_of(uint32_t bits) { return __uint_as_float(bits); }
DUPLEX_DEVICE uint32_t bits_of(float x) { return __float_as_uint(x); }
DUPLEX_DEVICE float half_to_float(uint16_t bits) { return __half2float(__ushort_as_half(bits)); }

// Four of eight bytes, those of `low` being 0 to 3 and of `high` 4 to 7; a hexadecimal digit of `which` for each.
DUPLEX_DEVICE uint32_t byte_permute(uint32_t low, uint32_t high, uint32_t which) {
  return __byte_perm(low, high, which);
}

// Two float16 numbers in a register and two others, subnormal ones as they are.
DUPLEX_DEVICE uint32_t multiply2(uint32_t x, uint32_t y) {
  uint32_t z;
  asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(z) : "r"(x), "r"(y));
  return z;
}
DUPLEX_DEVICE uint32_t add2(uint32_t x, uint32_t y) {
  uint32_t z;
  asm("add.rn.f16x2 %0, %1, %2;" : "=r"(z) : "r"(x), "r"(y));
  return z;
}

// Two float8_e4m3fn numbers as float16, from Ada on.
DUPLEX_DEVICE uint32_t float8_pair(uint16_t x) {
  uint32_t z;
  asm("cvt.rn.f16x2.e4m3x2 %0, %1;" : "=r"(z) : "h"(x));
  return z;
}

// Two numbers rounded to nearest-even in one register, `low` in its lower half.
template <class T>
DUPLEX_DEVICE uint32_t pack(float low, float high) {
  uint32_t x;
  if constexpr (T::BITS == BFLOAT16_BITS)
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(x) : "f"(high), "f"(low));
  else
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(x) : "f"(high), "f"(low));
  return x;
}

template <class T>
DUPLEX_DEVICE void unpack(uint32_t x, float& low, float& high) {
  if constexpr (T::BITS == BFLOAT16_BITS) {
    low = __uint_as_float(x << 16);
    high = __uint_as_float(x & 0xFFFF0000);
  } else {
    low = __half2float(__ushort_as_half(uint16_t(x)));
    high = __half2float(__ushort_as_half(uint16_t(x >> 16)));
  }
}

}  // namespace duplex::ptx

#include "cuda/mma.cuh"
#include "cuda/wgmma.cuh"
