#include "runtime/cache.h"

#include <algorithm>

namespace duplex::runtime {
namespace {

constexpr int64_t MAX_LENGTH = int64_t(1) << 30;  // positions are 32-bit

[[noreturn]] void wrong(const std::string& name, const std::string& expected, const std::string& got) {
  throw std::invalid_argument(name + ": expected " + expected + ", got " + got);
}

// Room that grows as a vector's own does, so that what follows cannot fail.
void grow(std::vector<int32_t>& values, int64_t more) {
  const size_t needed = values.size() + size_t(more);
  if (needed > values.capacity()) values.reserve(std::max(needed, 2 * values.capacity()));
}

void check_mine(const Sequence* seq, const Cache* cache) {
  if (!seq) wrong("seq", "a sequence of this cache", "None");
  if (seq->state == State::FREED) wrong("seq", "a live sequence", "one that was freed");
  if (seq->owner != cache) wrong("seq", "a sequence of this cache", "one of another");
}

void check_here(const Sequence* seq, const Cache* cache) {
  check_mine(seq, cache);
  if (seq->state == State::SWAPPED) wrong("seq", "a sequence in the pool", "one that is swapped out");
}

}  // namespace

Cache::Cache(int32_t num_pages, int32_t page_size, int hash_bits)
    : page_size_(page_size),
      pool_(num_pages),
      index_(pool_, page_size, hash_bits),
      copies_(pool_),
      leaving_(num_pages) {}

Cache::~Cache() {
  for (const SequencePtr& seq : sequences_) seq->state = State::FREED;  // handles may outlive the cache
}

SequencePtr Cache::add(std::vector<int32_t> tokens, int64_t bidirectional_prefix, std::string_view salt) {
  const auto seq = std::make_shared<Sequence>();
  seq->owner = this;
  seq->tokens = std::move(tokens);
  seq->bidirectional_prefix = bidirectional_prefix;
  const int64_t length = seq->length();
  if (bidirectional_prefix < 0 || bidirectional_prefix > length)
    wrong("bidirectional_prefix", "0 to " + std::to_string(length) + " tokens", std::to_string(bidirectional_prefix));
  check_growth(*seq, 0);

  const std::span<const int32_t> prefix(seq->tokens.data(), size_t(bidirectional_prefix));
  std::vector<int32_t> found;
  if (const auto root = index_.find_root(salt, prefix); root && length > 0)
    found = find_prefix(*root, seq->tokens, (length - 1) / page_size_);  // the last token is always computed
  if (int64_t(found.size()) * page_size_ < bidirectional_prefix) found.clear();
  const int64_t needed = pages_of(length);
  require(needed - int64_t(found.size()), pool_.available() - idle_among(found));
  seq->pages.reserve(needed);
  remember(seq);
  try {
    seq->root = index_.acquire_root(salt, prefix);
  } catch (...) {
    sequences_.pop_back();
    throw;
  }

  for (const int32_t page : found) {
    pool_.hold(page);
    seq->pages.push_back(page);
  }
  seq->tip = found.empty() ? Tip{seq->root} : Tip{found.back(), index_.stamp(found.back()), int64_t(found.size())};
  seq->cached = seq->committed = int64_t(found.size()) * page_size_;
  take_pages(*seq);
  lookup_tokens_ += length;
  hit_tokens_ += seq->cached;
  return seq;
}

void Cache::extend(Sequence& seq, std::span<const int32_t> tokens) {
  const int64_t count = int64_t(tokens.size());
  check_here(&seq, this);
  check_growth(seq, count);
  reserve(seq, count);
  if (count > 0) own_the_end(seq);
  seq.tokens.insert(seq.tokens.end(), tokens.begin(), tokens.end());
  take_pages(seq);
}

void Cache::extend(Sequence& seq, int64_t count) {
  check_here(&seq, this);
  if (count < 0) wrong("n", "0 or more tokens", std::to_string(count));
  check_growth(seq, count);
  reserve(seq, count);
  if (count > 0) own_the_end(seq);
  seq.tokens.resize(seq.tokens.size() + count, UNKNOWN);
  take_pages(seq);
}

void Cache::append(const std::vector<SequencePtr>& seqs, std::span<const int32_t> tokens) {
  if (seqs.size() != tokens.size())
    wrong("tokens", "one for each of " + std::to_string(seqs.size()) + " sequences", std::to_string(tokens.size()));
  ++visits_;
  for (const SequencePtr& seq : seqs) {
    check_here(seq.get(), this);
    if (std::exchange(seq->visit, visits_) == visits_) wrong("seqs", "each sequence once", "one twice");
    check_growth(*seq, 1);
  }
  int64_t needed = 0, copies = 0;
  for (const SequencePtr& seq : seqs) {
    needed += pages_of(seq->length() + 1) - int64_t(seq->pages.size());
    if (shares_its_end(*seq)) {  // of the sequences that share a page the last one to leave may keep it
      ++leaving_[seq->pages.back()];
      ++copies;
    }
  }
  for (const SequencePtr& seq : seqs) leaving_[seq->pages.empty() ? 0 : seq->pages.back()] = 0;
  require(needed + copies, pool_.available());
  copies_.reserve(copies);
  for (const SequencePtr& seq : seqs) {
    grow(seq->tokens, 1);
    grow(seq->pages, 1);
  }
  for (size_t n = 0; n < seqs.size(); ++n) {
    own_the_end(*seqs[n]);
    seqs[n]->tokens.push_back(tokens[n]);
    take_pages(*seqs[n]);
  }
}

SequencePtr Cache::fork(const Sequence& seq) {
  check_here(&seq, this);
  if (seq.committed < seq.length())
    wrong("seq", "a sequence whose " + std::to_string(seq.length()) + " tokens are all committed before it is forked",
          std::to_string(seq.committed) + " of them");
  const auto twin = std::make_shared<Sequence>(seq);
  twin->cached = twin->length();
  remember(twin);
  index_.share_root(twin->root);
  for (const int32_t page : twin->pages) pool_.hold(page);
  return twin;
}

void Cache::truncate(Sequence& seq, int64_t length) {
  check_here(&seq, this);
  if (length < seq.bidirectional_prefix || length > seq.length())
    wrong("n",
          (seq.bidirectional_prefix ? "the bidirectional prefix (" + std::to_string(seq.bidirectional_prefix) + ")"
                                    : "0") +
              " to the sequence's length (" + std::to_string(seq.length()) + ")",
          std::to_string(length));
  release_pages(seq, pages_of(length));
  seq.tokens.resize(length);
  seq.committed = std::min(seq.committed, length);
  seq.cached = std::min(seq.cached, length);
  rewind(seq);
}

void Cache::free(Sequence& seq) {
  check_mine(&seq, this);
  release_pages(seq, 0);
  index_.release_root(seq.root);
  seq.state = State::FREED;
  seq.tokens = std::vector<int32_t>();  // gives the memory back, which = {} keeps: handles may stay for long
  seq.pages = std::vector<int32_t>();
  seq.committed = seq.cached = 0;
  const size_t place = seq.place;
  sequences_.back()->place = place;
  std::swap(sequences_[place], sequences_.back());
  sequences_.pop_back();  // may be the last owner of seq
}

void Cache::check_commit(const Sequence& seq, int64_t length) const {
  check_here(&seq, this);
  if (length < 0 || length > seq.length())
    wrong("length", "0 to " + std::to_string(seq.length()) + " tokens", std::to_string(length));
  if (length > seq.committed && length < seq.bidirectional_prefix)
    wrong("length", "the whole bidirectional prefix (" + std::to_string(seq.bidirectional_prefix) + ") at once",
          std::to_string(length));
}

void Cache::commit(Sequence& seq, int64_t length) {
  check_commit(seq, length);
  seq.committed = std::max(seq.committed, length);
  publish(seq);
}

void Cache::commit(const Batch& batch) {
  for (size_t b = 0; b < batch.seqs.size(); ++b) check_commit(*batch.seqs[b], batch.ends[b]);
  for (size_t b = 0; b < batch.seqs.size(); ++b) commit(*batch.seqs[b], batch.ends[b]);
}

Batch Cache::batch(std::vector<SequencePtr> seqs, const std::optional<std::vector<int64_t>>& new_tokens) {
  if (new_tokens && new_tokens->size() != seqs.size())
    wrong("new_tokens", "one for each of " + std::to_string(seqs.size()) + " sequences",
          std::to_string(new_tokens->size()));
  ++visits_;
  Batch made;
  made.starts.reserve(seqs.size());
  made.ends.reserve(seqs.size());
  for (size_t b = 0; b < seqs.size(); ++b) {
    Sequence* seq = seqs[b].get();
    check_here(seq, this);
    if (std::exchange(seq->visit, visits_) == visits_) wrong("seqs", "each sequence once", "one twice");
    const int64_t start = seq->committed, most = seq->length() - start, count = new_tokens ? (*new_tokens)[b] : most;
    if (count < 0 || count > most)
      wrong("new_tokens", "0 to the " + std::to_string(most) + " tokens not yet committed", std::to_string(count));
    if (count > 0 && start + count < seq->bidirectional_prefix)
      wrong("new_tokens", "the whole bidirectional prefix (" + std::to_string(seq->bidirectional_prefix) + ") at once",
            std::to_string(count));
    made.starts.push_back(start);
    made.ends.push_back(start + count);
    made.max_pages = std::max(made.max_pages, pages_of(start + count));
    made.max_seqlen_q = std::max(made.max_seqlen_q, count);
    made.max_seqlen_k = std::max(made.max_seqlen_k, start + count);
    made.new_tokens += count;
  }
  if (made.new_tokens > INT32_MAX) wrong("new_tokens", "a sum that 32 bits hold", std::to_string(made.new_tokens));
  made.seqs = std::move(seqs);
  return made;
}

std::span<const int32_t> Cache::written_pages(const Sequence& seq) const {
  check_here(&seq, this);
  return {seq.pages.data(), size_t(pages_of(seq.committed))};
}

void Cache::swap_out(Sequence& seq) {
  check_here(&seq, this);
  for (const int32_t page : seq.pages)
    if (copies_.into(page)) throw std::logic_error("pending copies must be made before a sequence is swapped out");
  release_pages(seq, 0);
  seq.tip = {seq.root};
  seq.state = State::SWAPPED;
}

int64_t Cache::swap_in(Sequence& seq) {
  check_mine(&seq, this);
  if (seq.state != State::SWAPPED) wrong("seq", "a sequence that is swapped out", "one in the pool");
  const std::vector<int32_t> found = find_prefix(seq.root, seq.tokens, seq.committed / page_size_);
  const int64_t needed = pages_of(seq.length());
  require(needed - int64_t(found.size()), pool_.available() - idle_among(found));
  grow(seq.pages, needed);
  for (const int32_t page : found) {
    pool_.hold(page);
    seq.pages.push_back(page);
  }
  if (!found.empty()) seq.tip = {found.back(), index_.stamp(found.back()), int64_t(found.size())};
  seq.state = State::LIVE;
  take_pages(seq);
  return int64_t(found.size());
}

Stats Cache::stats() const {
  Stats s{};
  s.pages_total = pool_.size();
  s.pages_cached = pool_.kept();
  s.pages_free = pool_.free();
  s.pages_used = s.pages_total - s.pages_cached - s.pages_free;
  for (int32_t page = 0; page < pool_.size(); ++page) s.pages_shared += pool_.refs(page) > 1;
  std::vector<int32_t> slots(pool_.size());  // used by the longest holder
  for (const SequencePtr& seq : sequences_) {
    s.swapped += seq->state == State::SWAPPED;
    for (size_t n = 0; n < seq->pages.size(); ++n) {
      const int64_t here = std::min<int64_t>(page_size_, seq->length() - int64_t(n) * page_size_);
      slots[seq->pages[n]] = std::max(slots[seq->pages[n]], int32_t(here));
    }
  }
  for (int32_t page = 0; page < pool_.size(); ++page)
    if (pool_.refs(page) > 0) s.slots_wasted += page_size_ - slots[page];
  s.sequences = int64_t(sequences_.size());
  s.lookup_tokens = lookup_tokens_;
  s.hit_tokens = hit_tokens_;
  return s;
}

void Cache::require_room(int64_t length) const {
  check_growth(Sequence{}, length);
  require(pages_of(length), pool_.available());
}

void Cache::require(int64_t pages, int64_t available) const {
  if (pages > available)
    throw OutOfPages("expected " + std::to_string(pages) + " pages, " + std::to_string(available) + " of " +
                     std::to_string(pool_.size()) + " are available");
}

void Cache::check_growth(const Sequence& seq, int64_t count) const {
  if (count > MAX_LENGTH - seq.length())
    wrong("tokens", "a sequence of at most " + std::to_string(MAX_LENGTH) + " tokens",
          std::to_string(seq.length()) + " and " + std::to_string(count) + " more");
}

// The next token goes into a page that others read.
bool Cache::shares_its_end(const Sequence& seq) const {
  if (seq.length() % page_size_ == 0) return false;
  const int32_t page = seq.pages.back();
  return pool_.refs(page) - leaving_[page] > 1;
}

// Everything that can fail when a sequence grows.
void Cache::reserve(Sequence& seq, int64_t count) {
  const int64_t copies = count > 0 && shares_its_end(seq);
  require(pages_of(seq.length() + count) - int64_t(seq.pages.size()) + copies, pool_.available());
  copies_.reserve(copies);
  grow(seq.tokens, count);
  grow(seq.pages, pages_of(seq.length() + count) - int64_t(seq.pages.size()));
}

// Copy on write: makes the partly filled last page the sequence's own.
void Cache::own_the_end(Sequence& seq) {
  if (seq.length() % page_size_ == 0) return;
  const int32_t page = seq.pages.back();
  if (pool_.refs(page) > 1) {
    seq.pages.back() = take();
    copies_.add(page, seq.pages.back());
    release(page);
  } else if (index_.contains(page)) {
    index_.erase(page);  // a continuation that was given up: nobody else has it
  }
}

void Cache::take_pages(Sequence& seq) {
  for (int64_t more = pages_of(seq.length()) - int64_t(seq.pages.size()); more > 0; --more) seq.pages.push_back(take());
}

int32_t Cache::take() {
  if (pool_.free() == 0) index_.erase(pool_.oldest_kept());
  return pool_.take();
}

void Cache::release(int32_t page) {
  if (pool_.refs(page) == 1 && copies_.into(page)) copies_.cancel(page);
  pool_.release(page);
}

// From the end, so that of a prefix in the index the end is given up first.
void Cache::release_pages(Sequence& seq, int64_t keep) {
  while (int64_t(seq.pages.size()) > keep) {
    release(seq.pages.back());
    seq.pages.pop_back();
  }
}

std::vector<int32_t> Cache::find_prefix(Node root, std::span<const int32_t> tokens, int64_t most) const {
  std::vector<int32_t> found;
  for (Node node = root; int64_t(found.size()) < most; found.push_back(node)) {
    node = index_.find(node, tokens.data() + found.size() * page_size_);
    if (node == NO_PAGE) break;
  }
  return found;
}

int64_t Cache::idle_among(std::span<const int32_t> pages) const {
  return std::ranges::count_if(pages, [&](int32_t page) { return pool_.idle(page); });
}

bool Cache::is_valid(const Tip& tip) const {
  return tip.depth == 0 || (index_.contains(tip.node) && index_.stamp(tip.node) == tip.stamp);
}

// Brings the tip back to what is committed.
void Cache::rewind(Sequence& seq) {
  if (!is_valid(seq.tip)) seq.tip = {seq.root};
  while (seq.tip.depth > seq.committed / page_size_) {
    const Node above = index_.parent(seq.tip.node);
    seq.tip = {above, above < 0 ? 0 : index_.stamp(above), seq.tip.depth - 1};
  }
}

// Offers the full committed pages to others.
void Cache::publish(Sequence& seq) {
  if (!is_valid(seq.tip)) seq.tip = {seq.root};
  while (seq.tip.depth < seq.committed / page_size_) {
    const int32_t* tokens = seq.tokens.data() + seq.tip.depth * page_size_;
    if (std::find(tokens, tokens + page_size_, UNKNOWN) != tokens + page_size_) return;
    int32_t page = index_.find(seq.tip.node, tokens);
    if (page == NO_PAGE) {
      page = seq.pages[seq.tip.depth];
      index_.insert(seq.tip.node, tokens, page);
    }
    seq.tip = {page, index_.stamp(page), seq.tip.depth + 1};
  }
}

void Cache::remember(SequencePtr seq) {
  seq->place = sequences_.size();
  sequences_.push_back(std::move(seq));
}

}  // namespace duplex::runtime
