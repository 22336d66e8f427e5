"""What is wrong with the data, in words a caller can act on."""

from xtoken import XTokenError


class DataError(XTokenError):
    """A text, a document file or an example cannot be used; the message says which and why."""
