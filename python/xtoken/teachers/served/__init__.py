"""Teachers behind HTTP: vLLM's completions and tokens in and out, SGLang's native generate."""

from xtoken.teachers.served.api import ApiName as ApiName
from xtoken.teachers.served.api import ChosenIds as ChosenIds
from xtoken.teachers.served.fill import Filled as Filled
from xtoken.teachers.served.fill import fill_store as fill_store
from xtoken.teachers.served.fill import open_store as open_store
from xtoken.teachers.served.prefetch import PrefetchedTeacher as PrefetchedTeacher
from xtoken.teachers.served.probe import Probe as Probe
from xtoken.teachers.served.teacher import Answered as Answered
from xtoken.teachers.served.teacher import ServedTeacher as ServedTeacher
