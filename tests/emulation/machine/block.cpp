#include "block.h"

#include <algorithm>

namespace emulation {

Block* block = nullptr;
Fault fault;

namespace {
Stacks stacks;
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

}  // namespace emulation
