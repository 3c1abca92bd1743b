// Tensor cores, and the loads and stores of matrices that feed them: operands are read when the machine likes, as late
// as somebody waits; accumulators are poisoned until then.
#include <algorithm>

#include "block.h"

namespace emulation {

namespace {

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
