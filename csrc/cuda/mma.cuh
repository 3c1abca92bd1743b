// Products of a warp and what feeds them, on every card from Ampere on: mma.sync, 16 rows times 8 columns, 16 deep,
// accumulated in float32; ldmatrix, operands from shared memory to registers; cp.async, rows from global memory to
// shared memory (PTX ISA, "mma.m16n8k16", "ldmatrix", "cp.async").
//
// Lane t holds of D, for i in [0, 4): row t / 4 + 8 * (i / 2), column 2 * (t % 4) + i % 2. Of A, two numbers a
// register, for r in [0, 4): row t / 4 + 8 * (r % 2), columns 2 * (t % 4) + {0, 1} + 8 * (r / 2). Of B, for r in [0,
// 2): rows 2 * (t % 4) + {0, 1} + 8 * r, column t / 4. D's accumulators are, packed, A of a next product.
#pragma once

#include <stdint.h>

#include "cuda/numbers.h"

namespace duplex::ptx {

// D += A B.
template <class T>
DUPLEX_DEVICE void mma(float* d, const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  if constexpr (T::BITS == BFLOAT16_BITS)
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  else
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Four matrices of 8 rows of 16 bytes; lane t says where row t % 8 of matrix t / 8 lies, and gets of matrix r in x[r]:
// row t / 4, columns 2 * (t % 4) + {0, 1}.
DUPLEX_DEVICE void load_matrices(uint32_t (&x)[4], uint32_t row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
               : "r"(row)
               : "memory");
}
// Transposed: rows 2 * (t % 4) + {0, 1}, column t / 4.
DUPLEX_DEVICE void load_matrices_transposed(uint32_t (&x)[4], uint32_t row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
               : "r"(row)
               : "memory");
}

// The reverse of load_matrices, from Hopper on.
DUPLEX_DEVICE void store_matrices(uint32_t row, const uint32_t (&x)[4]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(row), "r"(x[0]), "r"(x[1]),
               "r"(x[2]), "r"(x[3])
               : "memory");
}

// A matrix of 8 x 8, in registers as load_matrices leaves it, transposed.
DUPLEX_DEVICE uint32_t transpose_matrix(uint32_t x) {
  uint32_t y;
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(y) : "r"(x));
  return y;
}

// UNIT bytes from global memory, both addresses multiples of it: the first `bytes` of them are read, the rest is 0.
// Those of 16 go past the L1 cache.
template <int UNIT>
DUPLEX_DEVICE void copy_async(uint32_t to, const void* from, int bytes) {
  static_assert(UNIT == 4 || UNIT == 8 || UNIT == 16);
  if constexpr (UNIT == 16)
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(__cvta_generic_to_global(from)),
                 "r"(bytes)
                 : "memory");
  else
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(to), "l"(__cvta_generic_to_global(from)),
                 "n"(UNIT), "r"(bytes)
                 : "memory");
}
// The thread's copies since its last commit are a group.
DUPLEX_DEVICE void copy_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Until at most PENDING of the thread's groups are unfinished. Other threads see what has come behind a barrier.
template <int PENDING>
DUPLEX_DEVICE void copy_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
}

}  // namespace duplex::ptx
