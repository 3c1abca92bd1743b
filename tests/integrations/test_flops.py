"""FLOPs as a FlopCounterMode counts them, against torch's count of its own attention."""

from __future__ import annotations

import duplex_attn as da
import pytest
import torch
import torch.nn.functional as F
from duplex_attn.integrations.flops import register
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode


@pytest.fixture(autouse=True, scope="module")
def _registered() -> None:
    register()


def counted(call, *, backward: bool = False) -> int:
    with FlopCounterMode(display=False) as counter:
        out = call()
        if backward:
            out.sum().backward()
    return counter.get_total_flops()


def qkv(*shapes: tuple[int, ...], requires_grad: bool = False) -> list[torch.Tensor]:
    return [torch.randn(shape, requires_grad=requires_grad) for shape in shapes]


def test_dense_as_torch_counts() -> None:
    """Grouped heads, fewer keys than queries; a mask is not deducted."""
    q, k, v = qkv((2, 9, 6, 16), (2, 7, 3, 16), (2, 7, 3, 16))
    with sdpa_kernel(SDPBackend.MATH):
        want = counted(lambda: F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)), enable_gqa=True))
    assert counted(lambda: da.attention(q, k, v)) == want > 0
    assert counted(lambda: da.attention(q, k, v, da.causal())) == want


def test_backward_is_five_products_of_which_torch_counts_four() -> None:
    """Torch's math path keeps the probabilities; kernels compute them again."""
    leaves = qkv((1, 8, 2, 16), (1, 8, 2, 16), (1, 8, 2, 16), requires_grad=True)
    product = 2 * 2 * 8 * 8 * 16
    assert counted(lambda: da.attention(*leaves), backward=True) == 7 * product
    with sdpa_kernel(SDPBackend.MATH):
        transposed = [x.transpose(1, 2) for x in leaves]
        assert counted(lambda: F.scaled_dot_product_attention(*transposed), backward=True) == 6 * product


def test_padding_that_lengths_tell_of() -> None:
    q, k, v = qkv((2, 5, 2, 8), (2, 6, 2, 8), (2, 6, 2, 4))
    lengths_q, lengths_k = (torch.tensor(x, dtype=torch.int32) for x in ([5, 2], [3, 6]))
    each = 2 * 2 * (8 + 4)  # two numbers a product, heads, both head_dims
    assert counted(lambda: da.attention(q, k, v, seqlens_k=lengths_k)) == each * 5 * (3 + 6)
    assert counted(lambda: da.attention(q, k, v, seqlens_q=lengths_q, seqlens_k=lengths_k)) == each * (5 * 3 + 2 * 6)


def test_packed() -> None:
    q, k, v = qkv((9, 2, 8), (9, 2, 8), (9, 2, 8))
    cu = torch.tensor([0, 2, 2, 9], dtype=torch.int32)
    assert counted(lambda: da.varlen_attention(q, k, v, cu, cu, 7, 7)) == 2 * 2 * (2 * 2 + 7 * 7) * 16


def test_shapes_alone_count_as_if_every_sequence_were_the_longest() -> None:
    with FakeTensorMode():
        q, k, v = qkv((9, 2, 8), (9, 2, 8), (9, 2, 8))
        cu = torch.zeros(4, dtype=torch.int32)
        assert counted(lambda: da.varlen_attention(q, k, v, cu, cu, 7, 7)) == 2 * 2 * (3 * 7 * 7) * 16


@pytest.mark.parametrize("chunk", [False, True])
def test_pages(chunk: bool) -> None:
    pages_k, pages_v = qkv((4, 4, 1, 8), (4, 4, 1, 8))
    table, lengths = torch.arange(4, dtype=torch.int32).view(2, 2), torch.tensor([5, 8], dtype=torch.int32)
    rows = [3, 1] if chunk else [1, 1]
    named = {"cu_seqlens_q": torch.tensor([0, 3, 4], dtype=torch.int32), "max_seqlen_q": 3} if chunk else {}
    (q,) = qkv((sum(rows), 2, 8))
    found = counted(lambda: da.paged_attention(q, pages_k, pages_v, table, lengths, **named))
    assert found == 2 * 2 * (rows[0] * 5 + rows[1] * 8) * 16
