"""Teachers behind HTTP: vLLM's completions and tokens in and out, SGLang's native generate.

How the servers are started, for K columns per position:

- `vllm serve MODEL --max-logprobs -1 --no-enable-prefix-caching --max-num-batched-tokens 2048`: the
  cap is 20 otherwise, cached prefixes have given stale values, and the logits of a long prompt are
  a peak of memory that vLLM does not foresee. For chosen ids also `VLLM_USE_V2_MODEL_RUNNER=1`.
- `python -m sglang.launch_server --model-path MODEL`: no cap. Its answers are arrays of numbers,
  where vLLM's completions are JSON of 80 bytes per entry, which this process must read.
"""

from xtoken.teachers.served.api import ApiName as ApiName
from xtoken.teachers.served.api import ChosenIds as ChosenIds
from xtoken.teachers.served.fill import Filled as Filled
from xtoken.teachers.served.fill import fill_store as fill_store
from xtoken.teachers.served.fill import open_store as open_store
from xtoken.teachers.served.prefetch import PrefetchedTeacher as PrefetchedTeacher
from xtoken.teachers.served.prefix_ids import prefix_ids as prefix_ids
from xtoken.teachers.served.probe import Probe as Probe
from xtoken.teachers.served.teacher import Answered as Answered
from xtoken.teachers.served.teacher import ServedTeacher as ServedTeacher
