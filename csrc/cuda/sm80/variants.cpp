#include <stdexcept>

#include "cuda/sm80/forward.h"

namespace duplex::sm80 {

// Each is forward.cu compiled for one head_dim.
extern const Variant FORWARD_64, FORWARD_96, FORWARD_128, FORWARD_192, FORWARD_256;

const Variant& variant(int64_t head_dim) {
  for (const Variant* v : {&FORWARD_64, &FORWARD_96, &FORWARD_128, &FORWARD_192, &FORWARD_256})
    if (head_dim <= v->head_dim) return *v;
  throw std::invalid_argument("the CUDA kernels take a head_dim of at most 256");
}

}  // namespace duplex::sm80
