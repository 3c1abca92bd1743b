#include "cuda/variants.h"

#include "cuda/sm80/variants.h"
#include "cuda/sm90/variants.h"

namespace duplex {
namespace {

bool is_hopper(int64_t capability) {
  if (capability < 80) throw std::invalid_argument("the CUDA kernels run on cards of compute capability 8.0 and later");
  return capability == 90;
}

}  // namespace

const Variant& forward_variant(int64_t capability, int64_t head_dim) {
  return is_hopper(capability) ? sm90::forward_variant(head_dim) : sm80::forward_variant(head_dim);
}

const BackwardVariant& dq_variant(int64_t capability, int64_t head_dim) {
  return is_hopper(capability) ? sm90::dq_variant(head_dim) : sm80::dq_variant(head_dim);
}

const BackwardVariant& dkdv_variant(int64_t capability, int64_t head_dim) {
  return is_hopper(capability) ? sm90::dkdv_variant(head_dim) : sm80::dkdv_variant(head_dim);
}

const BackwardVariant* fused_variant(int64_t capability, int64_t head_dim) {
  return is_hopper(capability) ? sm90::fused_variant(head_dim) : nullptr;
}

}  // namespace duplex
