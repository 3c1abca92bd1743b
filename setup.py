"""Maps the source folders to the package and builds the native CPU library.

The library uses torch's stable ABI only (no Python, no ATen header), so one build serves every Python and every
torch >= 2.10. Without a C++ compiler the package is still complete, less its CPU backend, and the build says so once.
"""

import os
import platform
import shutil
import subprocess
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent
CPU = ROOT / "csrc" / "cpu"
TORCH_ABI = "0x020a000000000000"  # 2.10

# One object per instruction set from the same kernel sources; csrc/cpu/isa.cpp chooses among them at run time.
X86_ISAS = {
    "portable": ["-march=x86-64"],
    "avx2": ["-march=haswell"],
    "avx512": ["-march=skylake-avx512", "-mprefer-vector-width=512"],
    "avx512_bf16": ["-march=cooperlake", "-mprefer-vector-width=512"],
}
ISAS = X86_ISAS if platform.machine().lower() in ("x86_64", "amd64") else {"portable": []}
KERNEL_SOURCES = sorted((CPU / "kernels").glob("*.cpp"))
HOST_SOURCES = sorted(CPU.glob("*.cpp"))


def compiler() -> str | None:
    return os.environ.get("CXX") or next(filter(None, map(shutil.which, ("g++", "clang++", "c++"))), None)


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


class BuildNative(build_ext):
    def get_ext_filename(self, fullname: str) -> str:
        return os.path.join(*fullname.split(".")) + ".so"

    def build_extension(self, ext: Extension) -> None:
        cxx, torch = compiler(), torch_folder()
        if cxx is None:
            self.warn("no C++ compiler found: building without the CPU backend (Triton and reference remain)")
            return
        if torch is None:
            raise RuntimeError("torch >= 2.10 is needed to build the CPU backend: pip install torch first")
        folder = ROOT / "build" / "objects"  # kept from build to build, unlike pip's temporary folder
        folder.mkdir(parents=True, exist_ok=True)
        flags = [
            "-std=c++20",
            "-O3",
            "-fPIC",
            "-fvisibility=hidden",
            "-ffp-contract=fast",
            "-fno-math-errno",
            "-Wall",
            "-Wno-maybe-uninitialized",
        ]
        flags += [f"-DTORCH_TARGET_VERSION={TORCH_ABI}", f"-I{ROOT / 'csrc'}", "-isystem", str(torch / "include")]
        headers = [*(ROOT / "csrc/common").glob("*.h"), *CPU.rglob("*.h"), Path(__file__)]
        newest_header = max(header.stat().st_mtime for header in headers)

        def compile_one(job: tuple[Path, str, list[str]]) -> str:
            source, name, extra = job
            target = folder / f"{source.stem}.{name}.o"
            if not target.exists() or target.stat().st_mtime < max(source.stat().st_mtime, newest_header):
                subprocess.run([cxx, *flags, *extra, "-c", str(source), "-o", str(target)], check=True)
            return str(target)

        jobs = [
            (s, isa, [*march, f"-DDUPLEX_ISA={isa}", f"-DDUPLEX_ISA_{isa.upper()}"])
            for s in KERNEL_SOURCES
            for isa, march in ISAS.items()
        ]
        jobs += [(s, "host", [f"-DDUPLEX_HAVE_{isa.upper()}" for isa in ISAS]) for s in HOST_SOURCES]
        with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS", os.cpu_count() or 1))) as pool:
            objects = list(pool.map(compile_one, jobs))
        library = Path(self.get_ext_fullpath(ext.name))
        library.parent.mkdir(parents=True, exist_ok=True)
        subprocess.run(
            [cxx, "-shared", *objects, "-o", str(library), f"-L{torch / 'lib'}", "-ltorch_cpu", "-lc10"], check=True
        )


setup(
    package_dir={"duplex_attn": "attn", "duplex_attn.kernels": "kernels"},
    packages=[
        "duplex_attn",
        *(f"duplex_attn.{p}" for p in find_packages("attn")),
        "duplex_attn.kernels",
        *(f"duplex_attn.kernels.{p}" for p in find_packages("kernels")),
    ],
    package_data={"duplex_attn": ["py.typed", "*.txt", "*.so"], "duplex_attn.kernels": ["tuning/*.json"]},
    ext_modules=[Extension("duplex_attn.libduplex_cpu", [])],
    cmdclass={"build_ext": BuildNative},
    setup_requires=[] if torch_folder() or compiler() is None else ["torch>=2.10"],
)
