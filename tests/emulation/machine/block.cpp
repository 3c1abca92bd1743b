#include "block.h"

#include <algorithm>
#include <cmath>

namespace emulation {

Block* block = nullptr;
Fault fault;

namespace {
Stacks stacks;

float from_half(uint16_t x) {
  _Float16 y;
  std::memcpy(&y, &x, 2);
  return float(y);
}
float from_bfloat(uint16_t x) {
  const uint32_t bits = uint32_t(x) << 16;
  float y;
  std::memcpy(&y, &bits, 4);
  return y;
}
float poison() {
  const uint32_t bits = 0x7FDEAD00;
  float y;
  std::memcpy(&y, &bits, 4);
  return y;
}
bool is_poison(float x) {
  const float p = poison();
  return std::memcmp(&x, &p, 4) == 0;
}
}  // namespace

Block::Block(int index, int blocks, int threads, int shared_bytes, uint64_t seed, const Fault& fault, bool ahead)
    : index(index),
      blocks(blocks),
      threads(threads),
      fault(fault),
      memory_(shared_bytes, char(0xFF)),  // NaN in both types
      dirty_(shared_bytes / 16 + 1, -1),
      claimed_(shared_bytes / 4 + 1, 0),
      copies_of_(threads),
      reduction_commits_(threads, 0),
      warps_(threads / 32),
      contexts_(threads),
      waited_(threads, false),
      ahead_(ahead),
      waits_for_(threads, ""),
      alive_(threads),
      generator_(uint32_t(seed * 0x9E3779B1u + index)),
      late_copies_(seed / 2 % 2 ? 100 : 50),
      late_products_(seed / 4 % 3 == 2 ? 50 : seed / 4 % 3 * 100),
      copies_first_(seed / 12 % 2 ? 95 : 5),
      by_priority_(seed % 2) {
  for (Warp& w : warps_) w.priority = int(random() % 1000);
  block = this;
}

Block::~Block() { block = nullptr; }

void Block::entry() {
  (*block->kernel_)();
  Block& b = *block;
  for (const Pending& p : b.lane().pending)
    if (p.own) b.fail("a thread ends with products that it never waited for");
  for (const Reduction& r : b.reductions_)
    if (r.thread == b.current) b.fail("a thread ends with reductions that it never waited for");
  if (!b.copies_of_[b.current].unfinished.empty()) b.fail("a thread ends with copies that it never waited for");
  --b.alive_;
  Context ignored;
  switch_context(ignored, b.scheduler_);
}

void Block::run(const std::function<void()>& kernel) {
  kernel_ = &kernel;
  stacks.reserve(threads);
  for (int t = 0; t < threads; ++t) {
    make_context(contexts_[t], stacks.at(t), Stacks::BYTES, &Block::entry);
    ready_.push_back(t);
  }
  while (failure_.empty() && alive_ > 0) {
    if (random() % 16 == 0) finish_one(false);
    if (ready_.empty() && !finish_one(true)) {
      failure_ = "deadlock: ";
      std::map<std::string, int> reasons;
      for (const char* reason : waits_for_) ++reasons[reason];
      for (const auto& [reason, count] : reasons)
        if (!reason.empty()) failure_ += std::to_string(count) + " threads at " + reason + "; ";
      break;
    }
    if (ready_.empty()) continue;
    current = next();
    waits_for_[current] = "";
    switch_context(scheduler_, contexts_[current]);
    current = -1;
  }
  if (failure_.empty() && ahead_ && std::count(waited_.begin(), waited_.end(), false))
    failure_ = "launched ahead, and threads ended that did not wait for the launch before";
  if (failure_.empty() && !copies_.empty()) failure_ = "the block ends with bulk copies that nobody waited for";
  if (!failure_.empty()) throw std::runtime_error("block " + std::to_string(index) + ": " + failure_);
}

void Block::fail(const std::string& what) {
  if (current < 0) throw std::runtime_error("block " + std::to_string(index) + ": " + what);
  failure_ = "thread " + std::to_string(current) + ": " + what;
  Context ignored;
  switch_context(ignored, scheduler_);
  __builtin_unreachable();
}

int Block::next() {
  size_t best = random() % ready_.size();
  for (int tries = by_priority_ ? 6 : 0; tries > 0; --tries) {
    const size_t other = random() % ready_.size();
    if (warps_[ready_[other] / 32].priority > warps_[ready_[best] / 32].priority) best = other;
  }
  std::swap(ready_[best], ready_.back());
  const int thread = ready_.back();
  ready_.pop_back();
  return thread;
}

void Block::yield() {
  ready_.push_back(current);
  switch_context(contexts_[current], scheduler_);
}

void Block::wait(Waiting& waiting) {
  waiting.push_back(current);
  switch_context(contexts_[current], scheduler_);
}

void Block::wake(Waiting& waiting) {
  ready_.insert(ready_.end(), waiting.begin(), waiting.end());
  waiting.clear();
}

char* Block::shared(uint32_t address, int bytes) {
  if (address < SHARED_BEGIN || address + bytes > SHARED_BEGIN + memory_.size())
    fail("shared memory has no address " + std::to_string(int64_t(address) - SHARED_BEGIN));
  return memory_.data() + (address - SHARED_BEGIN);
}

void Block::store(uint32_t address, const void* from, int bytes) {
  maybe_yield();
  shared(address, bytes);
  if (address % bytes) fail("shared memory is touched at an address that is no multiple of the size");
  write(address, from, bytes, current);
}

void Block::write(uint32_t address, const void* from, int bytes, int thread) {
  expect_none_claimed(address, bytes, thread);
  for (const Reduction& r : reductions_)
    if (r.read.empty() && address < r.from + r.bytes && r.from < address + bytes)
      fail("shared memory is overwritten that a reduction has not read");
  std::memcpy(shared(address, bytes), from, bytes);
  for (uint32_t unit = (address - SHARED_BEGIN) / 16; unit <= (address - SHARED_BEGIN + bytes - 1) / 16; ++unit) {
    dirty_[unit] = thread;
    unfenced_[thread].push_back(unit);
  }
}

void Block::load(uint32_t address, void* to, int bytes) {
  maybe_yield();
  const char* from = shared(address, bytes);
  if (address % bytes) fail("shared memory is touched at an address that is no multiple of the size");
  expect_none_claimed(address, bytes, current);
  std::memcpy(to, from, bytes);
}

void Block::fence_async_proxy(const std::source_location& at) {
  const std::pair place(at.file_name(), int(at.line()));
  const int number = fences_.try_emplace(place, int(fences_.size()) + 1).first->second;
  if (fault.kind == Fault::PROXY_FENCE && (fault.number == 0 || fault.number == number)) return;
  for (uint32_t unit : unfenced_[current])
    if (dirty_[unit] == current) dirty_[unit] = -1;
  unfenced_[current].clear();
  maybe_yield();
}

Mbarrier& Block::mbarrier(uint32_t address) {
  shared(address, 8);
  if (!mbarriers_.count(address)) fail("an mbarrier is used before it is initialised");
  return mbarriers_[address];
}

void Block::barrier_init(uint32_t address, int arrivals) {
  shared(address, 8);
  if (mbarriers_.count(address)) fail("an mbarrier is initialised twice");
  mbarriers_[address] = {arrivals, arrivals, 0, 0, int(mbarriers_.size()), {}};
}

void Block::barrier_arrive(uint32_t address, int64_t bytes) {
  maybe_yield();
  pass_on();
  Mbarrier& b = mbarrier(address);
  if (b.pending == 0) fail("more threads arrive at an mbarrier than it was made for");
  b.bytes += bytes;
  --b.pending;
  complete(b);
}

void Block::complete(Mbarrier& b) {
  if (b.pending > 0 || b.bytes != 0) return;
  b.parity ^= 1;
  b.pending = b.arrivals;
  wake(b.waiting);
}

void Block::barrier_wait(uint32_t address, int parity) {
  maybe_yield();
  Mbarrier& b = mbarrier(address);
  if (fault.kind == Fault::MBARRIER_WAIT && fault.number == b.number) return;
  while (b.parity == parity) {
    waits_for_[current] = "an mbarrier";
    wait(b.waiting);
  }
}

void Block::named(int id, int count, bool sync) {
  maybe_yield();
  if (id < 0 || id > 15 || count % 32) fail("no such named barrier");
  if (id > 0 ? fault.kind == Fault::NAMED_SYNC && fault.number == id : fault.kind == Fault::BLOCK_SYNC) return;
  pass_on();
  NamedBarrier& b = named_[id];
  if (b.arrived > 0 && b.threads != count) fail("threads disagree about the size of a named barrier");
  b.threads = count;
  if (++b.arrived > count) fail("more threads at a named barrier than it was made for");
  if (b.arrived == count) {
    b.arrived = 0;
    wake(b.waiting);
    maybe_yield();
  } else if (sync) {
    waits_for_[current] = "a named barrier";
    wait(b.waiting);
  }
}

void Block::copy(const Copy& given) {
  maybe_yield();
  Copy copy = given;
  const int row_bytes = 2 * copy.map.box_columns;
  if (copy.bytes > 0) {
    if ((copy.to | copy.bytes | reinterpret_cast<uintptr_t>(copy.map.data)) % 16) fail("a copy of bytes is not in 16s");
  } else if (copy.to % (8 * row_bytes)) {
    fail("the target of a swizzled copy is not aligned to its pattern");
  }
  shared(copy.to, copy.bytes > 0 ? copy.bytes : row_bytes * copy.map.box_rows);
  mbarrier(copy.barrier);
  copy.late = int(random() % 100) < late_copies_;
  copies_.push_back(copy);
}

// Whoever reads or writes shared memory meets no copy of a thread there that has not been waited for, nor what another
// thread has waited for but not passed on by a barrier.
void Block::expect_none_claimed(uint32_t address, int bytes, int reader) {
  for (uint32_t word = (address - SHARED_BEGIN) / 4; word <= (address - SHARED_BEGIN + bytes - 1) / 4; ++word) {
    const int claim = claimed_[word];
    if (claim > 0) fail("shared memory is touched where a copy has not been waited for (cp.async.wait_group)");
    if (claim < 0 && -claim - 1 != reader)
      fail("shared memory is touched that a copy of another thread wrote, without a barrier after its wait");
  }
}

void Block::copy_async(uint32_t to, const void* from, int unit, int bytes) {
  maybe_yield();
  char* at = shared(to, unit);
  if (to % unit || (bytes > 0 && reinterpret_cast<uintptr_t>(from) % unit)) fail("a copy is not aligned to its size");
  if (bytes < 0 || bytes > unit) fail("a copy reads more than it writes");
  ThreadCopies& copies = copies_of_[current];
  for (int n = 0; n < unit / 4; ++n) {
    int& claim = claimed_[(to - SHARED_BEGIN) / 4 + n];
    if (claim != 0 && -claim - 1 != current) fail("two copies to one place");
    claim = current + 1;
  }
  std::memset(at, 0xFF, unit);  // NaN in both types
  copies.unfinished.push_back({to, from, unit, bytes, copies.commits, false});
  if (int(random() % 100) >= late_copies_) land(copies.unfinished.back());
}

void Block::land(ThreadCopy& c) {
  if (c.landed) return;
  char* to = memory_.data() + (c.to - SHARED_BEGIN);
  std::memset(to, 0, c.unit);
  if (c.bytes > 0) std::memcpy(to, c.from, c.bytes);
  c.landed = true;
}

void Block::copy_wait(int pending) {
  maybe_yield();
  if (fault.kind == Fault::COPY_WAIT) return;
  ThreadCopies& copies = copies_of_[current];
  while (!copies.unfinished.empty() && copies.unfinished.front().group < copies.commits - pending) {
    ThreadCopy& c = copies.unfinished.front();
    land(c);
    for (int n = 0; n < c.unit / 4; ++n) claimed_[(c.to - SHARED_BEGIN) / 4 + n] = -(current + 1);
    dirty_[(c.to - SHARED_BEGIN) / 16] = current;
    unfenced_[current].push_back((c.to - SHARED_BEGIN) / 16);
    copies.own.push_back(c);
    copies.unfinished.pop_front();
  }
}

// The thread comes to a barrier: others may read what its copies brought.
void Block::pass_on() {
  for (const ThreadCopy& c : copies_of_[current].own)
    for (int n = 0; n < c.unit / 4; ++n) {
      int& claim = claimed_[(c.to - SHARED_BEGIN) / 4 + n];
      if (claim == -(current + 1)) claim = 0;
    }
  copies_of_[current].own.clear();
}

void Block::reduce(float* to, uint32_t from, int bytes) {
  maybe_yield();
  if ((from | bytes | reinterpret_cast<uintptr_t>(to)) % 16) fail("a reduction is not in 16s");
  shared(from, bytes);
  reductions_.push_back({to, from, bytes, current, reduction_commits_[current], int(random() % 100) < late_copies_});
}

void Block::reduce_wait(int pending, bool read) {
  maybe_yield();
  if (fault.kind == Fault::REDUCE_WAIT && fault.number == (read ? 1 : 2)) return;
  const auto awaited = [&](const Reduction& r) {
    return r.thread == current && r.group < reduction_commits_[current] - pending && !(read && !r.read.empty());
  };
  while (std::any_of(reductions_.begin(), reductions_.end(), awaited)) {
    waits_for_[current] = "a reduction";
    wait(reduction_waiting_);
  }
}

// Reads, or adds what it has read.
void Block::go_on(size_t n) {
  Reduction& r = reductions_[n];
  const int count = r.bytes / 4;
  if (r.read.empty()) {
    for (int unit = 0; unit < r.bytes / 16; ++unit)
      if (dirty_[(r.from - SHARED_BEGIN) / 16 + unit] >= 0 && failure_.empty())
        failure_ = "a reduction reads ordinary writes that were not fenced for it";
    r.read.resize(count);
    std::memcpy(r.read.data(), shared(r.from, r.bytes), r.bytes);
  } else {
    for (int i = 0; i < count; ++i) r.to[i] += r.read[i];
    reductions_.erase(reductions_.begin() + n);
  }
  wake(reduction_waiting_);
}

void Block::warp_sync() {
  maybe_yield();
  if (fault.kind == Fault::WARP_SYNC) return;
  pass_on();
  int nothing = 0;
  meet("a barrier of a warp", 0, nothing, [](auto&&) {});
}

void Block::load_matrices(uint32_t (&x)[4], uint32_t row, bool transposed) {
  struct Given {
    uint32_t* x;
    uint32_t row;
  } given{x, row};
  maybe_yield();
  meet("ldmatrix", transposed, given, [&](auto&& of) {
    uint16_t matrix[4][8][8];
    for (int lane = 0; lane < 32; ++lane) {
      const uint32_t at = of(lane).row;
      const char* from = shared(at, 16);
      if (at % 16) fail("a row of a matrix is not on 16 bytes");
      expect_none_claimed(at, 16, -1);  // the lanes read each other's rows
      std::memcpy(matrix[lane / 8][lane % 8], from, 16);
    }
    for (int lane = 0; lane < 32; ++lane)
      for (int r = 0; r < 4; ++r) {
        const int outer = lane / 4, inner = 2 * (lane % 4);
        const uint16_t low = transposed ? matrix[r][inner][outer] : matrix[r][outer][inner];
        const uint16_t high = transposed ? matrix[r][inner + 1][outer] : matrix[r][outer][inner + 1];
        of(lane).x[r] = uint32_t(low) | uint32_t(high) << 16;
      }
  });
}

void Block::store_matrices(uint32_t row, const uint32_t (&x)[4]) {
  struct Given {
    uint32_t row;
    const uint32_t* x;
  } given{row, x};
  maybe_yield();
  meet("stmatrix", 0, given, [&](auto&& of) {
    for (int lane = 0; lane < 32; ++lane) {
      uint32_t words[4];
      for (int n = 0; n < 4; ++n) words[n] = of(4 * (lane % 8) + n).x[lane / 8];
      if (of(lane).row % 16) fail("a row of a matrix is not on 16 bytes");
      write(of(lane).row, words, 16, current / 32 * 32 + lane);
    }
  });
}

void Block::mma(float* d, const uint32_t (&a)[4], const uint32_t (&b)[2], bool bf16) {
  struct Given {
    float* d;
    const uint32_t *a, *b;
  } given{d, a, b};
  meet("mma.sync", bf16, given, [&](auto&& of) {
    const auto convert = [bf16](uint32_t word, int half) {
      const uint16_t x = uint16_t(word >> (16 * half));
      return bf16 ? from_bfloat(x) : from_half(x);
    };
    float rows[16][16], columns[16][8];  // A and B
    for (int lane = 0; lane < 32; ++lane)
      for (int half = 0; half < 2; ++half) {
        const int outer = lane / 4, inner = 2 * (lane % 4) + half;
        for (int r = 0; r < 4; ++r) rows[outer + 8 * (r % 2)][inner + 8 * (r / 2)] = convert(of(lane).a[r], half);
        for (int r = 0; r < 2; ++r) columns[inner + 8 * r][outer] = convert(of(lane).b[r], half);
      }
    float sums[16][8];
    for (int lane = 0; lane < 32; ++lane)
      for (int i = 0; i < 4; ++i) sums[lane / 4 + 8 * (i / 2)][2 * (lane % 4) + i % 2] = of(lane).d[i];
    for (int m = 0; m < 16; ++m)
      for (int k = 0; k < 16; ++k)
        for (int n = 0; n < 8; ++n) sums[m][n] += rows[m][k] * columns[k][n];
    for (int lane = 0; lane < 32; ++lane)
      for (int i = 0; i < 4; ++i) of(lane).d[i] = sums[lane / 4 + 8 * (i / 2)][2 * (lane % 4) + i % 2];
  });
}

// One copy in flight lands, one reduction goes on or one product that is waited for is computed; late ones when nothing
// else can happen, reductions last of all.
bool Block::finish_one(bool any) {
  std::vector<int> can;  // copies, then warps, then reductions
  const size_t reductions = copies_.size() + warps_.size();
  for (size_t n = 0; n < copies_.size(); ++n)
    if (any || !copies_[n].late) can.push_back(int(n));
  for (size_t n = 0; any && n < warps_.size(); ++n)
    if (warps_[n].wanted > 0) can.push_back(int(copies_.size() + n));
  for (size_t n = 0; n < reductions_.size(); ++n)
    if (!reductions_[n].late) can.push_back(int(reductions + n));
  if (can.empty() && any && !reductions_.empty()) can.push_back(int(reductions));
  if (can.empty()) return false;
  const bool copy_first = int(random() % 100) < copies_first_;
  const auto others =
      std::partition(can.begin(), can.end(), [&](int n) { return (n < int(copies_.size())) == copy_first; });
  const size_t preferred = others - can.begin();
  const size_t n = can[random() % (preferred ? preferred : can.size())];
  if (n < copies_.size()) {
    const Copy copy = copies_[n];
    copies_.erase(copies_.begin() + n);
    land(copy);
    return true;
  }
  if (n >= reductions) {
    go_on(n - reductions);
    return true;
  }
  Warp& w = warps_[n - copies_.size()];
  int64_t next = w.first;
  while (next < w.wanted && w.products[next - w.first].done) ++next;
  if (next < w.wanted) execute(w, next++);
  if (next >= w.wanted) {
    w.wanted = 0;
    wake(w.product_waiting);
  }
  return true;
}

void Block::land(const Copy& c) {
  const TensorMap& m = c.map;
  const int row_bytes = 2 * m.box_columns;
  const auto written = [&](uint32_t to) {
    if (dirty_[(to - SHARED_BEGIN) / 16] >= 0 && failure_.empty())
      failure_ = "a bulk copy overwrites ordinary writes that were not fenced for it";
  };
  for (int n = 0; n < c.bytes; ++n) {
    memory_[c.to + n - SHARED_BEGIN] = m.data[n];
    written(c.to + n);
  }
  for (int r = 0; r < m.box_rows; ++r) {
    const int64_t row = int64_t(c.at[1]) + r;
    const bool in =
        row >= 0 && row < m.size[1] && c.at[2] >= 0 && c.at[2] < m.size[2] && c.at[3] >= 0 && c.at[3] < m.size[3];
    const char* from = m.data + row * m.stride[1] + c.at[2] * m.stride[2] + c.at[3] * m.stride[3];
    for (int x = 0; x < m.box_columns; ++x) {
      const int64_t column = int64_t(c.at[0]) + x;
      uint16_t value = 0;
      if (in && column >= 0 && column < m.size[0]) std::memcpy(&value, from + 2 * column, 2);
      uint32_t to = c.to + r * row_bytes + 2 * x;
      to ^= (to >> 7 & (row_bytes == 128 ? 7 : 3)) << 4;
      std::memcpy(memory_.data() + (to - SHARED_BEGIN), &value, 2);
      written(to);
    }
  }
  Mbarrier& b = mbarriers_[c.barrier];
  b.bytes -= int64_t(row_bytes) * m.box_rows + c.bytes;
  complete(b);
}

void Block::issue(const Product& product, float* d, const uint32_t* registers) {
  maybe_yield();
  Warp& w = warp();
  Lane& l = lane();
  const int at = current % 32, count = product.n / 2;
  if (!l.fenced) fail("a product begins without wgmma.fence after registers were free to be touched");
  const int64_t number = l.issued++;
  if (number == w.first + int64_t(w.products.size())) {
    w.products.push_back(product);
    w.products.back().group = l.commits;
    w.products.back().late = int(random() % 100) < late_products_;
  }
  Product& p = w.products[number - w.first];
  if (p.n != product.n || p.a != product.a || p.b != product.b || p.accumulate != product.accumulate ||
      p.group != l.commits)
    fail("lanes of a warp disagree about a product");
  p.accumulators[at] = d;
  p.registers[at] = registers;
  if (registers) std::copy(registers, registers + 4, p.copies[at].begin());
  auto found = std::find_if(l.pending.begin(), l.pending.end(), [&](const Pending& x) { return x.own == d; });
  if (found == l.pending.end()) {
    l.pending.push_back({d, std::vector<float>(d, d + count), number});
    std::fill(d, d + count, poison());
  } else {
    if (!std::all_of(d, d + count, is_poison)) fail("accumulators were touched while a product adds to them");
    found->last = number;
  }
  if (++p.lanes < 32) return;
  // All are here: the product may read its operands now, or not before somebody waits for it.
  while (true) {
    int64_t n = w.first;
    for (const Product& x : w.products)
      if (x.done) ++n;
    if (n > number || w.products[n - w.first].late || w.products[n - w.first].lanes < 32) break;
    execute(w, n);
  }
  wake(w.product_waiting);
}

void Block::wait_for_products(int pending) {
  maybe_yield();
  Warp& w = warp();
  Lane& l = lane();
  l.fenced = fault.kind == Fault::PRODUCT_WAIT && l.fenced;
  if (fault.kind == Fault::PRODUCT_WAIT) return;
  const int target = l.commits - pending;  // groups below it
  const auto covered = [&](int64_t n) { return w.products[n - w.first].group < target; };
  for (int64_t n = w.first; n < l.issued && covered(n); ++n)
    while (n >= w.first && w.products[n - w.first].lanes < 32) {
      waits_for_[current] = "a product that other lanes have not begun";
      wait(w.product_waiting);
    }
  for (int64_t n = w.first; n < l.issued && covered(n); ++n)
    while (n >= w.first && !w.products[n - w.first].done) {
      if (!w.products[n - w.first].late) {
        execute(w, n);
        continue;
      }
      w.wanted = std::max(w.wanted, n + 1);
      waits_for_[current] = "a product";
      wait(w.product_waiting);
    }
  for (size_t x = 0; x < l.pending.size();) {
    Pending& p = l.pending[x];
    if (p.last >= w.first && !covered(p.last)) {
      ++x;
      continue;
    }
    if (!std::all_of(p.own, p.own + p.values.size(), is_poison))
      fail("accumulators were touched while a product adds to them");
    std::copy(p.values.begin(), p.values.end(), p.own);
    l.pending.erase(l.pending.begin() + x);
  }
  // Products that every lane has seen done are forgotten.
  while (!w.products.empty() && w.products.front().done) {
    const bool held = std::any_of(w.lanes.begin(), w.lanes.end(), [&](const Lane& other) {
      return other.issued <= w.first || std::any_of(other.pending.begin(), other.pending.end(),
                                                    [&](const Pending& p) { return p.last >= w.first; });
    });
    if (held) break;
    w.products.pop_front();
    ++w.first;
  }
}

uint16_t Block::element(uint32_t address) {
  const char* at = shared(address, 2);
  expect_none_claimed(address, 2, -1);
  if (dirty_[(address - SHARED_BEGIN) / 16] >= 0)
    fail("a product reads ordinary writes to shared memory that were not fenced for it (fence.proxy.async)");
  uint16_t x;
  std::memcpy(&x, at, 2);
  return x;
}

namespace {
// Where element (outer, inner) of an operand lies, as its descriptor says.
uint32_t operand_address(uint64_t descriptor, bool mn_major, int outer, int inner) {
  const uint32_t start = uint32_t(descriptor & 0x3FFF) << 4;
  const uint32_t leading = uint32_t(descriptor >> 16 & 0x3FFF) << 4, stride = uint32_t(descriptor >> 32 & 0x3FFF) << 4;
  const int mode = int(descriptor >> 62), row_bytes = mode == 1 ? 128 : 64;
  uint32_t at = start;
  if (mn_major) {
    const int wide = row_bytes / 2;
    at += outer / wide * leading + inner / 8 * stride + inner % 8 * row_bytes + outer % wide * 2;
  } else {
    at += outer / 8 * stride + outer % 8 * row_bytes + inner * 2;
  }
  return at ^ (at >> 7 & (mode == 1 ? 7 : 3)) << 4;
}
}  // namespace

void Block::execute(Warp& w, int64_t number) {
  Product& p = w.products[number - w.first];
  const auto convert = p.bf16 ? from_bfloat : from_half;
  const int warp_of_group = int(&w - warps_.data()) % 4;
  float a[16][16], acc[16][256];
  static float b[16][256];
  for (int k = 0; k < 16; ++k)
    for (int n = 0; n < p.n; ++n) b[k][n] = convert(element(operand_address(p.b, p.b_is_mn, n, k)));
  for (int lane = 0; lane < 32; ++lane) {
    if (p.registers[lane] && std::memcmp(p.registers[lane], p.copies[lane].data(), 16) != 0)
      fail("registers of A were touched while a product reads them");
    for (int x = 0; x < 8 && p.registers[lane]; ++x) {
      const uint16_t half = uint16_t(p.copies[lane][x / 2] >> (x % 2 * 16));
      a[lane / 4 + 8 * (x / 2 % 2)][2 * (lane % 4) + x % 2 + 8 * (x / 4)] = convert(half);
    }
  }
  if (p.a_is_shared)
    for (int r = 0; r < 16; ++r)
      for (int k = 0; k < 16; ++k)
        a[r][k] = convert(element(operand_address(p.a, p.a_is_mn, 16 * warp_of_group + r, k)));
  std::array<Pending*, 32> targets;
  for (int lane = 0; lane < 32; ++lane) {
    auto& pending = w.lanes[lane].pending;
    const auto it =
        std::find_if(pending.begin(), pending.end(), [&](const Pending& x) { return x.own == p.accumulators[lane]; });
    targets[lane] = &*it;
    for (int i = 0; i < p.n / 2; ++i)
      acc[lane / 4 + 8 * (i / 2 % 2)][8 * (i / 4) + 2 * (lane % 4) + i % 2] = p.accumulate ? it->values[i] : 0.f;
  }
  for (int r = 0; r < 16; ++r)
    for (int k = 0; k < 16; ++k) {
      const float x = a[r][k];
      float* sums = acc[r];
      const float* row = b[k];
      for (int n = 0; n < p.n; ++n) sums[n] += x * row[n];
    }
  for (int lane = 0; lane < 32; ++lane)
    for (int i = 0; i < p.n / 2; ++i)
      targets[lane]->values[i] = acc[lane / 4 + 8 * (i / 2 % 2)][8 * (i / 4) + 2 * (lane % 4) + i % 2];
  p.done = true;
}

}  // namespace emulation
