"""Another tokenizer for a trained model: new embedding and head rows from W."""

from xtoken.transfer.counts import RowCounts as RowCounts
from xtoken.transfer.counts import TransferCounts as TransferCounts
from xtoken.transfer.embeddings import transfer_embeddings as transfer_embeddings
