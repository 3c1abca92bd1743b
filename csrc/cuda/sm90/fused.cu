// dq, dk and dv at once for one head_dim, DUPLEX_HEAD_DIM.
#include "cuda/sm90/fused.cuh"
#include "cuda/sm90/launch_backward.cuh"

namespace duplex::sm90 {
namespace {

using Built = FusedShape<DUPLEX_HEAD_DIM>;

template <class T>
void launch_kernels(const BackwardLaunch& l, const BackwardMaps& maps) {
  const Stream stream{l.stream, l.ahead};
  const auto go = [&]<auto KERNEL>() {
    launch<KERNEL>("fused", blocks_of(l, l.arguments.key_tiles), Built::THREADS, SHARED_WITH_TICKETS<Built, KeyWork>,
                   stream, l.arguments, maps);
  };
  l.terms ? go.template operator()<fused_kernel<T, Built, true>>()
          : go.template operator()<fused_kernel<T, Built, false>>();
  launch<finish_dq_kernel<T, Built>>("finish_dq", 8 * l.processors, Built::THREADS - 128, 0, stream, l.arguments);
}

void launch_fused(BackwardLaunch& l) {
  const BackwardMaps maps = maps_of<Built>(l);
  l.bfloat16 ? launch_kernels<Bfloat16>(l, maps) : launch_kernels<Float16>(l, maps);
}

}  // namespace

extern const BackwardVariant DUPLEX_NAME(FUSED_, DUPLEX_HEAD_DIM);
const BackwardVariant DUPLEX_NAME(FUSED_, DUPLEX_HEAD_DIM) = {Built::HEAD_DIM, Built::BLOCK_M, Built::BLOCK_N,
                                                              &launch_fused};

}  // namespace duplex::sm90
