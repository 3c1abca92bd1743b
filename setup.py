"""Maps the source folders to the package and builds the native libraries.

The CPU library uses torch's stable ABI only (no Python, no ATen header), so one build serves every Python and every
torch >= 2.10; so does the CUDA library, which is built wherever nvcc is, with a card or without. The runtime is bound
with pybind11, for one Python, and knows nothing of torch. Without a C++ compiler the package is still complete, less
its CPU backend and its cache, and the build says so once.
"""

import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
import zlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent
CSRC = ROOT / "csrc"
CPU = CSRC / "cpu"
CUDA = CSRC / "cuda"
RUNTIME = CSRC / "runtime"
OBJECTS = ROOT / "build" / "objects"  # kept from build to build, unlike pip's temporary folder
TORCH_ABI = "0x020a000000000000"  # 2.10

# One object per instruction set from the same kernel sources; csrc/cpu/isa.cpp chooses among them at run time.
X86_ISAS = {
    "portable": ["-march=x86-64"],
    "avx2": ["-march=haswell"],
    "avx512": ["-march=skylake-avx512", "-mprefer-vector-width=512"],
    "avx512_bf16": ["-march=cooperlake", "-mprefer-vector-width=512"],
}
# Where products go to the matrix unit: only bfloat16, so only these sources.
MATRIX_ISAS = {isa: [*X86_ISAS["avx512_bf16"], "-DDUPLEX_MATRIX_UNIT"] for isa in ("amx", "amx_emulated")}
MATRIX_SOURCES = ("forward.cpp", "backward.cpp")
IS_X86 = platform.machine().lower() in ("x86_64", "amd64")
KERNEL_SOURCES = sorted((CPU / "kernels").glob("*.cpp"))
HOST_SOURCES = sorted(CPU.glob("*.cpp"))


def compiler() -> str | None:
    return os.environ.get("CXX") or next(filter(None, map(shutil.which, ("g++", "clang++", "c++"))), None)


@cache
def isas(cxx: str) -> dict[str, list[str]]:
    if not IS_X86:
        return {"portable": []}
    command, text = [cxx, "-x", "c", "-c", "-o", os.devnull, "-"], 'void f(void) { __asm__("tilerelease"); }'
    tile = subprocess.run(command, input=text, text=True, capture_output=True)
    return X86_ISAS | (MATRIX_ISAS if sys.platform == "linux" and tile.returncode == 0 else {})


def torch_folder() -> Path | None:
    """Where torch's headers are. An isolated build cannot import torch, but the environment's copy is on disk."""
    installed = Path(sysconfig.get_path("platlib")) / "torch"
    if (installed / "include/torch/csrc/stable/library.h").exists():
        return installed
    try:
        import torch
    except ImportError:
        return None
    return Path(torch.__file__).parent


FLAGS = ("-std=c++20", "-O3", "-fPIC", "-fvisibility=hidden", "-Wall", f"-I{CSRC}")
# Of kernels alone: what lets them vectorise.
CPU_FLAGS = ("-ffp-contract=fast", "-fno-math-errno", "-Wno-maybe-uninitialized", "-Wno-uninitialized")


# One object per head_dim from the same source. What is in a generation's folder is compiled for it (wgmma is in no
# other than Hopper), what all share for each; later cards compile Ampere's PTX.
HEAD_DIMS = (64, 96, 128, 192, 256)
FUSED_HEAD_DIMS = (64, 96, 128)
PAGED_HEAD_DIMS = (64, 128, 256)
HOPPER = "-gencode=arch=compute_90a,code=sm_90a"
AMPERE = "-gencode=arch=compute_80,code=[sm_80,compute_80]"
OLDEST_NVCC = (12, 5)  # whose runtime finds the driver's functions by version


def nvcc() -> str | None:
    homes = filter(None, (os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"))
    found = shutil.which("nvcc") or next((p for h in homes if (p := shutil.which("nvcc", path=f"{h}/bin"))), None)
    return found if found and nvcc_version(found) >= OLDEST_NVCC else None


@cache
def nvcc_version(path: str) -> tuple[int, ...]:
    try:
        printed = subprocess.run([path, "--version"], capture_output=True, text=True).stdout
    except OSError:
        return (0,)
    release = re.search(r"release (\d+)\.(\d+)", printed)
    return tuple(map(int, release.groups())) if release else (0,)


@dataclass(frozen=True)
class Job:
    """One object file to compile."""

    compiler: str
    source: Path
    variant: str
    flags: tuple[str, ...]

    def cost(self) -> int:
        """Text to be read, once for each kind of card: what takes the compiler longest has most of it."""
        targets = max(sum(flag.startswith("-gencode") for flag in self.flags), 1)
        return targets * sum(path.stat().st_size for path in read_by(self.source))

    def run(self) -> Path:
        """The object, compiled anew where it is older than what it is made of."""
        how = zlib.crc32(" ".join([self.compiler, *self.flags]).encode())
        folder = OBJECTS / self.source.relative_to(CSRC).parts[0]
        folder.mkdir(parents=True, exist_ok=True)
        target = folder / f"{self.source.name}.{self.variant}.{how:08x}.o"
        newest = max(path.stat().st_mtime for path in read_by(self.source))
        if target.exists() and target.stat().st_mtime >= newest:
            return target
        unfinished = target.with_suffix(".part.o")  # of a build that is stopped, nothing that looks whole stays
        command = [self.compiler, *self.flags, "-c", str(self.source), "-o", str(unfinished)]
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        target.with_suffix(".txt").write_text(done.stdout)  # its remarks; of nvcc, what each kernel uses
        if done.returncode or "warning" in done.stdout:
            print(done.stdout)
        done.check_returncode()
        return unfinished.replace(target)


@cache
def read_by(source: Path) -> frozenset[Path]:
    """The file and the project's headers that it includes, and those that they do."""
    included = (CSRC / name for name in re.findall(r'^#include "(.+)"', source.read_text(), re.MULTILINE))
    return frozenset({source}).union(*(read_by(path) for path in included))


@dataclass(frozen=True)
class Library:
    """What is compiled, and how it becomes one file."""

    jobs: list[Job]
    linker: list[str]
    links: list[str]  # what it is linked to


def library(name: str, cxx: str) -> Library:
    if name == "duplex_attn._runtime":
        return Library(runtime_jobs(cxx), [cxx], [])
    torch = torch_folder()
    if torch is None:
        raise RuntimeError("torch >= 2.10 is needed to build the native libraries: pip install torch first")
    links = [f"-L{torch / 'lib'}", "-ltorch_cpu", "-lc10"]
    if name == "duplex_attn.libduplex_cpu":
        return Library(cpu_jobs(torch, cxx), [cxx], links)
    nvidia, stub = nvcc() or "", cuda_stub(cxx)
    linker = [nvidia, AMPERE, HOPPER, "-ccbin", cxx, "-cudart", "static", "-Xlinker", "--no-as-needed"]
    return Library(cuda_jobs(torch, nvidia, cxx), linker, [f"-L{stub.parent}", "-ltorch_cuda", *links])


def cpu_jobs(torch: Path, cxx: str) -> list[Job]:
    flags = (*FLAGS, *CPU_FLAGS, f"-DTORCH_TARGET_VERSION={TORCH_ABI}", "-isystem", str(torch / "include"))
    kernels = [
        Job(cxx, s, isa, (*flags, *march, f"-DDUPLEX_ISA={isa}", f"-DDUPLEX_ISA_{isa.upper()}"))
        for s in KERNEL_SOURCES
        for isa, march in isas(cxx).items()
        if isa not in MATRIX_ISAS or s.name in MATRIX_SOURCES
    ]
    host = (*flags, *(f"-DDUPLEX_HAVE_{isa.upper()}" for isa in isas(cxx)))
    return kernels + [Job(cxx, s, "host", host) for s in HOST_SOURCES]


def cuda_jobs(torch: Path, nvidia: str, cxx: str) -> list[Job]:
    flags = ("-std=c++20", "-O3", "-ccbin", cxx, "-Xcompiler", "-fPIC,-fvisibility=hidden", f"-I{CSRC}")
    flags += ("-isystem", str(torch / "include"), "-DUSE_CUDA", f"-DTORCH_TARGET_VERSION={TORCH_ABI}")
    flags += ("--resource-usage",)
    per_head_dim = [
        *((s, [HOPPER], HEAD_DIMS) for s in CUDA.glob("sm90/*.cu") if s.name not in ("fused.cu", "decode.cu")),
        (CUDA / "sm90/fused.cu", [HOPPER], FUSED_HEAD_DIMS),
        *((source, [AMPERE], HEAD_DIMS) for source in CUDA.glob("sm80/*.cu")),
        (CUDA / "sm90/decode.cu", [HOPPER], PAGED_HEAD_DIMS),
        (CUDA / "paged/attend.cu", [AMPERE, HOPPER], PAGED_HEAD_DIMS),
    ]
    kernels = [
        Job(nvidia, source, f"{source.parent.name}.{d}", (*flags, *targets, f"-DDUPLEX_HEAD_DIM={d}"))
        for source, targets, head_dims in sorted(per_head_dim)
        for d in head_dims
    ]
    others = {*CUDA.rglob("*.cu"), *CUDA.rglob("*.cpp")} - {job.source for job in kernels}
    return kernels + [Job(nvidia, s, f"{s.parent.name}.host", (*flags, AMPERE, HOPPER)) for s in sorted(others)]


def cuda_stub(cxx: str) -> Path:
    """Nothing, under the name of torch's CUDA library: what links to it finds its symbols there beside a CUDA torch."""
    stub = OBJECTS / "cuda" / "libtorch_cuda.so"
    stub.parent.mkdir(parents=True, exist_ok=True)
    subprocess.run([cxx, "-shared", "-Wl,-soname,libtorch_cuda.so", "-x", "c", os.devnull, "-o", str(stub)], check=True)
    return stub


def runtime_jobs(cxx: str) -> list[Job]:
    try:
        import pybind11
    except ImportError:
        raise RuntimeError("pybind11 is needed to build the runtime: pip install pybind11 first") from None
    include = ("-isystem", pybind11.get_include(), "-isystem", sysconfig.get_path("include"))
    return [Job(cxx, s, "host", (*FLAGS, *include)) for s in sorted(RUNTIME.glob("*.cpp"))]


def missing(name: str) -> str | None:
    """What of the package is not built on this machine, and why."""
    if name == "duplex_attn.libduplex_cpu":
        return "no C++ compiler found: no CPU backend (Triton and reference remain)" if compiler() is None else None
    if name == "duplex_attn.libduplex_cuda":
        return (
            "no nvcc of CUDA 12.5 or later found: no CUDA kernels (Triton remains)"
            if nvcc() is None or compiler() is None
            else None
        )
    if compiler() is None:
        return "no C++ compiler found: no PagedKVCache"
    headers = Path(sysconfig.get_path("include")) / "Python.h"
    return None if headers.exists() else f"no {headers}, which Python's development package has: no PagedKVCache"


class BuildNative(build_ext):
    def get_ext_filename(self, fullname: str) -> str:
        if fullname.split(".")[-1] == "_runtime":
            return super().get_ext_filename(fullname)
        return os.path.join(*fullname.split(".")) + ".so"

    # An editable install links what there is.
    def get_outputs(self) -> list[str]:
        return [path for path in super().get_outputs() if Path(path).exists()]

    def get_output_mapping(self) -> dict[str, str]:
        return {built: kept for built, kept in super().get_output_mapping().items() if Path(built).exists()}

    def build_extensions(self) -> None:
        """All objects of all libraries share the cores, so that no library waits for another one's last object."""
        cxx = compiler()
        self.libraries = {
            ext.name: library(ext.name, cxx) for ext in self.extensions if missing(ext.name) is None and cxx is not None
        }
        jobs = [job for one in self.libraries.values() for job in one.jobs]
        pool = ThreadPoolExecutor(int(os.environ.get("MAX_JOBS", os.cpu_count() or 1)))
        try:
            self.objects = {job: pool.submit(job.run) for job in sorted(jobs, key=Job.cost, reverse=True)}
            super().build_extensions()
        finally:
            pool.shutdown(cancel_futures=True)

    def build_extension(self, ext: Extension) -> None:
        if (reason := missing(ext.name)) is not None:
            ext.optional = True
            self.warn(reason)
            return
        found = self.libraries[ext.name]
        objects = [str(self.objects[job].result()) for job in found.jobs]
        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        subprocess.run([*found.linker, "-shared", *objects, "-o", str(target), *found.links], check=True)


setup(
    package_dir={"duplex_attn": "attn", "duplex_attn.kernels": "kernels"},
    packages=[
        "duplex_attn",
        *(f"duplex_attn.{p}" for p in find_packages("attn")),
        "duplex_attn.kernels",
        *(f"duplex_attn.kernels.{p}" for p in find_packages("kernels")),
    ],
    package_data={
        "duplex_attn": ["py.typed", "*.pyi", "*.txt", "*.json", "*.so"],
        "duplex_attn.kernels": ["tuning/*.json"],
    },
    ext_modules=[
        Extension("duplex_attn.libduplex_cpu", []),
        Extension("duplex_attn.libduplex_cuda", []),
        Extension("duplex_attn._runtime", []),
    ],
    cmdclass={"build_ext": BuildNative},
    setup_requires=[] if torch_folder() or compiler() is None else ["torch>=2.10"],
)
