#include "cuda/sm90/variants.h"

#include "cuda/sm90/paged.h"

namespace duplex::sm90 {

// Each is forward.cu, dq.cu, dkdv.cu, fused.cu, paged.cu or decode.cu compiled for one head_dim.
extern const Variant FORWARD_64, FORWARD_96, FORWARD_128, FORWARD_192, FORWARD_256;
extern const BackwardVariant DQ_64, DQ_96, DQ_128, DQ_192, DQ_256;
extern const BackwardVariant DKDV_64, DKDV_96, DKDV_128, DKDV_192, DKDV_256;
extern const BackwardVariant FUSED_64, FUSED_96, FUSED_128;
extern const PagedVariant PAGED_64, PAGED_96, PAGED_128, PAGED_192, PAGED_256;
extern const PagedVariant DECODE_64[3], DECODE_128[3], DECODE_256[3];  // by storage

const Variant& forward_variant(int64_t head_dim) {
  return smallest({&FORWARD_64, &FORWARD_96, &FORWARD_128, &FORWARD_192, &FORWARD_256}, head_dim);
}

const BackwardVariant& dq_variant(int64_t head_dim) {
  return smallest({&DQ_64, &DQ_96, &DQ_128, &DQ_192, &DQ_256}, head_dim);
}

const BackwardVariant& dkdv_variant(int64_t head_dim) {
  return smallest({&DKDV_64, &DKDV_96, &DKDV_128, &DKDV_192, &DKDV_256}, head_dim);
}

const BackwardVariant* fused_variant(int64_t head_dim) {
  return head_dim > 128 ? nullptr : &smallest({&FUSED_64, &FUSED_96, &FUSED_128}, head_dim);
}

const PagedVariant& paged_variant(int64_t head_dim) {
  return smallest({&PAGED_64, &PAGED_96, &PAGED_128, &PAGED_192, &PAGED_256}, head_dim);
}

const PagedVariant& decode_variant(int64_t head_dim, Storage storage) {
  const int s = int(storage);
  return smallest({&DECODE_64[s], &DECODE_128[s], &DECODE_256[s]}, head_dim);
}

}  // namespace duplex::sm90
