// One block of threads on the emulated machine: who runs, who waits for what, what is in flight. Every choice that
// hardware is free to make (who goes on, when a copy lands, when a product reads its operands) is drawn from a seed.
#pragma once

#include <array>
#include <cstdint>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <random>
#include <source_location>
#include <stdexcept>
#include <string>
#include <vector>

#include "fiber.h"

namespace emulation {

constexpr uint32_t SHARED_BEGIN = 1024;  // no address of shared memory is 0

using Waiting = std::vector<int>;  // threads

// What the machine leaves out on purpose, to see that the kernels need it and that tests notice.
struct Fault {
  enum Kind {
    NONE,
    MBARRIER_WAIT,
    NAMED_SYNC,
    PROXY_FENCE,
    PRODUCT_WAIT,
    PRODUCT_FENCE,
    BLOCK_SYNC,
    WARP_SYNC,
    COPY_WAIT,
    REDUCE_WAIT
  } kind = NONE;
  // Of the mbarrier, in the order of their initialisation; of the named barrier; of proxy fences from 1 on, in the
  // order in which a block first reached their places in the source, 0 being all; of waits for reductions 1 for those
  // that cover reading alone, 2 for the others.
  int number = 0;
  bool ranks = false;  // the kernel that ranks entries, whose faults others take for places in memory; or all but that
};
extern Fault fault;

struct TensorMap {
  const char* data;
  int64_t size[4], stride[4];  // innermost first; strides in bytes
  int box_columns, box_rows;
};

struct Mbarrier {
  int arrivals = 0, pending = 0, parity = 0;
  int64_t bytes = 0;
  int number = 0;
  Waiting waiting;
};

struct NamedBarrier {
  int threads = 0, arrived = 0;
  Waiting waiting;
};

struct Copy {
  TensorMap map;
  uint32_t to, barrier;
  int at[4];
  bool late;
  int bytes = 0;  // of a copy without a map, from map.data on
};

// A few bytes that a thread has on their way: cp.async.
struct ThreadCopy {
  uint32_t to;
  const void* from;
  int unit, bytes, group;
  bool landed;
};

struct ThreadCopies {
  std::deque<ThreadCopy> unfinished;  // not waited for
  std::vector<ThreadCopy> own;        // waited for, but no barrier has passed them on to others
  int commits = 0;
};

// float32 numbers of shared memory on their way to be added to others: read first, added later.
struct Reduction {
  float* to;
  uint32_t from;
  int bytes, thread, group;
  bool late;
  std::vector<float> read{};
};

// 16 rows of a wgmma, which a warp does for itself as far as anyone may rely on.
struct Product {
  int n, group = 0, lanes = 0;
  bool bf16, a_is_shared, a_is_mn, b_is_mn, accumulate, late, done = false;
  uint64_t a = 0, b = 0;
  std::array<const uint32_t*, 32> registers{};
  std::array<std::array<uint32_t, 4>, 32> copies{};  // of A's registers when they were handed over
  std::array<float*, 32> accumulators{};
};

// Accumulators of a lane that a product still adds to: what they will be, while the lane's own are NaN.
struct Pending {
  float* own;
  std::vector<float> values;
  int64_t last;  // product
};

struct Lane {
  int64_t issued = 0;
  int commits = 0;
  bool fenced = false;
  std::vector<Pending> pending;
};

struct Warp {
  const char* meeting = nullptr;
  int met = 0, priority = 0;
  std::array<void*, 32> given{};
  int argument = 0;
  Waiting waiting, product_waiting;
  std::deque<Product> products;
  int64_t first = 0;   // number of products.front()
  int64_t wanted = 0;  // lanes wait for the products before this one
  std::array<Lane, 32> lanes;
};

class Block {
 public:
  int index, blocks, threads, current = -1;
  const Fault fault;

  // ahead: the launch before may still write, as far as this one knows, until its threads have waited for it.
  Block(int index, int blocks, int threads, int shared_bytes, uint64_t seed, const Fault& fault, bool ahead = false);
  ~Block();
  void run(const std::function<void()>& kernel);

  Warp& warp() { return warps_[current / 32]; }
  Lane& lane() { return warp().lanes[current % 32]; }

  // All lanes of the warp come to the same kind of meeting with the same argument; the last one settles it, with a
  // function from lanes to what they brought.
  template <class Given, class F>
  void meet(const char* kind, int argument, Given& given, F&& settle);

  void wait_for_launch_before() { waited_[current] = true; }
  void maybe_yield() {
    if (random() % 8 == 0) yield();
  }
  void store(uint32_t address, const void* from, int bytes);
  void load(uint32_t address, void* to, int bytes);
  void fence_async_proxy(const std::source_location& at);
  void barrier_init(uint32_t address, int arrivals);
  void barrier_arrive(uint32_t address, int64_t bytes);
  void barrier_wait(uint32_t address, int parity);
  void named(int id, int count, bool wait);
  void copy(const Copy& copy);
  void copy_async(uint32_t to, const void* from, int unit, int bytes);
  void copy_commit() { ++copies_of_[current].commits; }
  void copy_wait(int pending);
  void reduce(float* to, uint32_t from, int bytes);
  void reduce_commit() { ++reduction_commits_[current]; }
  void reduce_wait(int pending, bool read);
  void warp_sync();
  void load_matrices(uint32_t (&x)[4], uint32_t row, bool transposed);
  void store_matrices(uint32_t row, const uint32_t (&x)[4]);
  void mma(float* d, const uint32_t (&a)[4], const uint32_t (&b)[2], bool bf16);
  void issue(const Product& product, float* d, const uint32_t* registers);
  void wait_for_products(int pending);
  [[noreturn]] void fail(const std::string& what);
  uint32_t random() { return uint32_t(generator_()); }

 private:
  void yield();
  void wait(Waiting& waiting);
  void wake(Waiting& waiting);
  int next();
  bool finish_one(bool any);
  void land(const Copy& copy);
  void go_on(size_t reduction);
  void write(uint32_t address, const void* from, int bytes, int thread);
  void complete(Mbarrier& barrier);
  Mbarrier& mbarrier(uint32_t address);
  char* shared(uint32_t address, int bytes);
  void land(ThreadCopy& copy);
  void pass_on();
  void expect_none_claimed(uint32_t address, int bytes, int reader);
  void execute(Warp& warp, int64_t number);
  uint16_t element(uint32_t address);
  static void entry();

  const std::function<void()>* kernel_ = nullptr;
  std::vector<char> memory_;
  std::vector<int> dirty_;  // of each 16 bytes: the thread that wrote them and did not fence since, or -1
  std::map<int, std::vector<uint32_t>> unfenced_;
  std::map<std::pair<const char*, int>, int> fences_;  // numbers by place in the source
  // Of each 4 bytes: a thread + 1 whose copy is to bring them, - (thread + 1) when it has waited for them but not
  // passed them on, else 0.
  std::vector<int> claimed_;
  std::vector<ThreadCopies> copies_of_;  // threads
  std::map<uint32_t, Mbarrier> mbarriers_;
  std::array<NamedBarrier, 16> named_;
  std::vector<Copy> copies_;
  std::vector<Reduction> reductions_;
  std::vector<int> reduction_commits_;  // threads
  Waiting reduction_waiting_;
  std::vector<Warp> warps_;
  std::vector<Context> contexts_;
  std::vector<char> waited_;  // threads: for the launch before
  bool ahead_;
  std::vector<int> ready_;
  std::vector<const char*> waits_for_;
  int alive_ = 0;
  Context scheduler_{};
  std::string failure_;
  std::mt19937 generator_;
  // How far this block goes to the ends of what hardware may do: in percent, how many copies and products are late, and
  // how often a copy comes first when only late events are left.
  int late_copies_, late_products_, copies_first_;
  bool by_priority_;
};

extern Block* block;  // that runs now

template <class Given, class F>
void Block::meet(const char* kind, int argument, Given& given, F&& settle) {
  Warp& w = warp();
  if (w.met > 0 && (std::strcmp(w.meeting, kind) != 0 || w.argument != argument))
    fail(std::string("lanes of a warp meet in different operations: ") + w.meeting + " and " + kind);
  w.meeting = kind;
  w.argument = argument;
  w.given[current % 32] = &given;
  if (++w.met < 32) {
    waits_for_[current] = kind;
    wait(w.waiting);
  } else {
    settle([&w](int lane) -> Given& { return *static_cast<Given*>(w.given[lane]); });
    w.met = 0;
    wake(w.waiting);
    maybe_yield();
  }
}

}  // namespace emulation
