// Decoding over pages for one head_dim, DUPLEX_HEAD_DIM.
#include "cuda/sm90/decode.cuh"
#include "cuda/sm90/launch_paged.cuh"

namespace duplex::sm90 {
namespace {

template <Storage S>
using Built = DecodeShape<S, DUPLEX_HEAD_DIM>;

template <Storage S>
void launch_decode(const PagedLaunch& l, paged::Which which, int32_t units) {
  using B = Built<S>;
  const PagedArguments a = arguments_of<B>(l, which, units);
  const int blocks = blocks_of(l, a.grid, B::BLOCKS);
  const auto go = [&]<auto KERNEL>() {
    launch<KERNEL>("paged attention", blocks, B::THREADS, B::SHARED_BYTES, l.stream, a);
  };
  l.bfloat16 ? go.template operator()<decode_kernel<Bfloat16, S, B::HEAD_DIM>>()
             : go.template operator()<decode_kernel<Float16, S, B::HEAD_DIM>>();
}

template <Storage S>
constexpr PagedVariant VARIANT = {Built<S>::HEAD_DIM, Built<S>::ROWS, Built<S>::BLOCK_N, Built<S>::BLOCKS,
                                  &launch_decode<S>};

}  // namespace

#define DUPLEX_JOIN(a, b) a##b
#define DUPLEX_NAME(a, b) DUPLEX_JOIN(a, b)
extern const PagedVariant DUPLEX_NAME(DECODE_, DUPLEX_HEAD_DIM)[3];
const PagedVariant DUPLEX_NAME(DECODE_, DUPLEX_HEAD_DIM)[3] = {VARIANT<Storage::AS_QUERIES>, VARIANT<Storage::INT8>,
                                                               VARIANT<Storage::FLOAT8_E4M3>};

}  // namespace duplex::sm90
