// The pages of a cache, by id: who holds each, which are free, and which are kept for their content until needed.
#pragma once

#include <stdint.h>

#include <vector>

namespace duplex::runtime {

constexpr int32_t NO_PAGE = -1;

// A page is idle when no sequence holds it and no pending copy reads it. An idle page is either free, or kept: its
// content may be found again, and it waits in a list whose oldest page is the next to be given up.
// Nothing here allocates after construction, so nothing here fails halfway.
class PagePool {
 public:
  explicit PagePool(int32_t num_pages);

  int32_t size() const { return int32_t(pages_.size()); }
  int32_t free() const { return int32_t(free_.size()); }
  int32_t kept() const { return kept_; }  // idle ones
  int32_t available() const { return free() + kept(); }
  int32_t oldest_kept() const { return oldest_; }
  int32_t newer(int32_t page) const { return pages_[page].newer; }
  int32_t older(int32_t page) const { return pages_[page].older; }
  const std::vector<int32_t>& free_pages() const { return free_; }

  int32_t refs(int32_t page) const { return pages_[page].refs; }  // sequences that hold it
  int32_t pins(int32_t page) const { return pages_[page].pins; }  // pending copies that read it
  bool is_kept(int32_t page) const { return pages_[page].keep; }  // also while it is held
  bool idle(int32_t page) const { return pages_[page].refs == 0 && pages_[page].pins == 0; }

  int32_t take();  // a free page, held once; there must be one
  void hold(int32_t page);
  void release(int32_t page);
  void pin(int32_t page) { ++pages_[page].pins; }
  void unpin(int32_t page);
  void keep(int32_t page) { pages_[page].keep = true; }  // of a held page
  void drop(int32_t page);                               // no longer kept

 private:
  struct Page {
    int32_t refs = 0, pins = 0;
    int32_t older = NO_PAGE, newer = NO_PAGE;  // among the idle kept pages
    bool keep = false;
  };

  void settle(int32_t page);  // puts a page where it belongs that has just become idle
  void unlink(int32_t page);

  std::vector<Page> pages_;
  std::vector<int32_t> free_;  // a stack
  int32_t oldest_ = NO_PAGE, newest_ = NO_PAGE, kept_ = 0;
};

}  // namespace duplex::runtime
