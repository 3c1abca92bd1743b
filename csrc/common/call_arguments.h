// The arguments of an attention operator, as torch hands them over to every native library.
#pragma once

#include "common/tensors.h"

namespace duplex {

// Every operator takes these, in the order of the schema.
struct CallArguments {
  Tensor q, k, v;
  OptionalTensor cu_seqlens_q, cu_seqlens_k;
  int64_t max_seqlen_q, max_seqlen_k;
  OptionalTensor seqlens_q, seqlens_k, starts_q, starts_k, prefix;
  std::optional<int64_t> left, right;
  bool top_left;
  OptionalTensor bias, distance_bias, alibi_slopes, row_distance_bias, col_distance_bias, sink;
  std::optional<double> scale;
  double softcap, dropout_p;
  OptionalTensor seed;
  bool deterministic, batch_invariant;

  bool packed() const { return cu_seqlens_q.has_value(); }
  int64_t heads_q() const { return q.size(q.dim() - 2); }
};

inline constexpr char CALL_SCHEMA[] =
    "Tensor q, Tensor k, Tensor v, Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, SymInt max_seqlen_q, "
    "SymInt max_seqlen_k, Tensor? seqlens_q, Tensor? seqlens_k, Tensor? starts_q, Tensor? starts_k, Tensor? prefix, "
    "SymInt? left, SymInt? right, bool top_left, Tensor? bias, Tensor? distance_bias, Tensor? alibi_slopes, "
    "Tensor? row_distance_bias, Tensor? col_distance_bias, Tensor? sink, float? scale, float softcap, "
    "float dropout_p, Tensor? seed, bool deterministic, bool batch_invariant";

#define DUPLEX_CALL_PARAMETERS                                                                                   \
  Tensor q, Tensor k, Tensor v, OptionalTensor cu_seqlens_q, OptionalTensor cu_seqlens_k, int64_t max_seqlen_q,  \
      int64_t max_seqlen_k, OptionalTensor seqlens_q, OptionalTensor seqlens_k, OptionalTensor starts_q,         \
      OptionalTensor starts_k, OptionalTensor prefix, std::optional<int64_t> left, std::optional<int64_t> right, \
      bool top_left, OptionalTensor bias, OptionalTensor distance_bias, OptionalTensor alibi_slopes,             \
      OptionalTensor row_distance_bias, OptionalTensor col_distance_bias, OptionalTensor sink,                   \
      std::optional<double> scale, double softcap, double dropout_p, OptionalTensor seed, bool deterministic,    \
      bool batch_invariant
#define DUPLEX_CALL_ARGUMENTS \
  {q,                         \
   k,                         \
   v,                         \
   cu_seqlens_q,              \
   cu_seqlens_k,              \
   max_seqlen_q,              \
   max_seqlen_k,              \
   seqlens_q,                 \
   seqlens_k,                 \
   starts_q,                  \
   starts_k,                  \
   prefix,                    \
   left,                      \
   right,                     \
   top_left,                  \
   bias,                      \
   distance_bias,             \
   alibi_slopes,              \
   row_distance_bias,         \
   col_distance_bias,         \
   sink,                      \
   scale,                     \
   softcap,                   \
   dropout_p,                 \
   seed,                      \
   deterministic,             \
   batch_invariant}

}  // namespace duplex
