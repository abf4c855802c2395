"""The optional C++ parts; everything else is in pyproject.toml."""

from setuptools import Extension, setup

NATIVE = "src/cloven/field/native"

setup(
    ext_modules=[
        Extension(
            "cloven.field.native._kernels",
            [f"{NATIVE}/{name}.cpp" for name in ("product", "hadamard", "rows", "exchange", "query", "low_rank")],
            depends=[f"{NATIVE}/{name}.hpp" for name in ("amx", "passes", "pool", "shared_pool", "tiles", "turn_eight", "vnni")],
            extra_compile_args=["-std=c++17", "-O3", "-ffp-contract=off", "-fvisibility=hidden", "-pthread"],
            extra_link_args=["-pthread"],
            optional=True,  # without a compiler, PyTorch's product does the work
        ),
        Extension(
            "cloven.kv_shield.native._step",
            ["src/cloven/kv_shield/native/step.cpp"],
            depends=[
                "src/cloven/field/native/pool.hpp",
                "src/cloven/kv_shield/native/products.hpp",
                "src/cloven/kv_shield/native/rows.hpp",
                "src/cloven/wire/native/lane.hpp",
            ],
            extra_compile_args=["-std=c++17", "-O3", "-ffp-contract=off", "-fvisibility=hidden", "-pthread"],
            extra_link_args=["-pthread"],
            optional=True,  # without it, PyTorch does the work
        ),
        Extension(
            "cloven.worker.native._serve",
            ["src/cloven/worker/native/serve.cpp"],
            depends=["src/cloven/wire/native/lane.hpp"],
            extra_compile_args=["-std=c++17", "-O2", "-fvisibility=hidden"],
            optional=True,  # without it, Python answers every request
        ),
        Extension(
            "cloven.wire.native._bell",
            ["src/cloven/wire/native/bell.cpp"],
            depends=["src/cloven/wire/native/lane.hpp"],
            extra_compile_args=["-std=c++17", "-O2", "-fvisibility=hidden"],
            optional=True,  # without it, sockets carry everything
        ),
    ]
)
