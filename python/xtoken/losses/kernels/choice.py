"""Whether a kernel or torch computes a loss: the option, the versions, the device."""

from __future__ import annotations

import importlib.metadata
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Literal, get_args

import torch
from packaging.version import Version
from torch import Tensor

from xtoken.errors import KernelWarning, OptionError
from xtoken.tensors.host import ordinary

Mode = Literal["auto", "torch", "triton"]

VARIABLE = "XTOKEN_KERNELS"
# The kernels were compiled with Triton 3.2.0 and 3.9.0, and run in the interpreter of the latter.
LEAST, BELOW = Version("3.2"), Version("4")
# Ampere: the oldest with bfloat16.
LEAST_CAPABILITY = (8, 0)
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

# Of all threads: on a device backward runs in one of its own.
_forced: list[Mode] = []
# What was found once: None for good, else why not.
_found: dict[tuple[object, ...], str | None] = {}

# Compares a kernel with torch on a device, in the dtypes of student and teacher; None where equal,
# else what differed.
Check = Callable[[torch.device, torch.dtype, torch.dtype], str | None]


def mode() -> Mode:
    """What the variable `XTOKEN_KERNELS` asks for.

    Raises:
        OptionError: another value.
    """
    if _forced:
        return _forced[-1]
    value = os.environ.get(VARIABLE, "auto")
    if value not in get_args(Mode):
        raise OptionError(f"{VARIABLE} = {value!r}, expected one of {', '.join(get_args(Mode))}")
    return value  # type: ignore[return-value]


@contextmanager
def forced(value: Mode) -> Iterator[None]:
    """One path inside, whatever the variable says and without a self-check."""
    _forced.append(value)
    try:
        yield
    finally:
        _forced.pop()


def takes(name: str, check: Check, student: Tensor, teacher: Tensor | None = None) -> bool:
    """Whether the kernel `name` computes a loss of these logits; `check` runs at its first use.

    Under "auto" torch computes what the kernel cannot, and a warning says so once where a CUDA
    device is there. Under "triton" that is an error.

    Raises:
        OptionError: "triton", where it cannot run or differs from torch.
    """
    wanted = mode()
    if wanted == "torch" or torch.compiler.is_compiling():
        return False
    tensors = (student,) if teacher is None else (student, teacher)
    if any(type(t) not in (Tensor, torch.nn.Parameter) or t.dtype not in _DTYPES for t in tensors):
        return False  # float64, or a tensor without values
    device = student.device
    if any(t.device != device for t in tensors) or not _runs_here(device, wanted):
        return False
    if _forced:
        return True
    place = (device.type, device.index)
    why = _once(place, lambda: _unusable(device))
    if why is None:
        dtypes = (student.dtype, tensors[-1].dtype)
        why = _once((name, place, *dtypes), lambda: _differs(name, check, device, *dtypes))
    if why is not None and wanted == "triton":
        raise OptionError(f"{VARIABLE} = 'triton', but {why}; pass {VARIABLE}=auto")
    return why is None


def on_device_of(tensor: Tensor) -> AbstractContextManager[object]:
    """The current device while kernels run: Triton launches there, wherever the arguments are."""
    return torch.cuda.device(tensor.device) if tensor.device.type == "cuda" else nullcontext()


def _runs_here(device: torch.device, wanted: Mode) -> bool:
    """Whether kernels are asked for: in "auto" on CUDA alone."""
    return device.type == "cuda" or wanted == "triton"


def _once(key: tuple[object, ...], find: Callable[[], str | None]) -> str | None:
    """`find()`, remembered; its first answer is told, as a silent fallback is never noticed."""
    if key not in _found:
        why = _found[key] = find()
        if why is not None and mode() == "auto":
            told = f"{why}; torch computes the loss instead ({VARIABLE}=torch ends this warning)"
            warnings.warn(told, KernelWarning, stacklevel=3)
    return _found[key]


def _unusable(device: torch.device) -> str | None:
    """Why no kernel runs on a device; None where they do."""
    try:
        found = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        return "Triton is not installed"
    if not LEAST <= Version(found) < BELOW:
        return f"Triton {found} is not among the releases known ({LEAST} up to {BELOW})"
    if device.type == "cuda":
        if torch.version.hip is not None:
            return "the kernels were never tried on ROCm"
        capability = torch.cuda.get_device_capability(device)
        if capability < LEAST_CAPABILITY:
            return f"{device} has compute capability {capability}, below {LEAST_CAPABILITY}"
        return None
    if device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1":
        return None
    return f"the logits are on {device}, and the kernels need CUDA"


def _differs(
    name: str, check: Check, device: torch.device, student: torch.dtype, teacher: torch.dtype
) -> str | None:
    """What the self-check of a kernel found; None for nothing."""
    what = f"the Triton kernel of {name}"
    try:
        with on_device_of(torch.empty(0, device=device)), ordinary():
            found = check(device, student, teacher)
    except Exception as error:  # whatever the compiler or the driver raises, torch can do it
        text = str(error).strip().splitlines() or [""]
        return f"{what} failed its self-check on {device} with {type(error).__name__}: {text[0]}"
    return None if found is None else f"{what} failed its self-check on {device}: {found}"
