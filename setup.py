"""What pyproject.toml cannot say: the compiled CPU parts, both optional, so that no compiler is no failure."""

import runpy
import sys

from setuptools import Extension, setup

flags = list(runpy.run_path("kernels/flags.py")["CXX"])
cpu = Extension(
    "gpuload.kernels._cpu",  # a plain C library, loaded with ctypes: decoding, resize, and both in one call
    sources=["kernels/slice_cpu.cpp", "kernels/ycc_cpu.cpp"],
    depends=[
        *(f"kernels/{name}.cpp" for name in ("jpeg_stored", "jpeg_region", "resize_cpu")),
        *(f"kernels/{name}.h" for name in ("jpeg_huffman", "resize_cpu_body", "cpu_shim")),
        "kernels/resize_normalize.cu",
        "kernels/ycc_to_rgb.cu",
        "kernels/flags.py",
    ],
    language="c++",
    extra_compile_args=[*flags, "-g0"],
    optional=True,
)
tables = Extension(
    "gpuload.kernels._tables",
    sources=["kernels/headers.cpp", "kernels/order.cpp", "kernels/views.cpp"],
    depends=["kernels/flags.py"],
    language="c++",
    extra_compile_args=[*flags, "-g0", "-ffp-contract=off"],  # the numbers of its NumPy twins, on every processor
    optional=True,
)
setup(ext_modules=[cpu, tables] if sys.platform != "win32" else [])
