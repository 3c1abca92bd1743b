"""Compiles for a card that need not be there every kernel of a few calls, as the package itself would launch them.

    python compile_ahead.py TABLE     one line of JSON for each kernel on stdout

A process of its own: ahead-of-time compilation fails where TRITON_INTERPRET is set. Triton's driver is replaced by one that only
names the card, so that types, specialisations and constants come from the launches themselves.
"""

import json
import math
import multiprocessing
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
import triton
from duplex_attn.call import GRADIENTS, Call
from duplex_attn.kernels import attention, paged_calls, tuning
from duplex_attn.kernels.launch import Launch
from duplex_attn.paged.call import AppendCall, PagedCall
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase
from triton.runtime import driver

sys.path.append(str(Path(__file__).parent))
from operands import astray

TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"
BATCH, ROWS, HEADS, HEADS_KV = 2, 512, 4, 2
HALVES = {"plain": torch.bfloat16, "everything": torch.float16}


class NamedCard(DriverBase):
    def __init__(self, capability: int) -> None:
        self.target = GPUTarget("cuda", capability, 32)

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def get_benchmarker(self) -> None:
        raise NotImplementedError

    def map_python_to_cpp_type(self, ty: str) -> str:
        raise NotImplementedError

    @classmethod
    def is_active(cls) -> bool:
        return True


def plain_call(dtype: torch.dtype, head_dim: int) -> Call:
    """Dense and causal, with nothing that a score or a span can do without."""
    q, k, v = (torch.empty(BATCH, ROWS, heads, head_dim, dtype=dtype) for heads in (HEADS, HEADS_KV, HEADS_KV))
    nothing = dict.fromkeys(Call._fields)
    return Call(**nothing | {"q": q, "k": k, "v": v, "max_seqlen_q": ROWS, "max_seqlen_k": ROWS, "right": 0} | OFF)


def full_call(dtype: torch.dtype, head_dim: int) -> Call:
    """Packed, with a prefix for each sequence, and every term of a score."""
    lengths = torch.empty(BATCH + 1, dtype=torch.int32)
    terms = {
        "prefix": lengths[1:],
        "bias": torch.empty(BATCH, HEADS, ROWS, ROWS, dtype=dtype),
        "distance_bias": torch.empty(HEADS, 257),
        "alibi_slopes": torch.empty(HEADS),
        "sink": torch.empty(HEADS),
        "softcap": 30.0,
        "dropout_p": 0.1,
        "seed": torch.empty(1, dtype=torch.int64),
    }
    call = plain_call(dtype, head_dim)
    packed = {name: getattr(call, name).flatten(0, 1) for name in "qkv"}
    return call._replace(cu_seqlens_q=lengths, cu_seqlens_k=lengths, **packed, **terms)


def boolean_call(dtype: torch.dtype, head_dim: int) -> Call:
    """Padded, with nothing but a boolean bias in its scores, the last of their terms."""
    lengths = torch.empty(BATCH, dtype=torch.int32)
    keep = torch.empty(BATCH, 1, ROWS, ROWS, dtype=torch.bool)
    return plain_call(dtype, head_dim)._replace(seqlens_q=lengths, seqlens_k=lengths, bias=keep)


def narrow_call(dtype: torch.dtype, head_dim: int) -> Call:
    """Plain, with values narrower than keys, and where nothing is aligned: no copy from memory to shared memory goes ahead of its use,
    so that keys and values take turns in one place there."""
    c = plain_call(dtype, head_dim)
    sizes = {"q": c.q.shape, "k": c.k.shape, "v": (*c.v.shape[:-1], head_dim // 2)}
    odd = {name: torch.empty(math.prod(size) + 1, dtype=dtype)[1:].view(size) for name, size in sizes.items()}
    return c._replace(**odd)


def tables_call(dtype: torch.dtype, head_dim: int) -> Call:
    """DeBERTa's: padded, with a row of distances for each query and for each key."""
    lengths = torch.empty(BATCH, dtype=torch.int32)
    tables = {f"{name}_distance_bias": torch.empty(BATCH, HEADS, ROWS, 1023, dtype=dtype) for name in ("row", "col")}
    return plain_call(dtype, head_dim)._replace(seqlens_q=lengths, seqlens_k=lengths, right=None, **tables)


def training_call(dtype: torch.dtype, head_dim: int) -> Call:
    """BERT's in training: plain, with dropout."""
    seed = torch.empty(1, dtype=torch.int64)
    return plain_call(dtype, head_dim)._replace(right=None, dropout_p=0.1, seed=seed)


PAGES, PAGE_SIZE, WORKERS = 64, 16, 1024
STORED = {
    "plain": None,
    "everything": torch.int8,
    "prefill": None,
    "float8": torch.float8_e4m3fn,
}  # None: as the queries


def paged_calls_of(kind: str, dtype: torch.dtype, head_dim: int) -> tuple[PagedCall, AppendCall]:
    """Decoding and chunks of prefill with nothing that can be left out, prefill with everything, decoding over float8 pages, prefill
    with a boolean bias."""
    stored = STORED.get(kind) or dtype
    k_pages = torch.empty(PAGES, PAGE_SIZE, HEADS_KV, head_dim, dtype=stored)
    scales = None if stored == dtype else torch.empty(PAGES, PAGE_SIZE, HEADS_KV)
    lengths, angles = torch.empty(BATCH + 1, dtype=torch.int32), torch.empty(ROWS, head_dim // 2)
    table, positions = torch.empty(BATCH, PAGES, dtype=torch.int32), torch.empty(BATCH, dtype=torch.int32)
    rows = BATCH
    extra = {"left": None, "right": 0, "top_left": False, "max_seqlen_q": 1, "batch_invariant": False}
    rope = {"rope_cos": None, "rope_sin": None, "rope_interleaved": False}
    if kind in ("prefill", "everything", "boolean"):
        rows *= ROWS
        extra |= {"cu_seqlens_q": lengths, "max_seqlen_q": ROWS}
    if kind == "boolean":
        extra["bias"] = torch.empty(BATCH, 1, ROWS, PAGES * PAGE_SIZE, dtype=torch.bool)
    if kind == "everything":
        c = full_call(dtype, head_dim)
        names = ("prefix", "bias", "distance_bias", "alibi_slopes", "sink")
        extra |= {name: getattr(c, name) for name in names}
        rope |= {"rope_cos": angles, "rope_sin": angles}
        positions = torch.empty(rows, dtype=torch.int32)
    q, k = (torch.empty(rows, heads, head_dim, dtype=dtype) for heads in (HEADS, HEADS_KV))
    pages = {"k_pages": k_pages, "v_pages": k_pages, "k_scales": scales, "v_scales": scales, "block_table": table}
    softcap = 30.0 if kind == "everything" else 0.0
    read = {"q": q, "seqlens_k": lengths[1:], "softcap": softcap} | pages | rope | extra
    cu = lengths if kind == "everything" else None
    written = {"k": k, "v": k, "positions": positions, "cu_seqlens": cu} | pages | rope
    return PagedCall(**dict.fromkeys(PagedCall._fields) | read), AppendCall(
        **dict.fromkeys(AppendCall._fields) | written
    )


def paged_launches(table: str, kind: str, dtype: torch.dtype, head_dim: int) -> list[Launch]:
    c, new = paged_calls_of(kind, dtype, head_dim)
    division = paged_calls.divided(c, table, WORKERS)
    plan = torch.empty(64, 8, dtype=torch.int32)
    out, lse = torch.empty_like(c.q), torch.empty(HEADS, len(c.q))
    parts = paged_calls.partial_results(c, max(division.slots, len(plan)))
    moved = paged_calls.copy(c.k_pages, new.positions, new.positions)
    reading = paged_calls.attention(c, out, lse, parts, division, table)
    if kind == "prefill":
        return [*reading, *paged_calls.planned(c, plan, out, lse, parts, table)]
    return [*reading, *paged_calls.append(new), moved]


OFF = {"top_left": False, "softcap": 0.0, "dropout_p": 0.0, "deterministic": True, "batch_invariant": False}
# For both calls.
CONFIGURED_ALIKE = {
    "delta_kernel",
    "merge_kernel",
    "append_kernel",
    "copy_kernel",
    "parts_kernel",
}
CALLS = {
    "plain": plain_call,
    "everything": full_call,
    "boolean": boolean_call,
    "narrow": narrow_call,
    "tables": tables_call,
    "training": training_call,
}
ONCE = {  # kernels of calls that are compiled in one class alone
    "boolean": {"forward_kernel", "dq_kernel", "dkdv_kernel", "paged_kernel"},
    "narrow": {"forward_kernel", "dq_kernel", "dkdv_kernel"},
    "tables": {"forward_kernel", "dq_kernel", "dkdv_kernel", "drow_bias_kernel"},
    "training": {"forward_kernel", "dq_kernel", "dkdv_kernel"},
}


def launches(table: str, kind: str, bits: int, head_dim: int) -> list[Launch]:
    dtype = torch.float32 if bits == 32 else HALVES.get(kind, torch.bfloat16)
    if kind not in CALLS:
        return paged_launches(table, kind, dtype, head_dim)
    c = CALLS[kind](dtype, head_dim)
    out, dout = (torch.empty(*c.q.shape[:-1], c.v.shape[-1], dtype=dtype) for _ in range(2))
    lse = torch.empty((HEADS, BATCH * ROWS) if c.packed else (BATCH, HEADS, ROWS))
    inputs = [getattr(c, name) for name in GRADIENTS]
    grads = [torch.empty_like(x) if x is not None and x.is_floating_point() else None for x in inputs]
    partial = torch.empty(attention.diagonals(c, table).size) if kind == "everything" else None
    dlse = lse if kind == "everything" else None
    return [
        attention.forward(c, out, lse, table),
        *attention.backward(c, dout, dlse, out, lse, grads, torch.empty_like(lse), partial, table),
        attention.merge([out, out], [lse, lse], out, lse),
        *(paged_launches(table, kind, dtype, head_dim) if kind in ("plain", "everything", "boolean") else []),
    ]


def jobs(table: str) -> list[tuple[str, str, int, int, int]]:
    """Every configuration of the table; `everything` takes the compiler longest, so the kernels of one class alone repeat under it."""
    found = []
    for bits, repeated in ((32, 64), (16, 128)):
        for head_dim in (256, 128, 64):
            for kind in STORED if bits == 16 else ("plain", "everything"):
                for n, launch in enumerate(launches(table, kind, bits, head_dim)):
                    if kind != "everything" or head_dim == repeated or launch.kernel.__name__ not in CONFIGURED_ALIKE:
                        found.append((table, kind, bits, head_dim, n))
    for kind, kernels in ONCE.items():
        for n, launch in enumerate(launches(table, kind, 16, 64)):
            if launch.kernel.__name__ in kernels:
                found.append((table, kind, 16, 64, n))
    return found


def told_by(tool: str, *arguments: str) -> str:
    return subprocess.run([TOOLS / tool, *arguments], check=True, capture_output=True, text=True).stdout


def under_products(code: str) -> float:
    """How many of the exponentials stand between a product of Hopper's and the wait for it."""
    running = re.findall(r"HGMMA(.*?)WARPGROUP\.DEPBAR", code, re.DOTALL)
    return sum(x.count("MUFU.EX2") for x in running) / max(1, code.count("MUFU.EX2"))


def report(job: tuple[str, str, int, int, int]) -> dict:
    table, kind, bits, head_dim, n = job
    launch = launches(table, kind, bits, head_dim)[n]
    begin = time.perf_counter()
    binary = launch.kernel.warmup(
        *launch.arguments, grid=(launch.programs,), **launch.constants, **launch.options
    )  # launch.run, without the last step
    seconds = time.perf_counter() - begin
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(binary.asm["cubin"])
        cubin.flush()
        usage = told_by("cuobjdump", "--dump-resource-usage", cubin.name)
        code = told_by("nvdisasm", "-c", cubin.name)
    registers, stack, local = (int(re.search(rf"{what}:(\d+)", usage)[1]) for what in ("REG", "STACK", "LOCAL"))
    ptx = binary.asm["ptx"]
    return {
        "kernel": launch.kernel.__name__.removesuffix("_kernel"),
        "call": kind,
        "bits": bits,
        "head_dim": head_dim,
        "tile": "x".join(
            str(launch.constants[name]) for name in ("BLOCK_M", "BLOCK_N", "T") if name in launch.constants
        ),
        "warps": launch.options["num_warps"],
        "stages": launch.options.get("num_stages", "-"),
        "registers": registers,
        "spilled": stack + local,  # bytes a thread
        "shared": binary.metadata.shared,
        "wgmma": ptx.count("wgmma.mma_async"),
        "mma": ptx.count("mma.sync"),
        "bulk": ptx.count("cp.async.bulk.tensor"),
        "astray": astray(code),
        "behind": launch.constants.get("BEHIND", False),
        "under": under_products(code),
        "slow": len(re.findall(r"cvt\.(?:rn\.)?bf16\.f16", ptx)),  # of one number each
        "bytewise": len(re.findall(r"LDS\.[US]8", code)),  # loads from shared memory, a byte each
        "descriptors": any(hasattr(x, "block_shape") for x in launch.arguments),
        "products": "HEAD_DIM_V" in launch.constants and "BLOCK_D" in launch.constants,
        "seconds": round(seconds, 1),
    }


if __name__ == "__main__":
    table = sys.argv[1]
    card = table if table.startswith("sm_") else tuning.tables()[table]["inherits"]
    driver.set_active(NamedCard(int(card.removeprefix("sm_"))))
    with multiprocessing.get_context("fork").Pool(2) as pool:
        for line in pool.imap_unordered(report, jobs(table)):
            print(json.dumps(line), flush=True)
