// The arguments of an attention operator, as torch hands them over, made into a Problem.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <optional>

#include "common/problem.h"

namespace duplex {

using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

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

extern const char* const CALL_SCHEMA;

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

// Throws std::invalid_argument for a dtype the kernels do not take.
DType dtype_of(const Tensor& t);

View view(const Tensor& t);

// A tensor of q's dtype (or float32) on the CPU, uninitialised.
Tensor new_tensor(const Tensor& like, std::initializer_list<int64_t> sizes);
Tensor new_float(std::initializer_list<int64_t> sizes);
Tensor new_int(std::initializer_list<int64_t> sizes);  // int32
int64_t element_size(const Tensor& t);

// The fields of a Problem that make a score out of <q, k>; after its head_dim.
void set_scores(Problem& p, const OptionalTensor& bias, const OptionalTensor& distance_bias,
                const OptionalTensor& alibi_slopes, const OptionalTensor& sink, std::optional<double> scale,
                double softcap);

// out and lse may be freshly made (forward) or those of the forward call (backward).
Problem problem_of(const CallArguments& call, const Tensor& out, const Tensor& lse);

}  // namespace duplex
