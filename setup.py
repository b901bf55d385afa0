"""What pyproject.toml cannot say: the compiled CPU parts, both optional, so that no compiler is no failure."""

import runpy
import sys

from setuptools import Extension, setup

flags = list(runpy.run_path("kernels/flags.py")["CXX"])
resize = Extension(
    "gpuload.kernels._resize",  # a plain C library, loaded with ctypes
    sources=["kernels/resize_cpu.cpp"],
    depends=["kernels/resize_cpu_body.h", "kernels/resize_normalize.cu", "kernels/cpu_shim.h", "kernels/flags.py"],
    language="c++",
    extra_compile_args=[*flags, "-g0"],
    optional=True,
)
jpeg = Extension(
    "gpuload.kernels._jpeg",
    sources=["kernels/jpeg_region.cpp"],
    depends=["kernels/jpeg_huffman.h", "kernels/flags.py"],
    language="c++",
    extra_compile_args=[*flags, "-g0"],
    optional=True,
)
tables = Extension(
    "gpuload.kernels._tables",
    sources=["kernels/headers.cpp", "kernels/order.cpp"],
    depends=["kernels/flags.py"],
    language="c++",
    extra_compile_args=[*flags, "-g0"],
    optional=True,
)
setup(ext_modules=[resize, jpeg, tables] if sys.platform != "win32" else [])
