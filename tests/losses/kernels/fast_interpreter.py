"""Triton's interpreter, with the checks of its language made once for each kind of arguments.

What an operation of the language asks of the builder depends on types and constants alone, for the
compiler has nothing else; and so does what a function of operations asks, unless it looks at a
value, as a loop up to one does. The interpreter works it out anew at each call, which is nearly all
of its time. Here the calls of the builder are noted the first time, and those alone are made again:
the same, in the same order, but for those whose result nobody takes (each sum of integers is
computed in int64 too, for an assertion that is off) or is the same each time. What looks at a value
meanwhile is not remembered, but for the functions and operations inside. A test may replace what is
launched, not a function that others call: those that are remembered go on with the first.
"""

from __future__ import annotations

import functools
import inspect
import math
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
from triton import language
from triton.language import core
from triton.runtime import interpreter

Operation = Callable[..., Any]

_builder = interpreter.interpreter_builder
_semantic = interpreter.interpreter_semantic
_Tensor, _Handle = core.tensor, interpreter.TensorHandle
_Function = interpreter.InterpretedFunction
# Memory, a program's place, assertions: not to be left out, nor done once for all.
_EFFECTS = re.compile("load|store|atomic|program|descriptor|print|assert|assume|barrier|asm|extern")
_CONSTANTS = (int, float, bool, str, type(None), core.constexpr, core.dtype)


@dataclass
class _Made:
    """A function or operation again: `run` makes the handles of its result's tensors of those of
    its arguments', which are not in a tuple where they are one."""

    run: Operation
    result: Operation
    number: int
    effects: bool


class _Recorder:
    """In place of the builder while something is noted: code that makes the same calls."""

    def __init__(self, arguments: list[Any]) -> None:
        self.names = {id(each): f"a{i}" for i, each in enumerate(arguments)}  # of handles
        self.parameters = ", ".join(self.names.values())
        self.constants: dict[str, Any] = {"builder": _builder, "like": _like}
        self.lines: list[tuple[list[str], str, list[str], bool]] = []
        self.alive: list[Any] = []  # so that no identity is given twice
        self.known = True
        self.later = False  # known once what is inside is

    def __getattr__(self, name: str) -> Any:
        member = getattr(_builder, name)
        if not callable(member):
            return member

        def call(*given: Any, **named: Any) -> Any:
            result = member(*given, **named)
            effects = bool(_EFFECTS.search(name))
            everything = [*given, *named.values()]
            if not isinstance(result, _Handle) and not effects:
                self.known &= not any(map(_is_handle, everything))
            keys = [""] * len(given) + [f"{key}=" for key in named]
            self.note(f"builder.{name}", everything, keys, [result], effects)
            return result

        return call

    def note(
        self, what: str, given: list[Any], keys: list[str], results: list[Any], effects: bool
    ) -> None:
        """That `what` of given handles and constants gave these results."""
        self.alive += results
        words = [self.word(each) for each in given]
        if not effects and all(word in self.constants for word in words):
            for each in results:
                self.word(each, constant=True)
            return
        mine = [f"h{len(self.lines)}_{i}" for i in range(len(results))]
        for name, each in zip(mine, results, strict=True):
            if isinstance(each, _Handle):
                self.names[id(each)] = name
        passed = ", ".join(f"{key}{word}" for key, word in zip(keys, words, strict=True))
        self.lines.append((mine, f"{what}({passed})", words, effects))

    def noted(self, made: _Made, given: list[Any], outs: Any) -> None:
        """That something remembered was run inside."""
        name = f"f{len(self.constants)}"
        self.constants[name] = made.run
        results = [outs] if made.number == 1 else [*outs]
        self.note(name, given, [""] * len(given), results, made.effects)

    def word(self, value: Any, constant: bool = False) -> str:
        """What a value is called in the code."""
        if isinstance(value, _Handle) and not constant:
            self.known &= id(value) in self.names
            return self.names.get(id(value), "")
        name = f"c{len(self.constants)}"
        self.constants[name] = value
        self.known &= not (isinstance(value, list | tuple) and any(map(_is_handle, value)))
        if isinstance(value, _Handle):
            self.names[id(value)] = name
        return name

    def looked_at(self, handle: Any) -> None:
        self.known &= self.names.get(id(handle), "") in self.constants

    def made(self, result: Any) -> _Made | None:
        """The same again, for arguments of these kinds; None where that is not known."""
        wanted: list[str] = []
        built = self.built(result, wanted)
        if not self.known:
            return None
        needed, body, effects = set(wanted), [], False
        for names, call, words, has_effects in reversed(self.lines):
            if has_effects or not needed.isdisjoint(names):
                needed.update(words)
                body.append(f" {', '.join(names)} = {call}" if names else f" {call}")
                effects |= has_effects
        back = ", ".join(wanted) or "()"
        code = "\n".join([f"def again({self.parameters}):", *reversed(body), f" return {back}"])
        outs = ", ".join(f"o{i}" for i in range(len(wanted)))
        taken = f"({outs})" if len(wanted) != 1 else "o0"
        exec(f"{code}\ndef result(outs):\n {taken} = outs\n return {built}", self.constants)
        space = self.constants
        return _Made(space["again"], space["result"], len(wanted), effects)

    def built(self, result: Any, wanted: list[str]) -> str:
        """The code of a result whose tensors have the handles o0, o1, ..., those named `wanted`."""
        if type(result) is _Tensor:
            wanted.append(self.word(result.handle))
            shared = {key: value for key, value in vars(result).items() if key != "handle"}
            return f"like({self.word(shared)}, o{len(wanted) - 1})"
        if type(result) is tuple:
            return "(" + "".join(f"{self.built(each, wanted)}, " for each in result) + ")"
        self.known &= isinstance(result, _CONSTANTS)
        return self.word(result)


_recorder: _Recorder | None = None
_off = False


def _is_handle(value: Any) -> bool:
    return isinstance(value, _Handle)


def _like(shared: dict[str, Any], handle: Any) -> Any:
    result = _Tensor.__new__(_Tensor)
    result.__dict__.update(shared)
    result.handle = handle
    return result


def _kind(value: Any, handles: list[Any]) -> Any:
    """What of an argument the language may look at; raises TypeError where that is not known. The
    handles of its tensors are noted."""
    of = value.__class__
    if of is _Tensor:
        handles.append(value.handle)
        return value.type.interned
    if of is int or value is None:
        return value
    if of is float:
        return value.hex()  # which tells -0 from 0
    if of is bool or of is str:
        return of, value
    if of is core.constexpr:
        return of, _kind(value.value, handles)
    if of is list or of is tuple:
        return of, *[_kind(each, handles) for each in value]
    if of is slice:
        return of, *[_kind(each, handles) for each in (value.start, value.stop, value.step)]
    if of is _Function:
        return value
    if isinstance(value, core.dtype):
        return core.dtype, value.interned
    raise TypeError


def _with_handles(value: Any, handles: Iterator[Any]) -> Any:
    """An argument with other handles, in the order of `_kind`."""
    of = value.__class__
    if of is _Tensor:
        shared = {key: each for key, each in vars(value).items() if key != "handle"}
        return _like(shared, next(handles))
    if of is list or of is tuple:
        return of(_with_handles(each, handles) for each in value)
    if of is slice:
        return slice(*[_with_handles(e, handles) for e in (value.start, value.stop, value.step)])
    return value


def _one_or_all(outs: list[Any]) -> Any:
    return outs[0] if len(outs) == 1 else outs


def _handles_of(result: Any) -> list[Any]:
    if type(result) is tuple:
        return [handle for each in result for handle in _handles_of(each)]
    return [result.handle] if type(result) is _Tensor else []


_types: dict[object, object] = {}


def _interned(of: Any) -> object:
    where = getattr(of, "address_space", None), getattr(of, "const", None)
    return _types.setdefault((type(of), of.name, *where), object())


def _most_bytes(of: Any) -> float:
    return math.inf if isinstance(of, core.pointer_type) else max(of.primitive_bitwidth // 8, 1)


def _element(of: Any) -> Any:
    return _element(of.element_ty) if hasattr(of, "element_ty") else of


_slow_binary = interpreter.InterpreterBuilder.binary_op
_slow_splat = interpreter.InterpreterBuilder.create_splat


def _handle(self: Any, data: Any, dtype: Any, attr: Any = None) -> None:
    self.data, self.dtype, self.attr = data, dtype, {} if attr is None else attr
    if data.itemsize > dtype.most_bytes:
        self.__post_init__()


def _binary(self: Any, left: Any, right: Any, op: Operation) -> Any:
    a, b, of = left.data, right.data, left.dtype.scalar
    if a.dtype == bool and b.dtype == bool:
        return _slow_binary(self, left, right, op)
    data = op(a, b)
    return _Handle(data if data.itemsize <= of.most_bytes else data.astype(of.in_numpy), of)


def _splat(self: Any, shaped: Any, value: Any) -> Any:
    if value.dtype.is_block():
        return _slow_splat(self, shaped, value)
    data = np.empty(shaped.shape, value.dtype.in_numpy)
    data[...] = value.data
    return _Handle(data, value.dtype.scalar)


def _step(self: Any, pointer: Any, offset: Any) -> Any:
    return _Handle(pointer.data + pointer.dtype.step * offset.data.astype(np.uint64), pointer.dtype)


def _remembered(member: Operation, **given_too: Any) -> Operation:
    """An operation of the language as the interpreter has it, or a function of those."""
    made: dict[Any, _Made | None] = {}

    def operation(*given: Any, **named: Any) -> Any:
        named.pop("_semantic", None)
        if _off:
            return member(*given, **named, **given_too)
        handles: list[Any] = []
        try:
            kinds = tuple([_kind(each, handles) for each in given])
            if named:
                kinds += (*named, *[_kind(each, handles) for each in named.values()])
            again = made[kinds]
        except KeyError:
            return record(kinds, handles, given, named)
        except TypeError:
            again = None
        if again is None:
            return member(*given, **named, **given_too)
        outs = again.run(*handles)
        if _recorder is not None:
            _recorder.noted(again, handles, outs)
        return again.result(outs)

    def record(kinds: Any, handles: list[Any], given: Any, named: dict[str, Any]) -> Any:
        global _recorder
        outer = _recorder
        # One of its own for each argument, x - x being like x - y.
        own = [_Handle(each.data, each.dtype, each.attr) for each in handles]
        left = iter(own)
        given = [_with_handles(each, left) for each in given]
        named = {key: _with_handles(each, left) for key, each in named.items()}
        _recorder = mine = _Recorder(own)
        _semantic.builder = mine
        try:
            result = member(*given, **named, **given_too)
        finally:
            _semantic.builder, _recorder = outer or _builder, outer
        again = None
        if not mine.later:
            again = made[kinds] = mine.made(result)
        if outer is not None and again is None:
            outer.known, outer.later = False, True
        elif outer is not None:
            outer.noted(again, handles, _one_or_all(_handles_of(result)))
        return result

    return operation


@contextmanager
def _unnoted() -> Iterator[None]:
    global _recorder
    outer, _recorder, _semantic.builder = _recorder, None, _builder
    try:
        yield
    finally:
        _recorder, _semantic.builder = outer, outer or _builder


_NUMPY = {
    language.standard._sum_combine: np.add.reduce,
    language.standard._elementwise_max: np.fmax.reduce,
    language.standard._elementwise_min: np.fmin.reduce,
}


def _reduction(member: Operation, by_numpy: dict[Any, Operation]) -> Operation:
    """`reduce` or `associative_scan`, which the interpreter computes without the builder."""

    def operation(value: Any, *given: Any, **named: Any) -> Any:
        if _recorder is None:
            return member(value, *given, **named)

        def again(*handles: Any) -> Any:
            with _unnoted():
                outs = _handles_of(member(_with_handles(value, iter(handles)), *given, **named))
            return _one_or_all(outs)

        with _unnoted():
            result = member(value, *given, **named)
        if type(value) is _Tensor and given[1] in by_numpy:
            again = _by_numpy(by_numpy[given[1]], result.dtype, given[0], **named)
        handles: list[Any] = []
        _kind(value, handles)
        outs = _handles_of(result)
        made = _Made(again, _like, len(outs), effects=False)
        _recorder.noted(made, handles, _one_or_all(outs))
        return result

    return operation


def _by_numpy(reduce: Operation, of: Any, axis: Any, keep_dims: bool = False) -> Operation:
    def again(handle: Any) -> Any:
        found = reduce(handle.data, axis=axis, keepdims=keep_dims)
        return _Handle((found if found.shape else np.array([found])).astype(of.in_numpy), of)

    return again


# Worked out once for each type; Triton makes a table of all types at each call.
_OF_TYPES = {
    "interned": _interned,
    "in_numpy": interpreter._get_np_dtype,
    "most_bytes": _most_bytes,
    "element": _element,
    "step": lambda of: np.uint64(max(1, of.element.primitive_bitwidth // 8)),
}
_FASTER = [
    (_Handle, "__init__", _handle),
    (_Handle, "get_element_ty", lambda self: self.dtype.element),
    (interpreter, "_get_np_dtype", lambda of: of.in_numpy),
    (interpreter.InterpreterBuilder, "binary_op", _binary),
    (interpreter.InterpreterBuilder, "create_splat", _splat),
    (interpreter.InterpreterBuilder, "create_addptr", _step),
]
_BEFORE = [getattr(on, name) for on, name, _ in _FASTER]


@contextmanager
def nothing_remembered() -> Iterator[None]:
    """The interpreter inside as it is without this file."""
    global _off
    _off = True
    for (on, name, _), before in zip(_FASTER, _BEFORE, strict=True):
        setattr(on, name, before)
    try:
        yield
    finally:
        _off = False
        _make_faster()


def _make_faster() -> None:
    for on, name, member in _FASTER:
        setattr(on, name, member)


def _noticed(member: Callable[[Any], Any]) -> Callable[[Any], Any]:
    def look(value: Any) -> Any:
        if _recorder is not None:
            _recorder.looked_at(value.handle)
        return member(value)

    return look


def _replace_language() -> None:
    """Once and for good; the interpreter itself does so at each launch and call of a function."""

    def patch(on: Any, name: str, member: Operation, builder: object, scope: Any) -> None:
        scope.set_attr(on, name, _remembered(member, _semantic=_semantic))

    def any_kernel() -> None: ...

    @functools.cache
    def rewrite(function: Any) -> Operation:
        code = rewrite_before(function)
        remembered = functools.wraps(code)(_remembered(code))
        remembered.__signature__ = inspect.signature(code)
        return remembered

    for name, work_out in _OF_TYPES.items():
        kept = functools.cached_property(work_out)
        kept.__set_name__(core.dtype, name)
        setattr(core.dtype, name, kept)
    _make_faster()
    interpreter._patch_attr = patch
    both = type(any_kernel)(any_kernel.__code__, {"tl": language, "core": core})
    interpreter._patch_lang(both)
    for name, by_numpy in (("reduce", _NUMPY), ("associative_scan", {})):
        member = _reduction(getattr(core, name), by_numpy)
        for module in (language, core):
            setattr(module, name, member)
    rewrite_before = _Function.rewrite
    _Function.rewrite = lambda function: rewrite(function)
    _Tensor.__bool__ = _noticed(_Tensor.__bool__)
    _Tensor.__index__ = _noticed(_Tensor.__index__)
    interpreter._patch_lang = lambda kernel: interpreter._LangPatchScope()


_replace_language()
