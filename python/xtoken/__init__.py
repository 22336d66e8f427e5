"""Distil a language model from a teacher whose tokenizer is different.

Importing `xtoken` brings numpy and the Rust core, and neither torch nor transformers.
"""

from xtoken._core import FormatError as FormatError
from xtoken._core import OptionError as OptionError
from xtoken._core import ShapeError as ShapeError
from xtoken._core import TokenIdError as TokenIdError
from xtoken._core import UnsupportedTokenizerError as UnsupportedTokenizerError
from xtoken._core import Vocab as Vocab
from xtoken._core import XTokenError as XTokenError
from xtoken._core import __version__ as __version__
from xtoken.aligner import Aligner as Aligner
from xtoken.alignment import Alignment as Alignment
from xtoken.alignment import AlignmentBatch as AlignmentBatch
from xtoken.alignment import ChunkKind as ChunkKind
from xtoken.alignment import Coverage as Coverage
from xtoken.csr import Csr as Csr
from xtoken.explanation import Explanation as Explanation
from xtoken.projection import Projection as Projection
from xtoken.projection_file import PairError as PairError
from xtoken.projection_options import ProjectionOptions as ProjectionOptions
