// A thread of the emulated machine: a stack, and where it stands on it.
#pragma once

#include <sys/mman.h>

#include <cstddef>
#include <cstdint>
#include <new>

#if !defined(__x86_64__)
#include <ucontext.h>
#endif

namespace emulation {

#if defined(__x86_64__)

using Context = void*;  // the stack pointer; callee-saved registers lie above it

extern "C" void duplex_switch(void** from, void* to);
asm(R"(
.text
.weak duplex_switch
.type duplex_switch, @function
duplex_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size duplex_switch, .-duplex_switch
)");

inline void switch_context(Context& from, Context& to) { duplex_switch(&from, to); }

inline void make_context(Context& context, char* stack, size_t bytes, void (*entry)()) {
  auto* top = reinterpret_cast<uintptr_t*>(stack + bytes);
  *--top = 0;  // entry never returns; the stack is as after a call
  *--top = reinterpret_cast<uintptr_t>(entry);
  for (int n = 0; n < 6; ++n) *--top = 0;
  context = top;
}

#else

using Context = ucontext_t;

inline void switch_context(Context& from, Context& to) { swapcontext(&from, &to); }

inline void make_context(Context& context, char* stack, size_t bytes, void (*entry)()) {
  getcontext(&context);
  context.uc_stack.ss_sp = stack;
  context.uc_stack.ss_size = bytes;
  context.uc_link = nullptr;
  makecontext(&context, entry, 0);
}

#endif

// Stacks of all threads of a block, kept from block to block.
struct Stacks {
  static constexpr size_t BYTES = 128 * 1024;
  char* memory = nullptr;
  size_t count = 0;

  char* at(size_t n) { return memory + n * BYTES; }
  void reserve(size_t wanted) {
    if (wanted <= count) return;
    if (memory) munmap(memory, count * BYTES);
    void* got =
        mmap(nullptr, wanted * BYTES, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (got == MAP_FAILED) throw std::bad_alloc();
    memory = static_cast<char*>(got);
    count = wanted;
  }
};

}  // namespace emulation
