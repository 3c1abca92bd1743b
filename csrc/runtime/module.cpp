// duplex_attn._runtime: the cache's bookkeeping for Python, which is documented in attn/cache.py and typed in
// attn/_runtime.pyi.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "runtime/cache.h"
#include "runtime/python_arguments.h"

namespace py = pybind11;

namespace duplex::runtime {
namespace {

const Sequence& alive(const Sequence& seq) {
  if (seq.state == State::FREED) throw std::invalid_argument("seq: expected a live sequence, got one that was freed");
  return seq;
}

std::string in_words(const Sequence& seq) {
  if (seq.state == State::FREED) return "<Sequence, freed>";
  return "<Sequence of " + std::to_string(seq.length()) + " tokens, " + std::to_string(seq.committed) + " committed" +
         (seq.state == State::SWAPPED ? ", swapped out>" : ">");
}

Tokens unknown_tokens(const Cache& cache, int64_t count) {
  if (count < 0) throw std::invalid_argument("tokens: expected 0 or more, got " + std::to_string(count));
  cache.require_room(count);
  return Tokens(count, UNKNOWN);
}

SequencePtr add(Cache& cache, py::handle tokens, int64_t bidirectional_prefix, const std::optional<std::string>& salt) {
  auto given = count_or_ids_of(tokens);
  const auto* count = std::get_if<int64_t>(&given);
  Tokens ids = count ? unknown_tokens(cache, *count) : std::move(std::get<Tokens>(given));
  return cache.add(std::move(ids), bidirectional_prefix, salt ? "salt" + *salt : "");
}

void extend(Cache& cache, Sequence& seq, py::handle tokens) {
  const auto given = count_or_ids_of(tokens);
  if (const auto* count = std::get_if<int64_t>(&given))
    cache.extend(seq, *count);
  else
    cache.extend(seq, std::span<const int32_t>(std::get<Tokens>(given)));
}

using Array = py::array_t<int32_t, py::array::c_style>;

void fill(const Batch& batch, const Cache& cache, Array& block_table, Array& seqlens_k, Array& cu_seqlens_q,
          Array& positions) {
  if (block_table.ndim() != 2 || seqlens_k.ndim() != 1 || cu_seqlens_q.ndim() != 1 || positions.ndim() != 1 ||
      block_table.shape(0) != seqlens_k.shape(0) || cu_seqlens_q.shape(0) != seqlens_k.shape(0) + 1)
    throw std::invalid_argument(
        "out: expected block_table (B, pages), seqlens_k (B,), cu_seqlens_q (B + 1,), positions (T,)");
  batch.fill({block_table.shape(0), block_table.shape(1), positions.shape(0), block_table.mutable_data(),
              seqlens_k.mutable_data(), cu_seqlens_q.mutable_data(), positions.mutable_data()},
             cache.page_size());
}

std::pair<Tokens, Tokens> pending_copies(const Cache& cache) {
  std::pair<Tokens, Tokens> pages;
  for (const Copy& copy : cache.pending_copies()) {
    pages.first.push_back(copy.src);
    pages.second.push_back(copy.dst);
  }
  return pages;
}

Tokens written_pages(const Cache& cache, const Sequence& seq) {
  const auto pages = cache.written_pages(seq);
  return {pages.begin(), pages.end()};
}

}  // namespace
}  // namespace duplex::runtime

PYBIND11_MODULE(_runtime, m) {
  using namespace duplex::runtime;
  using namespace pybind11::literals;

  py::register_exception<OutOfPages>(m, "OutOfPages", PyExc_RuntimeError).doc() =
      "The cache has too few pages for a call, which has changed nothing.";

  py::class_<Sequence, SequencePtr>(m, "Sequence", py::is_final(),
                                    "A sequence of a cache. Once freed, all but `freed` raises ValueError.")
      .def_property_readonly(
          "length", [](const Sequence& s) { return alive(s).length(); }, "Tokens, those to be computed too.")
      .def_property_readonly(
          "committed", [](const Sequence& s) { return alive(s).committed; },
          "Leading tokens whose keys and values are written in all layers.")
      .def_property_readonly(
          "cached", [](const Sequence& s) { return alive(s).cached; },
          "Leading tokens whose keys and values were there when the sequence came.")
      .def_property_readonly("bidirectional_prefix", [](const Sequence& s) { return alive(s).bidirectional_prefix; })
      .def_property_readonly(
          "tokens", [](const Sequence& s) { return alive(s).tokens; },
          "A list of ints, made anew; -1 where a slot was reserved by count.")
      .def_property_readonly(
          "pages", [](const Sequence& s) { return alive(s).pages; }, "Page ids, made anew; none while swapped out.")
      .def_property_readonly("swapped", [](const Sequence& s) { return alive(s).state == State::SWAPPED; })
      .def_property_readonly("freed", [](const Sequence& s) { return s.state == State::FREED; })
      .def("__repr__", &in_words);

  py::class_<Batch>(m, "Batch")
      .def_readonly("max_pages", &Batch::max_pages)
      .def_readonly("new_tokens", &Batch::new_tokens)
      .def_readonly("max_seqlen_q", &Batch::max_seqlen_q)
      .def_readonly("max_seqlen_k", &Batch::max_seqlen_k)
      .def("fill", &fill, "cache"_a, "block_table"_a.noconvert(), "seqlens_k"_a.noconvert(),
           "cu_seqlens_q"_a.noconvert(), "positions"_a.noconvert());

  py::class_<Stats>(m, "Stats")
      .def_readonly("pages_total", &Stats::pages_total)
      .def_readonly("pages_used", &Stats::pages_used)
      .def_readonly("pages_shared", &Stats::pages_shared)
      .def_readonly("pages_cached", &Stats::pages_cached)
      .def_readonly("pages_free", &Stats::pages_free)
      .def_readonly("slots_wasted", &Stats::slots_wasted)
      .def_readonly("sequences", &Stats::sequences)
      .def_readonly("swapped", &Stats::swapped)
      .def_readonly("lookup_tokens", &Stats::lookup_tokens)
      .def_readonly("hit_tokens", &Stats::hit_tokens);

  py::class_<Cache>(m, "Cache")
      .def(py::init<int32_t, int32_t, int>(), "num_pages"_a, "page_size"_a, "hash_bits"_a = 64)
      .def("add", &add, "tokens"_a, "bidirectional_prefix"_a = 0, "salt"_a = py::none())
      .def("extend", &extend, "seq"_a.none(false), "tokens"_a)
      .def(
          "append", [](Cache& c, py::handle seqs, py::handle tokens) { c.append(sequences_of(seqs), ids_of(tokens)); },
          "seqs"_a, "tokens"_a)
      .def("fork", &Cache::fork, "seq"_a.none(false))
      .def("truncate", &Cache::truncate, "seq"_a.none(false), "length"_a)
      .def("free", &Cache::free, "seq"_a.none(false))
      .def("commit", py::overload_cast<Sequence&, int64_t>(&Cache::commit), "seq"_a.none(false), "length"_a)
      .def("commit_batch", py::overload_cast<const Batch&>(&Cache::commit), "batch"_a)
      .def(
          "batch",
          [](Cache& c, py::handle seqs, const std::optional<std::vector<int64_t>>& new_tokens) {
            return c.batch(sequences_of(seqs), new_tokens);
          },
          "seqs"_a, "new_tokens"_a = py::none())
      .def("written_pages", &written_pages, "seq"_a.none(false))
      .def("swap_out", &Cache::swap_out, "seq"_a.none(false))
      .def("swap_in", &Cache::swap_in, "seq"_a.none(false))
      .def_property_readonly("has_pending_copies", [](const Cache& c) { return !c.pending_copies().empty(); })
      .def("pending_copies", &pending_copies)
      .def("copies_made", &Cache::copies_made)
      .def("stats", &Cache::stats)
      .def("check", &Cache::check)
      .def_property_readonly("available_pages", &Cache::available_pages);
}
