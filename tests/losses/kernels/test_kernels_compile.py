"""Every kernel compiles to machine code of an A100, an H100 and a B200, where no such card is."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from packaging.version import Version

from xtoken.losses.kernels import choice, scaling, self_check

triton = pytest.importorskip("triton")

# Whose constants have names; tried with 3.2.0.
OLD = Version(triton.__version__) < Version("3.3")
pytestmark = pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION:UserWarning")

CHECKS = {
    "same-vocab-kl": (
        self_check.same_vocab,
        {"clear_rows", "stats", "together", "gradient", "scale_unless_one"},
    ),
    "cross-entropy": (self_check.cross_entropy, {"clear_rows", "row_parts", "losses", "gradient"}),
    "the factor": (scaling.check, {"scale_unless_one"}),
    "p-kl": (
        self_check.p_kl,
        {
            "clear_rows",
            "shared_columns",
            "columns_of_logits",
            "columns_of_list",
            "mark",
            "student_sums",
            "together",
            "gradient",
            "largest",
            "row_parts",
            "row_totals",
            "column_mass",
            "losses",
            "scale_unless_one",
        },
    ),
    "prefix-kl": (
        self_check.prefix_kl,
        {
            "clear_rows",
            "shared_columns",
            "columns_of_logits",
            "together",
            "gradient",
            "group_logs",
            "items",
            "row_parts",
            "losses",
            "scale_unless_one",
            "mark",
            "tail_parts",
            "positions",
            "tail_gradient",
            "group_gradient",
        },
    ),
    "exact-kl": (
        self_check.exact,
        {
            "clear_rows",
            "mark",
            "group_logs",
            "tail_parts",
            "positions",
            "tail_gradient",
            "group_gradient",
            "gradient",
            "scale_unless_one",
        },
    ),
}

# What was compiled before, by architecture and Triton's hash of source, types and constants.
DONE: set[tuple[int, str]] = set()


class Compiler:
    """In place of a launch: the kernel compiled for its arguments, which are not touched."""

    def __init__(self, architecture: int) -> None:
        from triton.backends.compiler import GPUTarget

        self.target = GPUTarget("cuda", architecture, 32)
        self.compiled: dict[str, set[str]] = {}

    def __call__(self, kernel: Any, *arguments: Any, grid: Any, warmup: bool, **named: Any) -> None:
        from triton.compiler import ASTSource, compile

        assert all(0 < size <= (2**31 - 1, 65535, 65535)[axis] for axis, size in enumerate(grid))
        options = {"num_warps": named.pop("num_warps", 4)}
        values = dict(zip(kernel.arg_names, arguments, strict=False)) | named
        assert set(values) == set(kernel.arg_names)
        types: dict[str, str] = {}
        constants: dict[Any, Any] = {}
        for parameter in kernel.params:
            value = values[parameter.name]
            if not parameter.is_constexpr:
                types[parameter.name] = type_of(value)
            elif OLD:
                constants[parameter.name] = value
            else:
                types[parameter.name], constants[(parameter.num,)] = "constexpr", value
        source = ASTSource(kernel, types, constants)
        self.compiled.setdefault(kernel.__name__, set()).add(str(sorted(types.items())))
        key = self.target.arch, source.hash()
        if key in DONE:
            return
        made = compile(source, target=self.target, options=options)
        assert len(made.asm["cubin"])
        # A float added atomically differs from run to run.
        assert not re.search(r"(atom|red)\.\S*\.(f|bf)\d", made.asm["ptx"])
        DONE.add(key)


def type_of(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        names = {
            torch.float64: "fp64", torch.float32: "fp32", torch.bfloat16: "bf16",
            torch.float16: "fp16", torch.int64: "i64", torch.int32: "i32",
            torch.int8: "i8", torch.bool: "i1",
        }  # fmt: skip
        return "*" + names[value.dtype]
    if isinstance(value, float):
        return "fp32"
    return "i64" if abs(value) >= 2**31 else "i32"


@pytest.fixture(scope="module", autouse=True)
def own_cache(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[None]:
    """Triton's cache in that of pytest, which the next run finds: what is in it goes by the hash of
    the kernel's source, of Triton itself and of its compilers."""
    cache = getattr(request.config, "cache", None)
    folder = tmp_path_factory.mktemp("triton") if cache is None else cache.mkdir("triton")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_CACHE_DIR", str(folder))
        yield


@pytest.fixture
def compiler(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Compiler:
    from triton.runtime.jit import JITFunction

    if OLD and request.param == 100:
        pytest.skip("an older ptxas knows no sm_100")
    made = Compiler(request.param)
    monkeypatch.setattr(JITFunction, "run", lambda self, *a, **b: made(self, *a, **b))
    return made


@pytest.mark.parametrize("compiler", [80, 90, 100], indirect=True)
@pytest.mark.parametrize("name", CHECKS)
def test_compiles(name: str, compiler: Compiler, monkeypatch: pytest.MonkeyPatch) -> None:
    compiles(name, compiler, monkeypatch, torch.bfloat16, torch.bfloat16)


@pytest.mark.parametrize("compiler", [90], indirect=True)
@pytest.mark.parametrize("name", CHECKS)
def test_compiles_for_other_dtypes(
    name: str, compiler: Compiler, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiles(name, compiler, monkeypatch, torch.float16, torch.float32)


def compiles(
    name: str, compiler: Compiler, patch: pytest.MonkeyPatch, *dtypes: torch.dtype
) -> None:
    check, kernels = CHECKS[name]
    patch.setattr(self_check, "_apart", lambda *results: None)
    patch.setattr(torch, "empty", torch.zeros)  # which nothing fills
    with choice.forced("triton"):
        check(torch.device("cpu"), *dtypes)
    assert set(compiler.compiled) == kernels
