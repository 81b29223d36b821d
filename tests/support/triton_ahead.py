"""Compiling Triton's kernels for a GPU that is not there."""

import pytest


def compiled_ahead(kernel, constants: dict, types: dict) -> bytes:
    """The code of a kernel for compute capability 9.0; arguments without a type are pointers to float32."""
    triton = pytest.importorskip("triton")
    compiler = pytest.importorskip("triton.backends.compiler")
    if not hasattr(triton, "knobs"):
        pytest.skip(f"Triton {triton.__version__} has another interface for compiling ahead of time")
    constants = {name: value for name, value in constants.items() if name in kernel.arg_names}
    signature = {name: "constexpr" if name in constants else types.get(name, "*fp32") for name in kernel.arg_names}
    source = triton.compiler.ASTSource(kernel, signature, constants)
    target = compiler.GPUTarget("cuda", 90, 32)
    return triton.compile(source, target=target, options={"num_warps": 2}).asm["cubin"]
