// Copies of page content that a fork left to be made before the next step: copy on write.
#pragma once

#include <stdint.h>

#include <vector>

#include "runtime/pool.h"

namespace duplex::runtime {

struct Copy {
  int32_t src, dst;
};

// The source is pinned until its content has been read. All copies may be made at once, in any order: no page is
// both a source and a destination.
class PendingCopies {
 public:
  explicit PendingCopies(PagePool& pool) : pool_(pool), into_(pool.size()) {}

  const std::vector<Copy>& all() const { return copies_; }
  bool into(int32_t page) const { return into_[page]; }

  void reserve(size_t more) {
    if (copies_.capacity() < copies_.size() + more) copies_.reserve(2 * (copies_.size() + more));
  }

  void add(int32_t src, int32_t dst) {
    if (into_[src])  // what is not there yet is read where it comes from
      for (const Copy& earlier : copies_)
        if (earlier.dst == src) {
          src = earlier.src;
          break;
        }
    pool_.pin(src);
    into_[dst] = true;
    copies_.push_back({src, dst});
  }

  // Nobody needs the destination any more.
  void cancel(int32_t dst) {
    for (size_t n = 0; n < copies_.size(); ++n)
      if (copies_[n].dst == dst) {
        into_[dst] = false;
        pool_.unpin(copies_[n].src);
        copies_[n] = copies_.back();
        copies_.pop_back();
        return;
      }
  }

  // They have been made.
  void clear() {
    for (const Copy& copy : copies_) {
      into_[copy.dst] = false;
      pool_.unpin(copy.src);
    }
    copies_.clear();
  }

 private:
  PagePool& pool_;
  std::vector<Copy> copies_;
  std::vector<bool> into_;  // by page
};

}  // namespace duplex::runtime
