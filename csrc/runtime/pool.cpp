#include "runtime/pool.h"

namespace duplex::runtime {

PagePool::PagePool(int32_t num_pages) : pages_(num_pages) {
  free_.reserve(num_pages);
  for (int32_t page = num_pages - 1; page >= 0; --page) free_.push_back(page);  // page 0 goes first
}

int32_t PagePool::take() {
  const int32_t page = free_.back();
  free_.pop_back();
  pages_[page].refs = 1;
  return page;
}

void PagePool::hold(int32_t page) {
  if (idle(page)) unlink(page);
  ++pages_[page].refs;
}

void PagePool::release(int32_t page) {
  --pages_[page].refs;
  if (idle(page)) settle(page);
}

void PagePool::unpin(int32_t page) {
  --pages_[page].pins;
  if (idle(page)) settle(page);
}

void PagePool::drop(int32_t page) {
  if (idle(page)) {
    unlink(page);
    free_.push_back(page);
  }
  pages_[page].keep = false;
}

void PagePool::settle(int32_t page) {
  Page& p = pages_[page];
  if (!p.keep) {
    free_.push_back(page);
    return;
  }
  p.older = newest_;
  p.newer = NO_PAGE;
  (newest_ == NO_PAGE ? oldest_ : pages_[newest_].newer) = page;
  newest_ = page;
  ++kept_;
}

void PagePool::unlink(int32_t page) {
  Page& p = pages_[page];
  (p.older == NO_PAGE ? oldest_ : pages_[p.older].newer) = p.newer;
  (p.newer == NO_PAGE ? newest_ : pages_[p.newer].older) = p.older;
  p.older = p.newer = NO_PAGE;
  --kept_;
}

}  // namespace duplex::runtime
