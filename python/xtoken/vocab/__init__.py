"""Vocabularies: what each token of a tokenizer contributes to the text, in bytes."""

from xtoken.vocab.load import load_tokenizer as load_tokenizer
from xtoken.vocab.load import read_tokenizer as read_tokenizer
from xtoken.vocab.read import read_content as read_content
from xtoken.vocab.read import read_path as read_path
from xtoken.vocab.side import Side as Side
from xtoken.vocab.source import TokenizerSource as TokenizerSource
