#include "runtime/prefix_index.h"

#include <algorithm>
#include <bit>
#include <random>

#include "runtime/hash.h"

namespace duplex::runtime {
namespace {

// Tokens come from users, who could otherwise choose them to collide.
uint64_t random_seed() {
  std::random_device device;
  return uint64_t(device()) << 32 | device();
}

}  // namespace

PrefixIndex::PrefixIndex(PagePool& pool, int32_t page_size, int hash_bits)
    : pool_(pool),
      page_size_(page_size),
      hash_mask_(hash_bits >= 64 ? ~uint64_t(0) : (uint64_t(1) << hash_bits) - 1),
      seed_(random_seed()),
      entries_(pool.size()),
      buckets_(std::bit_ceil(2 * size_t(pool.size())), NO_PAGE),
      tokens_(std::make_unique_for_overwrite<int32_t[]>(size_t(pool.size()) * page_size)) {}

uint64_t PrefixIndex::root_hash(std::string_view salt, std::span<const int32_t> prefix) const {
  return hash_tokens(hash_bytes(seed_, salt), prefix) & hash_mask_;
}

uint64_t PrefixIndex::page_hash(Node parent, const int32_t* tokens) const {
  const uint64_t above = parent < 0 ? roots_[~parent].hash : entries_[parent].hash;
  return hash_tokens(seed_ + above, {tokens, size_t(page_size_)}) & hash_mask_;
}

std::optional<Node> PrefixIndex::find_root(std::string_view salt, std::span<const int32_t> prefix) const {
  const auto [first, last] = roots_by_hash_.equal_range(root_hash(salt, prefix));
  for (auto found = first; found != last; ++found) {
    const Root& root = roots_[~found->second];
    if (root.salt == salt && std::ranges::equal(root.prefix, prefix)) return found->second;
  }
  return std::nullopt;
}

Node PrefixIndex::acquire_root(std::string_view salt, std::span<const int32_t> prefix) {
  if (const auto found = find_root(salt, prefix)) {
    share_root(*found);
    return *found;
  }
  Root made{std::string(salt), {prefix.begin(), prefix.end()}, root_hash(salt, prefix), 1};
  if (free_roots_.empty()) {
    if (free_roots_.capacity() <= roots_.size()) free_roots_.reserve(2 * roots_.size() + 8);  // releasing never fails
    roots_.emplace_back();
    free_roots_.push_back(int32_t(roots_.size()) - 1);
  }
  const Node root = ~free_roots_.back();
  roots_by_hash_.emplace(made.hash, root);
  free_roots_.pop_back();
  roots_[~root] = std::move(made);
  return root;
}

void PrefixIndex::release_root(Node root) {
  Root& r = roots_[~root];
  if (--r.uses > 0) return;
  auto [first, last] = roots_by_hash_.equal_range(r.hash);
  while (first->second != root) ++first;
  roots_by_hash_.erase(first);
  r = Root{};
  free_roots_.push_back(~root);
}

int32_t PrefixIndex::find(Node parent, const int32_t* tokens) const {
  const uint64_t hash = page_hash(parent, tokens);
  int32_t page = buckets_[hash & (buckets_.size() - 1)];
  for (; page != NO_PAGE; page = entries_[page].in_bucket) {
    const Entry& e = entries_[page];
    if (e.hash == hash && e.parent == parent && std::equal(tokens, tokens + page_size_, this->tokens(page).data()))
      return page;
  }
  return NO_PAGE;
}

void PrefixIndex::insert(Node parent, const int32_t* tokens, int32_t page) {
  Entry& e = entries_[page];
  std::copy_n(tokens, page_size_, tokens_.get() + int64_t(page) * page_size_);
  e.hash = page_hash(parent, tokens);
  e.parent = parent;
  e.in_bucket = bucket(e.hash);
  bucket(e.hash) = page;
  e.child = e.before = e.after = NO_PAGE;
  if (parent < 0) {
    share_root(parent);
  } else {
    e.after = entries_[parent].child;
    if (e.after != NO_PAGE) entries_[e.after].before = page;
    entries_[parent].child = page;
  }
  ++e.stamp;
  e.inside = true;
  pool_.keep(page);
}

void PrefixIndex::erase(int32_t page) {
  for (int32_t node = page;;) {
    while (entries_[node].child != NO_PAGE) node = entries_[node].child;
    const Node above = entries_[node].parent;
    erase_leaf(node);
    if (node == page) return;
    node = above;
  }
}

void PrefixIndex::erase_leaf(int32_t page) {
  Entry& e = entries_[page];
  int32_t* link = &bucket(e.hash);
  while (*link != page) link = &entries_[*link].in_bucket;
  *link = e.in_bucket;
  if (e.parent < 0) {
    release_root(e.parent);
  } else {
    (e.before == NO_PAGE ? entries_[e.parent].child : entries_[e.before].after) = e.after;
    if (e.after != NO_PAGE) entries_[e.after].before = e.before;
  }
  e.inside = false;
  pool_.drop(page);
}

void PrefixIndex::check(std::vector<std::string>& faults) const {
  std::vector<int32_t> in_buckets(entries_.size()), as_child(entries_.size());
  for (size_t n = 0; n < buckets_.size(); ++n)
    for (int32_t page = buckets_[n]; page != NO_PAGE; page = entries_[page].in_bucket) {
      if (++in_buckets[page] > 1) {
        faults.push_back("index: page " + std::to_string(page) + " is in two buckets");
        break;
      }
      if ((entries_[page].hash & (buckets_.size() - 1)) != n)
        faults.push_back("index: page " + std::to_string(page) + " is in another bucket than its hash");
    }
  std::vector<int64_t> below_root(roots_.size());
  for (int32_t page = 0; page < int32_t(entries_.size()); ++page) {
    const Entry& e = entries_[page];
    const std::string name = "index: page " + std::to_string(page);
    if (e.inside != pool_.is_kept(page)) faults.push_back(name + " is in the tree or kept by the pool, not both");
    if (e.inside != (in_buckets[page] == 1)) faults.push_back(name + " is in the tree or in a bucket, not both");
    if (!e.inside) continue;
    if (e.parent < 0) {
      if (++below_root[~e.parent] > roots_[~e.parent].uses) faults.push_back(name + " is below a root without a use");
    } else if (!entries_[e.parent].inside) {
      faults.push_back(name + " is below a page that is not in the tree");
    }
    if (e.hash != page_hash(e.parent, tokens(page).data()))
      faults.push_back(name + " has another hash than its tokens");
    if (find(e.parent, tokens(page).data()) != page) faults.push_back(name + " is there twice");
    for (int32_t child = e.child, before = NO_PAGE; child != NO_PAGE; child = entries_[child].after) {
      if (entries_[child].parent != page || entries_[child].before != before || ++as_child[child] > 1) {
        faults.push_back(name + " has a child that is not linked back to it");
        break;
      }
      before = child;
    }
  }
  for (int32_t page = 0; page < int32_t(entries_.size()); ++page)
    if (entries_[page].inside && entries_[page].parent >= 0 && as_child[page] != 1)
      faults.push_back("index: page " + std::to_string(page) + " is no child of its parent");
  size_t used = 0;
  for (const Root& root : roots_) used += root.uses > 0;
  if (used + free_roots_.size() != roots_.size() || roots_by_hash_.size() != used)
    faults.push_back("index: a root is lost");
}

}  // namespace duplex::runtime
