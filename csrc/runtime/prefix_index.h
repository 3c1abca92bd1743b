// Which full pages hold which tokens: a tree whose paths are prefixes. A hash finds a page, its tokens prove it.
#pragma once

#include <stdint.h>

#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

#include "runtime/pool.h"

namespace duplex::runtime {

// A place in the tree: a page, or (negative) a root.
using Node = int32_t;

// A root stands for what every page below it depends on besides the tokens before it: the tenant's salt, and all tokens
// of the bidirectional prefix. Pages of equal tokens under different roots are different pages.
// A page is in the tree only while its parent is, so a path that is found is whole.
class PrefixIndex {
 public:
  // Of a hash only the lowest `hash_bits` are used, so that a test can make everything collide.
  PrefixIndex(PagePool& pool, int32_t page_size, int hash_bits);

  std::optional<Node> find_root(std::string_view salt, std::span<const int32_t> prefix) const;
  Node acquire_root(std::string_view salt, std::span<const int32_t> prefix);  // made where there is none
  void share_root(Node root) { ++roots_[~root].uses; }
  void release_root(Node root);

  int32_t find(Node parent, const int32_t* tokens) const;         // a page, or NO_PAGE
  void insert(Node parent, const int32_t* tokens, int32_t page);  // what `find` does not find
  void erase(int32_t page);                                       // and all below it
  bool contains(int32_t page) const { return entries_[page].inside; }

  // Changes whenever the page enters the tree: a remembered (page, stamp) tells whether it has been there since.
  uint32_t stamp(int32_t page) const { return entries_[page].stamp; }
  Node parent(int32_t page) const { return entries_[page].parent; }
  std::span<const int32_t> tokens(int32_t page) const {
    return {tokens_.get() + int64_t(page) * page_size_, size_t(page_size_)};
  }

  // Every fault in the tree's own structure, in words.
  void check(std::vector<std::string>& faults) const;

 private:
  struct Entry {
    uint64_t hash;
    Node parent;
    int32_t in_bucket = NO_PAGE;                // the next page of the bucket
    int32_t child = NO_PAGE;                    // the first of them
    int32_t before = NO_PAGE, after = NO_PAGE;  // siblings; not kept below a root, which never goes before its children
    uint32_t stamp = 0;
    bool inside = false;
  };
  struct Root {
    std::string salt;
    std::vector<int32_t> prefix;
    uint64_t hash;
    int64_t uses = 0;  // sequences, and pages right below it; 0: this place is free
  };

  uint64_t root_hash(std::string_view salt, std::span<const int32_t> prefix) const;
  uint64_t page_hash(Node parent, const int32_t* tokens) const;
  int32_t& bucket(uint64_t hash) { return buckets_[hash & (buckets_.size() - 1)]; }
  void erase_leaf(int32_t page);

  PagePool& pool_;
  const int32_t page_size_;
  const uint64_t hash_mask_, seed_;
  std::vector<Entry> entries_;         // by page
  std::vector<int32_t> buckets_;       // the first page of each
  std::unique_ptr<int32_t[]> tokens_;  // (num_pages, page_size)
  std::vector<Root> roots_;
  std::vector<int32_t> free_roots_;
  std::unordered_multimap<uint64_t, Node> roots_by_hash_;
};

}  // namespace duplex::runtime
