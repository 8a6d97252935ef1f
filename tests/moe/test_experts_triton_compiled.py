# SPDX-License-Identifier: Apache-2.0
"""The Triton kernels of experts compiled ahead of time for an A100, an H100 and a B200: registers, shared memory, and
how operands and results move. The interpreter accepts what the compiler does not.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton", reason="triton is not installed")

import hotloop.kernels.moe.experts as fused
import torch
import triton
from hotloop.kernels.moe import grouped

pytestmark = pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION:UserWarning")

# Bytes of shared memory that a program can have.
SHARED = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
# The instruction that multiplies tiles.
PRODUCT = {80: "mma.sync", 90: "wgmma", 100: "tcgen05.mma"}
# Types of kernel arguments by name: whatever is not here is a bfloat16 tensor or a 32 bit integer.
POINTERS = {
    "*i64": (
        "token_ptr",
        "schedule_ptr",
        "offsets_ptr",
        "counts_ptr",
        "slot_ptr",
        "row_ptr",
        "b_token_ptr",
    ),
    "*fp32": ("scale_ptr", "dot_ptr", "weight_ptr"),
}
FLOATS = ("alpha", "shift", "limit")


def compiled(kernel: Any, architecture: int, constants: dict[str, Any], **options: int) -> Any:
    """As at run time for sizes and strides that 16 divides; a tensor that is None is absent."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = kernel.arg_names
    signature: dict[str, str] = {}
    for name in names:
        if name in constants:
            signature[name] = "constexpr"
        elif name.endswith("_ptr"):
            kinds = [kind for kind, known in POINTERS.items() if name in known]
            signature[name] = kinds[0] if kinds else "*bf16"
        else:
            signature[name] = "fp32" if name in FLOATS else "i32"
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, name in enumerate(names)
        if signature[name].startswith("*")
        or (signature[name] == "i32" and not kernel.params[i].do_not_specialize)
    }
    places = {(names.index(name),): value for name, value in constants.items()}
    source = ASTSource(fn=kernel, signature=signature, constexprs=places, attrs=aligned)
    return triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)


def stack_bytes(code: Any) -> int | None:
    """What a thread keeps in memory for want of registers, if Triton brings the tool that says it."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    if not tool.exists():
        return None
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(code.asm["cubin"])
        words = [str(tool), "--dump-resource-usage", str(path)]
        text = subprocess.run(words, capture_output=True, text=True, check=True).stdout
    found = re.search(r"STACK:(\d+)", text)
    assert found is not None, text
    return int(found[1])


COMMON = {"EVEN_INNER": True, "EVEN_COLUMNS": True, "PRECISION": "ieee", "UPCAST": False}
SWIGLU = {"KIND": "silu", "GATED": True, "INTERLEAVED": False, "HAS_LIMIT": False}
OSS = {"KIND": "silu", "GATED": True, "INTERLEAVED": True, "HAS_LIMIT": True}
ROW_MAJOR, COLUMN_MAJOR = {"stride_wn": 1}, {"stride_wk": 1}
FORWARD = {"NEED_KEPT": True, "NEED_H": True}
BACKWARD = {
    "HAS_TOKENS": True,
    "HAS_SCALE": True,
    "NEED_INNER": True,
    "NEED_H": True,
    "NEED_DOT": True,
}
NO_BIAS: dict[str, Any] = {"HAS_BIAS": False, "bias_ptr": None}
# (kernel, its constants, whether a tile of the product holds gate and value)
PRODUCTS: dict[str, tuple[str, dict[str, Any], bool]] = {
    "product": (
        "_grouped_product_fwd_kernel",
        {"HAS_TOKENS": False, "token_ptr": None, **NO_BIAS, **COLUMN_MAJOR},
        False,
    ),
    "product, bias": (
        "_grouped_product_fwd_kernel",
        {"HAS_TOKENS": True, "HAS_BIAS": True, **ROW_MAJOR},
        False,
    ),
    "swiglu": ("_expert_inner_fwd_kernel", {**SWIGLU, **FORWARD, **NO_BIAS, **COLUMN_MAJOR}, True),
    "gpt-oss": (
        "_expert_inner_fwd_kernel",
        {**OSS, **FORWARD, "HAS_BIAS": True, **ROW_MAJOR},
        True,
    ),
    "gradient of swiglu": ("_expert_inner_bwd_kernel", {**SWIGLU, **BACKWARD, **ROW_MAJOR}, True),
    "gradient of gpt-oss": ("_expert_inner_bwd_kernel", {**OSS, **BACKWARD, **COLUMN_MAJOR}, True),
}


def checked(kernel: Any, architecture: int, constants: dict[str, Any], config: Any) -> None:
    found = compiled(
        kernel,
        architecture,
        constants,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    ptx = found.asm["ptx"]
    assert PRODUCT[architecture] in ptx
    assert found.metadata.shared <= SHARED[architecture]
    # Operands come by asynchronous copies of 128 bit, and results leave in stores of 128 bit.
    copies = re.findall(r"cp\.async\.c[ag]\.shared\.global.*?, (0x[0-9a-f]+|\d+)", ptx)
    assert copies
    assert sum(int(c, 0) == 16 for c in copies) >= 0.8 * len(copies)
    assert "st.global.v4.b32" in ptx
    stack = stack_bytes(found)
    # An A100 multiplies from registers, of which some are wanting.
    assert stack is None or stack <= (256 if architecture == 80 else 0)


@pytest.mark.parametrize("architecture", SHARED)
@pytest.mark.parametrize("name", PRODUCTS)
def test_products_compile_within_registers_and_shared_memory(name: str, architecture: int) -> None:
    kernel, constants, halved = PRODUCTS[name]
    config = grouped.LARGE
    blocks = {
        "BLOCK_ROWS": config.rows,
        "BLOCK_COLUMNS": config.columns // 2 if halved else config.columns,
        "BLOCK_INNER": config.inner,
    }
    module = grouped if kernel.startswith("_grouped") else fused
    checked(getattr(module, kernel), architecture, {**COMMON, **constants, **blocks}, config)


@pytest.mark.parametrize("architecture", SHARED)
def test_gradients_of_weights_compile_within_registers_and_shared_memory(
    architecture: int,
) -> None:
    config = grouped.LARGE_WEIGHT
    constants = {
        "BLOCK_M": config.rows,
        "BLOCK_N": config.columns,
        "BLOCK_ROWS": config.inner,
        "A_TOKENS": False,
        "a_token_ptr": None,
        "B_TOKENS": True,
        "HAS_COUNTS": True,
        "PRECISION": "ieee",
        "UPCAST": False,
    }
    checked(grouped._grouped_weight_bwd_kernel, architecture, constants, config)


def test_kernels_beside_the_products_compile() -> None:
    for kernel, constants in (
        (
            grouped._tile_schedule_fwd_kernel,
            {"BLOCK_ROWS": 128, "BLOCK_TILES": 32, "SEGMENTS": 256, "HAS_COUNTS": True},
        ),
        (
            grouped._grouped_bias_bwd_kernel,
            {
                "BLOCK_ROWS": 64,
                "BLOCK_COLUMNS": 64,
                "HAS_TOKENS": True,
                "HAS_SCALE": True,
                "HAS_COUNTS": True,
            },
        ),
        (
            fused._choice_weight_bwd_kernel,
            {"BLOCK_ROWS": 128, "BLOCK_COLUMNS": 64, "HAS_BIAS": True},
        ),
        (
            fused._sum_choices_fwd_kernel,
            {"BLOCK_COLUMNS": 1024, "HAS_WEIGHT": True, "HAS_SHARED": True},
        ),
    ):
        for architecture in SHARED:
            found = compiled(kernel, architecture, constants)
            assert stack_bytes(found) in (None, 0)


def test_configurations_fit_the_shared_memory_they_are_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for available in (99, 163, 227):
        monkeypatch.setattr(grouped.core, "shared_memory", lambda _, n=available: n * 1024)
        for dtype in (torch.float32, torch.float16, torch.bfloat16):
            for allowed in (False, True):
                name = "tf32" if allowed and dtype == torch.float32 else "ieee"
                monkeypatch.setattr(grouped, "precision", lambda _, name=name: name)
                for mean in (1, 16, 17, 32, 33, 96, 97, 4096):
                    found = grouped.configs(dtype, 8 * mean, 8, torch.device("cpu"))
                    for config in found:
                        stage = (config.rows + config.columns) * config.inner * dtype.itemsize
                        buffers = min(config.num_stages, 3 if config.num_stages == 5 else 9)
                        assert stage * buffers <= available * 1024
                    # What is multiplied for a mean expert: its rows and less than three times as many of nothing.
                    assert found.product.rows <= max(16, 4 * mean)
