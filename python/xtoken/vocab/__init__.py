"""Vocabularies: what each token of a tokenizer contributes to the text, in bytes."""

from xtoken.vocab.read import LoadedTokenizer as LoadedTokenizer
from xtoken.vocab.read import load_tokenizer as load_tokenizer
from xtoken.vocab.read import read_path as read_path
from xtoken.vocab.read import read_tokenizer as read_tokenizer
from xtoken.vocab.source import TokenizerSource as TokenizerSource
