// The bookkeeping of a paged KV cache: which sequence has which pages. It moves no keys and values, it says what to
// move.
#pragma once

#include <stdint.h>

#include <memory>
#include <optional>
#include <span>
#include <stdexcept>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "runtime/batch.h"
#include "runtime/pending_copies.h"
#include "runtime/pool.h"
#include "runtime/prefix_index.h"
#include "runtime/sequence.h"

namespace duplex::runtime {

struct OutOfPages : std::runtime_error {
  using std::runtime_error::runtime_error;
};

struct Stats {
  int64_t pages_total, pages_used, pages_shared, pages_cached, pages_free;
  int64_t slots_wasted;  // of used pages, not used by any sequence
  int64_t sequences, swapped;
  int64_t lookup_tokens, hit_tokens;
};

using SequencePtr = std::shared_ptr<Sequence>;

// Every call either does all of what it says, or throws and has changed nothing: std::invalid_argument for what the
// caller got wrong, OutOfPages for what does not fit now.
//
// What keeps a page from being written under a reader: slots from `committed` on are the ones still to be written, and
// the pages they lie in belong to one sequence alone and are not in the prefix index.
class Cache {
 public:
  Cache(int32_t num_pages, int32_t page_size, int hash_bits);
  ~Cache();
  Cache(const Cache&) = delete;

  // Tokens are all known, or all UNKNOWN: a bidirectional prefix of which some are known would be shared on those.
  SequencePtr add(std::vector<int32_t> tokens, int64_t bidirectional_prefix, std::string_view salt);
  void extend(Sequence& seq, std::span<const int32_t> tokens);
  void extend(Sequence& seq, int64_t count);                                           // by unknown tokens
  void append(const std::vector<SequencePtr>& seqs, std::span<const int32_t> tokens);  // one token to each
  SequencePtr fork(const Sequence& seq);
  void truncate(Sequence& seq, int64_t length);
  void free(Sequence& seq);
  void commit(Sequence& seq, int64_t length);

  Batch batch(std::vector<SequencePtr> seqs, const std::optional<std::vector<int64_t>>& new_tokens);
  void commit(const Batch& batch);

  // The pages whose content must be saved before `swap_out`, and may be restored after `swap_in`: of those, the
  // leading ones that `swap_in` counts were found in the index. `commit` of the same length then offers them again.
  std::span<const int32_t> written_pages(const Sequence& seq) const;
  void swap_out(Sequence& seq);
  int64_t swap_in(Sequence& seq);

  const std::vector<Copy>& pending_copies() const { return copies_.all(); }
  void copies_made() { copies_.clear(); }

  Stats stats() const;
  std::vector<std::string> check() const;  // every inconsistency, in words
  int32_t page_size() const { return page_size_; }
  void require_room(int64_t length) const;  // OutOfPages unless a sequence of so many tokens fits now
  int32_t available_pages() const { return pool_.available(); }

 private:
  int64_t pages_of(int64_t length) const { return (length + page_size_ - 1) / page_size_; }
  void require(int64_t pages, int64_t available) const;
  void check_growth(const Sequence& seq, int64_t count) const;
  bool shares_its_end(const Sequence& seq) const;
  void reserve(Sequence& seq, int64_t count);
  void own_the_end(Sequence& seq);
  void take_pages(Sequence& seq);
  int32_t take();
  void release(int32_t page);
  void release_pages(Sequence& seq, int64_t keep);
  std::vector<int32_t> find_prefix(Node root, std::span<const int32_t> tokens, int64_t most) const;
  int64_t idle_among(std::span<const int32_t> pages) const;
  bool is_valid(const Tip& tip) const;
  void rewind(Sequence& seq);
  void publish(Sequence& seq);
  void check_commit(const Sequence& seq, int64_t length) const;
  void remember(SequencePtr seq);

  const int32_t page_size_;
  PagePool pool_;
  PrefixIndex index_;
  PendingCopies copies_;
  std::vector<SequencePtr> sequences_;  // in the pool or swapped out
  uint64_t visits_ = 0;
  std::vector<int32_t> leaving_;  // by page: how many of its holders the pass under way takes off it; 0 between passes
  int64_t lookup_tokens_ = 0, hit_tokens_ = 0;
};

}  // namespace duplex::runtime
