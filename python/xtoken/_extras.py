"""Parts of the package that need an extra: one line says which, where it is not installed."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

from xtoken.errors import MissingExtraError

Extra = Literal["torch", "train", "serve"]

# Top-level modules by the smallest extra that brings them.
_MODULES: dict[str, Extra] = {
    "torch": "torch",
    "accelerate": "train",
    "datasets": "train",
    "gguf": "train",
    "httpx2": "serve",
    "matplotlib": "train",
    "pyarrow": "train",
    "transformers": "train",
    "yaml": "train",
}


def installed(module: str) -> bool:
    """Whether a module of an extra can be imported, without importing it."""
    try:
        return importlib.util.find_spec(module) is not None
    except ImportError:
        return False


def missing_extra(error: ImportError) -> MissingExtraError | None:
    """The error to show where a module of an extra cannot be imported; None for other modules."""
    for each in _causes(error):
        module = (each.name or "").partition(".")[0]
        extra = _MODULES.get(module)
        if extra is not None and not installed(module):
            return MissingExtraError(
                f'this needs {module}, which is not installed; pip install "xtoken[{extra}]"'
            )
    return None


def _causes(error: BaseException) -> Iterator[ImportError]:
    """The failed imports behind an error, the first cause first: transformers raises one of its
    own, of no module, for what its modules cannot import."""
    found: list[ImportError] = []
    cause: BaseException | None = error
    while cause is not None and all(cause is not each for each in found):
        if isinstance(cause, ImportError):
            found.append(cause)
        cause = cause.__cause__ or cause.__context__
    yield from reversed(found)


@contextmanager
def needs_extra() -> Iterator[None]:
    """Turn the failed import of an extra's module into a `MissingExtraError`."""
    try:
        yield
    except ImportError as error:
        if (clear := missing_extra(error)) is None:
            raise
        raise clear from error
