"""Build the C++ kernels. They are optional: without a compiler the package installs and computes with plain torch."""

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
            # There is no -march: each file names the instruction sets of its own functions, and the best one is chosen
            # at run time, so that one wheel serves every processor.
            extra_compile_args=[
                "-O3",
                # Loops take 2 to 5 % less time or more, depending on where in memory they begin.
                "-falign-functions=64",
                "-falign-loops=64",
                "-g0",
                # Python's own flags may contain -fwrapv, which keeps the compiler from simplifying indices.
                "-fno-wrapv",
                "-std=c++17",
                "-fvisibility=hidden",
                # Warnings about vector types as arguments, and about GCC's own headers of vector instructions.
                "-Wno-psabi",
                "-Wno-uninitialized",
                "-Wno-maybe-uninitialized",
            ],
            extra_link_args=["-pthread"],
            optional=True,
        )
    ]
)
