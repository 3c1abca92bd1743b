// wgmma: 64 rows of a warpgroup times N columns, 16 deep, accumulated in float32 (PTX ISA, "wgmma.mma_async").
//
// Thread t of the warpgroup holds of D, for i in [0, N / 2): row 16 * (t / 32) + t % 32 / 4 + 8 * (i / 2 % 2), column
// 8 * (i / 4) + 2 * (t % 4) + i % 2. A in registers is the same for the 16 columns of A, two numbers a register.
#pragma once

#include <stdint.h>

#include "cuda/numbers.h"
#include "cuda/swizzle.h"

namespace duplex::ptx {

// Before the first of a series, and wherever registers that the products read or add to were touched in between.
DUPLEX_DEVICE void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
DUPLEX_DEVICE void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
// Until at most PENDING of the committed groups are unfinished.
template <int PENDING>
DUPLEX_DEVICE void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory");
}

// Accumulators are settled here: the compiler moves no use of them across.
template <int COUNT>
DUPLEX_DEVICE void settle(float (&x)[COUNT]) {
#pragma unroll
  for (int i = 0; i < COUNT; ++i) asm volatile("" : "+f"(x[i])::"memory");
}

// The same for A in registers, which products read until they are waited for.
template <int COUNT>
DUPLEX_DEVICE void settle(uint32_t (&x)[COUNT][4]) {
#pragma unroll
  for (int i = 0; i < COUNT; ++i)
    asm volatile("" : "+r"(x[i][0]), "+r"(x[i][1]), "+r"(x[i][2]), "+r"(x[i][3])::"memory");
}

// What accumulators hold is of no more use: until products begin anew, their registers are free.
template <int COUNT>
DUPLEX_DEVICE void forget(float (&x)[COUNT]) {
#pragma unroll
  for (int i = 0; i < COUNT; ++i) asm volatile("" : "=f"(x[i]));
}

// Registers by number in the text of an instruction, and as operands of it.

#define DUPLEX_R16 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15"

#define DUPLEX_R32 \
  DUPLEX_R16       \
  ", %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"

#define DUPLEX_R48 \
  DUPLEX_R32       \
  ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47"

#define DUPLEX_R64 \
  DUPLEX_R48       \
  ", %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"

#define DUPLEX_R96                                                                   \
  DUPLEX_R64                                                                         \
  ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79" \
  ", %80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95"

#define DUPLEX_R128                                                                              \
  DUPLEX_R96                                                                                     \
  ", %96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111" \
  ", %112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"

#define DUPLEX_8(d, i)                                                                                        \
  "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), "+f"(d[i + 6]), \
      "+f"(d[i + 7])
#define DUPLEX_16(d, i) DUPLEX_8(d, i), DUPLEX_8(d, i + 8)
#define DUPLEX_D16(d) DUPLEX_16(d, 0)
#define DUPLEX_D32(d) DUPLEX_D16(d), DUPLEX_16(d, 16)
#define DUPLEX_D48(d) DUPLEX_D32(d), DUPLEX_16(d, 32)
#define DUPLEX_D64(d) DUPLEX_D48(d), DUPLEX_16(d, 48)
#define DUPLEX_D96(d) DUPLEX_D64(d), DUPLEX_16(d, 64), DUPLEX_16(d, 80)
#define DUPLEX_D128(d) DUPLEX_D96(d), DUPLEX_16(d, 96), DUPLEX_16(d, 112)

// X0.. are the numbers of the operands behind the N / 2 accumulators. An input scale of 1 for both, then whether each
// operand in shared memory has its outer dimension contiguous.
#define DUPLEX_WGMMA_SHARED(N, HALF, TYPE, X0, X1, X2, X3, X4)                                                       \
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" #X2 ", 0;\nwgmma.mma_async.sync.aligned.m64n" #N "k16.f32." TYPE \
               "." TYPE " {" DUPLEX_R##HALF "}, %" #X0 ", %" #X1 ", p, 1, 1, %" #X3 ", %" #X4 ";\n}"                 \
               : DUPLEX_D##HALF(d)                                                                                   \
               : "l"(a), "l"(b), "r"(int(accumulate)), "n"(int(MAJOR_A == Major::MN)), "n"(int(MAJOR_B == Major::MN)))
#define DUPLEX_WGMMA_REGISTERS(N, HALF, TYPE, X0, X1, X2, X3, X4, X5, X6)                                            \
  asm volatile(                                                                                                      \
      "{\n.reg .pred p;\nsetp.ne.b32 p, %" #X5 ", 0;\nwgmma.mma_async.sync.aligned.m64n" #N "k16.f32." TYPE "." TYPE \
      " {" DUPLEX_R##HALF "}, {%" #X0 ", %" #X1 ", %" #X2 ", %" #X3 "}, %" #X4 ", p, 1, 1, %" #X6 ";\n}"             \
      : DUPLEX_D##HALF(d)                                                                                            \
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(int(accumulate)), "n"(int(MAJOR_B == Major::MN)))

// D = A B (+ D): A (64, 16) and B (16, N) in shared memory.
template <class T, Major MAJOR_A, Major MAJOR_B, int HALF>
DUPLEX_DEVICE void wgmma(float (&d)[HALF], uint64_t a, uint64_t b, bool accumulate) {
  constexpr int N = 2 * HALF;
  constexpr bool BF16 = T::BITS == BFLOAT16_BITS;
  static_assert(N == 32 || N == 64 || N == 96 || N == 128 || N == 192 || N == 256);
  if constexpr (N == 32 && BF16)
    DUPLEX_WGMMA_SHARED(32, 16, "bf16", 16, 17, 18, 19, 20);
  else if constexpr (N == 32)
    DUPLEX_WGMMA_SHARED(32, 16, "f16", 16, 17, 18, 19, 20);
  else if constexpr (N == 64 && BF16)
    DUPLEX_WGMMA_SHARED(64, 32, "bf16", 32, 33, 34, 35, 36);
  else if constexpr (N == 64)
    DUPLEX_WGMMA_SHARED(64, 32, "f16", 32, 33, 34, 35, 36);
  else if constexpr (N == 96 && BF16)
    DUPLEX_WGMMA_SHARED(96, 48, "bf16", 48, 49, 50, 51, 52);
  else if constexpr (N == 96)
    DUPLEX_WGMMA_SHARED(96, 48, "f16", 48, 49, 50, 51, 52);
  else if constexpr (N == 128 && BF16)
    DUPLEX_WGMMA_SHARED(128, 64, "bf16", 64, 65, 66, 67, 68);
  else if constexpr (N == 128)
    DUPLEX_WGMMA_SHARED(128, 64, "f16", 64, 65, 66, 67, 68);
  else if constexpr (N == 192 && BF16)
    DUPLEX_WGMMA_SHARED(192, 96, "bf16", 96, 97, 98, 99, 100);
  else if constexpr (N == 192)
    DUPLEX_WGMMA_SHARED(192, 96, "f16", 96, 97, 98, 99, 100);
  else if constexpr (N == 256 && BF16)
    DUPLEX_WGMMA_SHARED(256, 128, "bf16", 128, 129, 130, 131, 132);
  else if constexpr (N == 256)
    DUPLEX_WGMMA_SHARED(256, 128, "f16", 128, 129, 130, 131, 132);
}

// The same with A in registers.
template <class T, Major MAJOR_B, int HALF>
DUPLEX_DEVICE void wgmma(float (&d)[HALF], const uint32_t (&a)[4], uint64_t b, bool accumulate) {
  constexpr int N = 2 * HALF;
  constexpr bool BF16 = T::BITS == BFLOAT16_BITS;
  static_assert(N == 64 || N == 96 || N == 128 || N == 192 || N == 256);
  if constexpr (N == 64 && BF16)
    DUPLEX_WGMMA_REGISTERS(64, 32, "bf16", 32, 33, 34, 35, 36, 37, 38);
  else if constexpr (N == 64)
    DUPLEX_WGMMA_REGISTERS(64, 32, "f16", 32, 33, 34, 35, 36, 37, 38);
  else if constexpr (N == 96 && BF16)
    DUPLEX_WGMMA_REGISTERS(96, 48, "bf16", 48, 49, 50, 51, 52, 53, 54);
  else if constexpr (N == 96)
    DUPLEX_WGMMA_REGISTERS(96, 48, "f16", 48, 49, 50, 51, 52, 53, 54);
  else if constexpr (N == 128 && BF16)
    DUPLEX_WGMMA_REGISTERS(128, 64, "bf16", 64, 65, 66, 67, 68, 69, 70);
  else if constexpr (N == 128)
    DUPLEX_WGMMA_REGISTERS(128, 64, "f16", 64, 65, 66, 67, 68, 69, 70);
  else if constexpr (N == 192 && BF16)
    DUPLEX_WGMMA_REGISTERS(192, 96, "bf16", 96, 97, 98, 99, 100, 101, 102);
  else if constexpr (N == 192)
    DUPLEX_WGMMA_REGISTERS(192, 96, "f16", 96, 97, 98, 99, 100, 101, 102);
  else if constexpr (N == 256 && BF16)
    DUPLEX_WGMMA_REGISTERS(256, 128, "bf16", 128, 129, 130, 131, 132, 133, 134);
  else if constexpr (N == 256)
    DUPLEX_WGMMA_REGISTERS(256, 128, "f16", 128, 129, 130, 131, 132, 133, 134);
}

}  // namespace duplex::ptx
