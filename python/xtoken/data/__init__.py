"""From files of texts and conversations to padded, aligned batches."""

from xtoken.data.align_turns import align_by_turns as align_by_turns
from xtoken.data.align_turns import turn_end_chunks as turn_end_chunks
from xtoken.data.columns import ColumnExamples as ColumnExamples
from xtoken.data.columns import example_from_columns as example_from_columns
from xtoken.data.completions import Completion as Completion
from xtoken.data.conversations import Conversation as Conversation
from xtoken.data.documents import Documents as Documents
from xtoken.data.documents import LeftOut as LeftOut
from xtoken.data.documents import TextSplit as TextSplit
from xtoken.data.documents import cut_passages as cut_passages
from xtoken.data.documents import keep_apart as keep_apart
from xtoken.data.documents import split_held_out as split_held_out
from xtoken.data.encode import Encoder as Encoder
from xtoken.data.examples import Example as Example
from xtoken.data.examples import ExampleSet as ExampleSet
from xtoken.data.examples import make_examples as make_examples
from xtoken.data.loss_mask import Encoded as Encoded
from xtoken.data.read import load_rows as load_rows
from xtoken.data.read import read_documents as read_documents
from xtoken.data.read import read_texts as read_texts
from xtoken.data.rows import Document as Document
from xtoken.data.rows import document_of as document_of
from xtoken.data.stops import StopTokens as StopTokens
from xtoken.data.stops import stop_pairs as stop_pairs
from xtoken.data.stops import stop_tokens as stop_tokens
