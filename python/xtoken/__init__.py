"""Distil a language model from a teacher whose tokenizer is different.

Importing `xtoken` brings numpy and the Rust core, and neither torch nor transformers.
"""

from xtoken._core import Vocab as Vocab
from xtoken._core import __version__ as __version__
from xtoken.align import Aligner as Aligner
from xtoken.align import Alignment as Alignment
from xtoken.align import AlignmentBatch as AlignmentBatch
from xtoken.align import ChunkKind as ChunkKind
from xtoken.align import Coverage as Coverage
from xtoken.errors import ArgumentTypeError as ArgumentTypeError
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
