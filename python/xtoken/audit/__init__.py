"""What suits a pair of tokenizers: figures, a recommendation, and the page that shows them."""

from xtoken.audit.audit import Audit as Audit
from xtoken.audit.audit import audit as audit
from xtoken.audit.audit import recommended_loss as recommended_loss
