"""Every error of the package: each is an `XTokenError`, and the builtin that users expect.

An error names the value, what was expected and the remedy, in one line. docs/errors.md has an entry
for each class; `page_of` gives its address.
"""

from __future__ import annotations

from signal import Signals

from xtoken._core import FormatError as FormatError
from xtoken._core import OptionError as OptionError
from xtoken._core import ShapeError as ShapeError
from xtoken._core import TokenIdError as TokenIdError
from xtoken._core import UnsupportedTokenizerError as UnsupportedTokenizerError
from xtoken._core import XTokenError as XTokenError

DOCUMENTATION = "https://github.com/xtoken-dev/xtoken/blob/main/docs"


class ArgumentTypeError(XTokenError, TypeError):
    """An argument is of another class than the call takes; the message names the one meant."""


class PairError(XTokenError):
    """Something was built for another pair of tokenizers than it is used with."""


class NonFiniteError(XTokenError):
    """A logit or a loss is NaN or infinite: the model diverged or overflowed."""


class BackwardError(XTokenError, RuntimeError):
    """A gradient cannot be made: of what was overwritten since, or of a gradient."""


class DataError(XTokenError):
    """A text, a document file or an example cannot be used; the message says which and why."""


class BlankTextError(DataError):
    """A text is blank: there is nothing to learn."""


class ModelSourceError(XTokenError):
    """A directory or hub model cannot be the student or teacher; the message says why."""


class ForeignFileError(FormatError):
    """A file is whole, but was not written for this purpose."""


class StoreError(XTokenError):
    """A file of the teacher's store is damaged or belongs to something else."""


class DamagedStoreError(StoreError):
    """A file of the teacher's store is not as it was written."""


class ServerError(XTokenError):
    """A served teacher cannot be reached, refuses, or gives an answer that cannot be used."""


class ResumeError(XTokenError):
    """A run cannot be resumed; the message names the difference or the damage."""


class FailedWriteError(XTokenError, OSError):
    """A file could not be written: the disk is full, a limit is reached, or it may not be.

    Attributes:
        reason: what the system says, or the library that wrote.
    """

    def __init__(self, message: str, reason: str = "") -> None:
        super().__init__(message)
        self.reason = reason


class HeldLockError(XTokenError, TimeoutError):
    """Another process holds a lock; no other call raises this."""


class NoLockError(XTokenError, OSError):
    """A file system has no locks between processes, where two may not work in one folder."""


class InterruptedRunError(XTokenError):
    """A signal ended a run after its step was finished and saved, or its student written.

    Attributes:
        signal: which.
    """

    def __init__(self, message: str, signal: Signals) -> None:
        super().__init__(message)
        self.signal = signal

    def __reduce__(self) -> tuple[type[InterruptedRunError], tuple[str, Signals]]:
        return type(self), (str(self), self.signal)


class RefusedRequestError(ServerError):
    """The server understood a request and refused it.

    Attributes:
        status: of HTTP.
        reason: in the server's words.
    """

    def __init__(self, message: str, status: int, reason: str) -> None:
        super().__init__(message)
        self.status = status
        self.reason = reason

    def __reduce__(self) -> tuple[type[RefusedRequestError], tuple[str, int, str]]:
        return type(self), (str(self), self.status, self.reason)


class UnavailableServerError(ServerError):
    """The server gave no answer in all tries."""


class MissingFileError(XTokenError, FileNotFoundError):
    """There is no such file; the message says what was expected there."""


class MissingExtraError(XTokenError, ImportError):
    """A part of the package needs an extra that is not installed; the message gives the command."""


class LowCoverageWarning(UserWarning):
    """Much of one and the same text lies in no chunk that a loss counts."""


class KernelWarning(UserWarning):
    """A Triton kernel of a loss cannot run, or differs from torch, which computes it instead."""


class UnavailableCacheWarning(UserWarning):
    """A cache cannot be read or written; the call goes through without it."""


class DamagedCheckpointWarning(UserWarning):
    """A checkpoint of a run was altered; the run goes on from an older one."""


def page_of(error: BaseException | type[BaseException]) -> str | None:
    """Where the documentation tells the cause and the remedy of an error or a warning.

    Returns: the address of the entry of its class, or of the nearest base that is of ours; None for
        what is not of ours.

    >>> page_of(PairError("of another pair"))
    'https://github.com/xtoken-dev/xtoken/blob/main/docs/errors.md#pairerror'
    >>> page_of(KeyError) is None
    True
    """
    kind = error if isinstance(error, type) else type(error)
    for base in kind.__mro__:
        if globals().get(base.__name__) is base:
            return f"{DOCUMENTATION}/errors.md#{base.__name__.lower()}"
    return None
