"""vLLM on these kernels: an attention backend named DUPLEX_ATTN, over vLLM's own pages.

    LLM(model, attention_backend="DUPLEX_ATTN")        python -m vllm.entrypoints.openai.api_server --attention-backend DUPLEX_ATTN ...

vLLM finds `plugin` by itself, that of the installed package, in each of its processes. Decoders (causal, windows, a direction for
each request), encoders and cross attention, pages of the model's dtype or float8. Slopes take from a score by the distance, also
ahead of a query. Written for vLLM 0.32, whose interface for backends is no stable contract; with CUDA graphs of the layers between
attention, not of attention.
"""

from __future__ import annotations

import copyreg
import functools
import logging
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
import vllm
from torch import Tensor
from vllm import envs
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionImpl,
    AttentionMetadata,
    AttentionMetadataBuilder,
    AttentionType,
    CommonAttentionMetadata,
    MultipleOf,
)
from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

from ..checks import MAX_HEAD_DIM
from ..functional import varlen_attention
from ..mask import Mask
from ..paged.functional import paged_append, paged_attention, plan

NAME = "DUPLEX_ATTN"
_log = logging.getLogger(__name__)


def plugin() -> None:
    """What vLLM calls in each of its processes, and must come through even where it is another version than this is for."""
    try:
        register()
    except Exception as error:
        _log.warning("%s: not available in vLLM %s, as it is written for 0.32 (%r)", NAME, vllm.__version__, error)


def register() -> None:
    """Makes the backend known to vLLM under its name; nothing uses it that does not ask for it."""
    from vllm.platforms.cpu import CpuPlatform

    if NAME in AttentionBackendEnum.__members__:
        return
    _choose_on_cpu(CpuPlatform)
    copyreg.pickle(AttentionBackendEnum, _pickled)
    register_backend(NAME, f"{__name__}.DuplexBackend")


def _pickled(backend: Any) -> Any:
    """vLLM sends its configuration to new processes, which read it before they load plugins."""
    return (_named, (NAME,)) if backend.name == NAME else (AttentionBackendEnum, (backend.value,))


def _named(name: str) -> Any:
    register()
    return AttentionBackendEnum[name]


def _choose_on_cpu(platform: Any) -> None:
    """vLLM's platform for CPUs takes its own backend whatever is asked for; now it takes this one if that is asked for."""
    chosen = platform.get_attn_backend_cls.__func__

    def get_attn_backend_cls(
        cls: Any, selected_backend: Any, attn_selector_config: Any, num_heads: int | None = None
    ) -> str:
        if getattr(selected_backend, "name", None) != NAME:
            return chosen(cls, selected_backend, attn_selector_config, num_heads)
        reasons = DuplexBackend.validate_configuration(device_capability=None, **attn_selector_config._asdict())
        if reasons:
            raise ValueError(f"attention_backend: {NAME} can't serve this model: {', '.join(reasons)}")
        return selected_backend.get_path()

    platform.get_attn_backend_cls = classmethod(get_attn_backend_cls)


@dataclass
class DuplexMetadata(AttentionMetadata):
    """What every layer of a step reads."""

    num_actual_tokens: int
    max_query_len: int
    cu_seqlens_q: Tensor  # (B + 1,)
    seqlens_k: Tensor  # (B,)
    block_table: Tensor  # (B, max_pages)
    slot_mapping: Tensor  # (tokens,): of the pool, where each token's key and value go; -1: nowhere
    page_size: int
    causal: bool
    prefix: Tensor | int  # (B,): keys that every token of a request sees, where each has its own direction; 0: causal
    spans: dict[int | None, tuple[Mask, Tensor | None]] = field(default_factory=dict)

    @functools.cached_property
    def slots(self) -> Tensor:
        """As paged calls have them; vLLM's cross attention exchanges slot_mapping after `build`."""
        return self.slot_mapping.int()

    def span(self, left: int | None) -> tuple[Mask, Tensor | None]:
        """The mask and the plan of layers that see `left` tokens back, None: all of them."""
        if left not in self.spans:
            mask = self._mask(left)
            planned = self.seqlens_k.device.type == "cpu"
            self.spans[left] = mask, self._plan(mask) if planned else None
        return self.spans[left]

    def _mask(self, left: int | None) -> Mask:
        if not self.causal:
            return Mask(0, left, left)
        if left is not None and isinstance(self.prefix, Tensor):
            raise NotImplementedError(f"{NAME}: a direction for each request in layers with a window")
        return Mask(self.prefix, left, 0)

    def _plan(self, mask: Mask) -> Tensor | None:
        return plan(
            self.block_table, self.seqlens_k, self.page_size, mask,
            cu_seqlens_q=self.cu_seqlens_q, batch_invariant=envs.VLLM_BATCH_INVARIANT,
        )  # fmt: skip


class DuplexMetadataBuilder(AttentionMetadataBuilder[DuplexMetadata]):
    def __init__(self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: torch.device) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)

    def build(
        self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False
    ) -> DuplexMetadata:
        common = common_attn_metadata
        prefix: Tensor | int = 0
        if isinstance(common.causal, Tensor):
            prefix = torch.where(common.causal.bool(), 0, common.seq_lens).int()
        return DuplexMetadata(
            common.num_actual_tokens, common.max_query_len, common.query_start_loc, common.seq_lens,
            common.block_table_tensor, common.slot_mapping, self.kv_cache_spec.block_size, common.causal is not False,
            prefix,
        )  # fmt: skip


class DuplexBackend(AttentionBackend):
    """What vLLM asks of a backend before it takes it."""

    supported_dtypes: ClassVar[list[torch.dtype]] = [torch.float16, torch.bfloat16, torch.float32]
    supported_kv_cache_dtypes: ClassVar[list[Any]] = ["auto", "float16", "bfloat16", "fp8", "fp8_e4m3"]

    @staticmethod
    def get_name() -> str:
        return NAME

    @staticmethod
    def get_impl_cls() -> type[DuplexImpl]:
        return DuplexImpl

    @staticmethod
    def get_builder_cls() -> type[DuplexMetadataBuilder]:
        return DuplexMetadataBuilder

    @staticmethod
    def get_supported_kernel_block_sizes(kv_cache_spec: Any = None) -> list[int | MultipleOf]:
        return [16, 32, 64, 128, 256]  # vLLM cuts larger blocks into these

    @classmethod
    def supports_head_size(cls, head_size: int) -> bool:
        return 1 <= head_size <= MAX_HEAD_DIM

    @classmethod
    def supports_attn_type(cls, attn_type: str) -> bool:
        return attn_type in list(AttentionType)

    @classmethod
    def supports_sink(cls) -> bool:
        return True

    @classmethod
    def supports_sliding_window(cls) -> bool:
        return True

    @classmethod
    def supports_non_causal(cls) -> bool:
        return True

    @classmethod
    def supports_batch_invariance(cls) -> bool:
        return True

    @classmethod
    def supports_compute_capability(cls, capability: Any) -> bool:
        return capability is None or (torch.version.cuda is not None and capability.major >= 8)

    @classmethod
    def supports_combination(
        cls, head_size: int, dtype: torch.dtype, kv_cache_dtype: Any, *others: Any, **more: Any
    ) -> str | None:
        if kv_cache_dtype in ("float16", "bfloat16") and getattr(torch, kv_cache_dtype) != dtype:
            return f"pages of {kv_cache_dtype} for a model of {dtype}"
        return None


class DuplexImpl(AttentionImpl[DuplexMetadata]):
    def __init__(
        self,
        num_heads: int,
        head_size: int,
        scale: float,
        num_kv_heads: int | None = None,
        alibi_slopes: list[float] | None = None,
        sliding_window: int | None = None,
        kv_cache_dtype: str = "auto",
        logits_soft_cap: float | None = None,
        attn_type: str = AttentionType.DECODER,
        kv_sharing_target_layer_name: str | None = None,
        sinks: Tensor | None = None,
    ) -> None:
        self.num_heads, self.num_kv_heads, self.head_size = num_heads, num_kv_heads or num_heads, head_size
        self.kv_cache_dtype, self.kv_sharing_target_layer_name = kv_cache_dtype, kv_sharing_target_layer_name
        self.scale = float(scale)
        self.left = None if sliding_window is None else sliding_window - 1  # vLLM counts the query itself
        self.in_pages = attn_type not in (AttentionType.ENCODER, AttentionType.ENCODER_ONLY)
        self.sink = sinks
        self.terms: dict[str, Any] = {
            "scale": self.scale, "softcap": float(logits_soft_cap or 0),
            "alibi_slopes": None if alibi_slopes is None else torch.tensor(alibi_slopes, dtype=torch.float32),
            "batch_invariant": envs.VLLM_BATCH_INVARIANT,
        }  # fmt: skip
        self._pool: tuple[Tensor, Pool] | None = None

    def forward(
        self,
        layer: Any,
        query: Tensor,
        key: Tensor | None,
        value: Tensor | None,
        kv_cache: Tensor,
        attn_metadata: DuplexMetadata | None,
        output: Tensor,
        output_scale: Tensor | None = None,
        output_block_scale: Tensor | None = None,
    ) -> Tensor:
        """Writes key and value (tokens, Hkv, D) into their slots, then attention of query (tokens, Hq, D) into output.

        Layers that have another one's keys, and cross attention behind its first step, write nothing; encoders have no pages.
        """
        if output_scale is not None or output_block_scale is not None:
            raise NotImplementedError(f"{NAME}: quantised outputs")
        if attn_metadata is None:  # while vLLM measures memory
            return output.zero_()
        step, tokens = attn_metadata, attn_metadata.num_actual_tokens
        if not self.in_pages:
            assert key is not None and value is not None
            cu, longest, mask = step.cu_seqlens_q, step.max_query_len, Mask(0, self.left, self.left)
            output[:tokens] = varlen_attention(
                query[:tokens], key[:tokens], value[:tokens], cu, cu, longest, longest, mask, sink=self.sink, **self.terms
            )  # fmt: skip
            return output
        pool = self.pool(layer, kv_cache)
        if key is not None and value is not None and self.kv_sharing_target_layer_name is None:
            slots = step.slots[: len(key)]
            new = len(slots)
            paged_append(
                key[:new], value[:new], pool.k_pages, pool.v_pages, pool.table.expand(new, -1), slots, **pool.scales
            )  # fmt: skip
        mask, planned = step.span(self.left)
        paged_attention(
            query[:tokens], pool.k_pages, pool.v_pages, step.block_table, step.seqlens_k, mask, cu_seqlens_q=step.cu_seqlens_q,
            max_seqlen_q=step.max_query_len, plan=planned, out=output[:tokens], sink=self.sink, **pool.scales, **self.terms,
        )  # fmt: skip
        return output

    def pool(self, layer: Any, kv_cache: Tensor) -> Pool:
        """What of a layer's cache is the same in every step; scales are read where they lie, and changed there."""
        if self._pool is None or self._pool[0] is not kv_cache:
            self._pool = kv_cache, Pool.of(kv_cache, self.head_size, self.kv_cache_dtype, layer)
        return self._pool[1]


@dataclass
class Pool:
    """vLLM's cache of one layer (pages, Hkv, page_size, 2D) as paged calls have it."""

    k_pages: Tensor  # (pages, page_size, Hkv, D)
    v_pages: Tensor
    scales: dict[str, Any]  # of float8
    table: Tensor  # (1, pages): of a text as long as the pool, whose positions are slots

    @classmethod
    def of(cls, kv_cache: Tensor, head_dim: int, dtype: str, layer: Any) -> Pool:
        scales: dict[str, Any] = {}
        if dtype.startswith("fp8"):
            kv_cache = kv_cache.view(torch.float8_e4m3fn)
            scales = {"k_scales": layer._k_scale.view(1, 1, 1), "v_scales": layer._v_scale.view(1, 1, 1)}
        k_pages, v_pages = kv_cache.transpose(1, 2).split(head_dim, -1)
        pages, page_size = k_pages.shape[:2]
        if pages * page_size >= 2**31:
            raise NotImplementedError(f"{NAME}: a pool of {pages} pages of {page_size}, past 2^31 tokens")
        table = torch.arange(pages, dtype=torch.int32, device=kv_cache.device)[None]
        return cls(k_pages, v_pages, scales, table)
