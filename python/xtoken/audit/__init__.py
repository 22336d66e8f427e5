"""What suits a pair of tokenizers: figures and a recommendation."""

from xtoken.audit.audit import Audit as Audit
from xtoken.audit.audit import audit as audit
from xtoken.audit.audit import recommended_loss as recommended_loss
