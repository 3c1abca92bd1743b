// What must hold between any two calls.
#include "runtime/cache.h"

namespace duplex::runtime {
namespace {

std::string of(const char* what, int64_t n) { return std::string(what) + " " + std::to_string(n); }

}  // namespace

std::vector<std::string> Cache::check() const {
  std::vector<std::string> faults;
  const auto expect = [&](bool holds, const std::string& fault) {
    if (!holds) faults.push_back(fault);
  };
  const int32_t pages = pool_.size();

  // Counts of references and of pins are those of the sequences and of the pending copies.
  std::vector<int32_t> refs(pages), pins(pages), copied(pages);
  std::vector<int64_t> uses;
  for (size_t place = 0; place < sequences_.size(); ++place) {
    const Sequence& seq = *sequences_[place];
    const std::string name = of("sequence", int64_t(place));
    expect(seq.place == place && seq.owner == this && seq.state != State::FREED, name + " is out of its place");
    const int64_t held = seq.state == State::SWAPPED ? 0 : pages_of(seq.length());
    expect(int64_t(seq.pages.size()) == held, name + " has another number of pages than its length needs");
    expect(seq.committed <= seq.length() && seq.bidirectional_prefix <= seq.length(), name + " has wrong lengths");
    for (const int32_t page : seq.pages) {
      if (page < 0 || page >= pages)
        faults.push_back(name + " has " + of("page", page));
      else
        ++refs[page];
    }
  }
  for (const Copy& copy : copies_.all()) {
    ++pins[copy.src];
    ++copied[copy.dst];
    expect(copies_.into(copy.dst) && refs[copy.dst] > 0, of("page", copy.dst) + " is copied into and nobody has it");
  }
  for (int32_t page = 0; page < pages; ++page) {
    const std::string name = of("page", page);
    expect(refs[page] == pool_.refs(page),
           name + " has " + of("references", pool_.refs(page)) + ", not " + of("", refs[page]));
    expect(pins[page] == pool_.pins(page),
           name + " has " + of("pins", pool_.pins(page)) + ", not " + of("", pins[page]));
    expect(copied[page] <= 1 && bool(copied[page]) == copies_.into(page), name + " is copied into more than once");
    expect(!copied[page] || !pins[page], name + " is copied into and from");
    expect(leaving_[page] == 0, name + " is left over from a pass");
  }

  // Every page is held, free or kept, and only one of these.
  std::vector<int32_t> idle(pages);
  for (const int32_t page : pool_.free_pages()) {
    ++idle[page];
    expect(!pool_.is_kept(page), of("page", page) + " is free and kept");
  }
  int32_t kept = 0, before = NO_PAGE;
  for (int32_t page = pool_.oldest_kept(); page != NO_PAGE && kept <= pages; page = pool_.newer(page), ++kept) {
    ++idle[page];
    expect(pool_.is_kept(page) && pool_.older(page) == before,
           of("page", page) + " is wrong in the list of kept pages");
    before = page;
  }
  expect(kept == pool_.kept(), "the list of kept pages has another length than is counted");
  for (int32_t page = 0; page < pages; ++page)
    expect(idle[page] == pool_.idle(page),
           of("page", page) + (idle[page] ? " is free twice or while held" : " is lost"));

  index_.check(faults);
  if (!faults.empty()) return faults;  // what follows relies on it

  // What a sequence writes is its own, and what it shares has its tokens.
  for (size_t place = 0; place < sequences_.size(); ++place) {
    const Sequence& seq = *sequences_[place];
    const std::string name = of("sequence", int64_t(place));
    for (size_t n = seq.committed / page_size_; n < seq.pages.size() && seq.committed < seq.length(); ++n)
      expect(refs[seq.pages[n]] == 1 && !index_.contains(seq.pages[n]),
             name + " writes into shared " + of("page", seq.pages[n]));
    for (size_t n = 0; n < seq.pages.size(); ++n) {
      if (!index_.contains(seq.pages[n])) continue;
      const auto tokens = index_.tokens(seq.pages[n]);
      const size_t first = n * page_size_, count = std::min(tokens.size(), seq.tokens.size() - first);
      expect(std::equal(tokens.begin(), tokens.begin() + count, seq.tokens.begin() + first),
             name + " has other tokens than " + of("page", seq.pages[n]) + " in the index");
    }
    if (!is_valid(seq.tip)) continue;
    expect(seq.tip.depth <= seq.committed / page_size_, name + " has more in the index than is committed");
    Node node = seq.tip.node;
    for (int64_t n = seq.tip.depth; n > 0; node = index_.parent(node), --n)
      expect(node >= 0 && std::equal(index_.tokens(node).begin(), index_.tokens(node).end(),
                                     seq.tokens.begin() + (n - 1) * page_size_),
             name + " has other tokens than its path in the index");
    expect(node == seq.root, name + " has a path in the index from another root");
  }
  return faults;
}

}  // namespace duplex::runtime
