"""The projection W between two vocabularies: build, inspect, save, load, import and export."""

from xtoken.projection.arrays import EMPTY_RULES as EMPTY_RULES
from xtoken.projection.arrays import RULE_CODES as RULE_CODES
from xtoken.projection.csr import Csr as Csr
from xtoken.projection.explain import Explanation as Explanation
from xtoken.projection.options import ProjectionOptions as ProjectionOptions
from xtoken.projection.projection import Projection as Projection
