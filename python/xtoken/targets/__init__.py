"""Exact targets: the teacher's word on the student's next token, made once per example."""

from xtoken.targets.arrays import Targets as Targets
from xtoken.targets.builder import TargetBuilder as TargetBuilder
from xtoken.targets.builder import TargetExample as TargetExample
from xtoken.targets.builder import TargetOptions as TargetOptions
