"""Distil a language model from a teacher whose tokenizer is different.

Importing `xtoken` brings the Rust core; numpy comes with the first name that needs it, and neither
torch nor transformers with any.
"""

import importlib
from typing import TYPE_CHECKING

from xtoken._core import Vocab as Vocab
from xtoken._core import __version__ as __version__

if TYPE_CHECKING:
    from xtoken.align import Aligner as Aligner
    from xtoken.align import Alignment as Alignment
    from xtoken.align import AlignmentBatch as AlignmentBatch
    from xtoken.align import ChunkKind as ChunkKind
    from xtoken.align import Coverage as Coverage
    from xtoken.errors import ArgumentTypeError as ArgumentTypeError
    from xtoken.errors import BackwardError as BackwardError
    from xtoken.errors import BlankTextError as BlankTextError
    from xtoken.errors import DataError as DataError
    from xtoken.errors import FormatError as FormatError
    from xtoken.errors import MissingExtraError as MissingExtraError
    from xtoken.errors import MissingFileError as MissingFileError
    from xtoken.errors import ModelSourceError as ModelSourceError
    from xtoken.errors import NonFiniteError as NonFiniteError
    from xtoken.errors import OptionError as OptionError
    from xtoken.errors import PairError as PairError
    from xtoken.errors import ResumeError as ResumeError
    from xtoken.errors import ServerError as ServerError
    from xtoken.errors import ShapeError as ShapeError
    from xtoken.errors import StoreError as StoreError
    from xtoken.errors import TokenIdError as TokenIdError
    from xtoken.errors import UnsupportedTokenizerError as UnsupportedTokenizerError
    from xtoken.errors import XTokenError as XTokenError
    from xtoken.pair import Pair as Pair
    from xtoken.pair import distiller as distiller
    from xtoken.projection import Csr as Csr
    from xtoken.projection import Explanation as Explanation
    from xtoken.projection import Projection as Projection
    from xtoken.projection import ProjectionOptions as ProjectionOptions
else:
    # The same names by their homes, each imported at its first use.
    _HOMES = {
        "align": "Aligner Alignment AlignmentBatch ChunkKind Coverage",
        "errors": (
            "ArgumentTypeError BackwardError BlankTextError DataError FormatError "
            "MissingExtraError MissingFileError ModelSourceError NonFiniteError OptionError "
            "PairError ResumeError ServerError ShapeError StoreError TokenIdError "
            "UnsupportedTokenizerError XTokenError"
        ),
        "pair": "Pair distiller",
        "projection": "Csr Explanation Projection ProjectionOptions",
    }
    _NAMES = {name: home for home, names in _HOMES.items() for name in names.split()}

    # Modules that are attributes after `import xtoken` alone.
    _WINGS = ("align", "audit", "data", "errors", "pair", "projection", "targets", "trie", "vocab")

    def __getattr__(name: str) -> object:
        if name in _NAMES:
            value = getattr(importlib.import_module(f"xtoken.{_NAMES[name]}"), name)
        elif name in _WINGS:
            value = importlib.import_module(f"xtoken.{name}")
        else:
            raise AttributeError(f"module 'xtoken' has no attribute {name!r}")
        globals()[name] = value
        return value

    def __dir__() -> list[str]:
        return sorted({*globals(), *_NAMES, *_WINGS})
