"""The optional extension: without a C++ compiler the package installs all the same and computes with plain torch."""

from pathlib import Path

from setuptools import Extension, setup

SOURCES = Path("hf_lowrank/kernels/cpu")

setup(
    ext_modules=[
        Extension(
            "hf_lowrank.kernels.cpu._native",
            sources=sorted(str(path) for path in SOURCES.glob("*.cpp")),
            depends=sorted(str(path) for path in SOURCES.glob("*.h")),
            language="c++",
            # No -march: each file names the instruction sets of its own functions, and the best is chosen at run time.
            extra_compile_args=[
                "-O3",
                # Where the loops begin decides 2 to 5 % of their time.
                "-falign-functions=64",
                "-falign-loops=64",
                "-g0",
                "-fno-wrapv",
                "-std=c++17",
                "-fvisibility=hidden",
                "-Wno-psabi",
                "-Wno-uninitialized",
                "-Wno-maybe-uninitialized",
            ],
            extra_link_args=["-pthread"],
            optional=True,
        )
    ]
)
