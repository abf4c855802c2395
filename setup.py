"""The optional C++ kernels; everything else is in pyproject.toml."""

from setuptools import Extension, setup

setup(
    ext_modules=[
        Extension(
            "cloven.field.native._kernels",
            ["src/cloven/field/native/product.cpp"],
            depends=["src/cloven/field/native/pool.hpp"],
            extra_compile_args=["-std=c++17", "-O3", "-fvisibility=hidden", "-pthread"],
            extra_link_args=["-pthread"],
            optional=True,  # without a compiler, PyTorch's product does the work
        )
    ]
)
