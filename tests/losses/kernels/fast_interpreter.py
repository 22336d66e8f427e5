"""Triton's interpreter, with the checks of its language made once for each kind of arguments.

What an operation of the language asks of the builder depends on types and constants alone, for the
compiler has nothing else. The interpreter works it out anew at each call, which is nearly all of
its time. Here the calls of the builder are noted the first time, and those alone are made again:
the same, in the same order, but for those whose result nobody takes (each sum of integers is
computed in int64 too, for an assertion that is off). An operation that looks at a value meanwhile
is not remembered.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from triton import language
from triton.language import core
from triton.runtime import interpreter

Operation = Callable[..., Any]

_builder = interpreter.interpreter_builder
_semantic = interpreter.interpreter_semantic
_Tensor, _Handle = core.tensor, interpreter.TensorHandle
# Memory, a program's place, assertions: not to be left out, nor done once for all.
_EFFECTS = re.compile("load|store|atomic|program|descriptor|print|assert|assume|barrier|asm|extern")


class _Recorder:
    """In place of the builder while an operation is noted: code that makes the same calls."""

    def __init__(self, arguments: dict[str, Any]) -> None:
        self.arguments = arguments
        self.names: dict[int, str] = {}  # of handles, by identity
        self.constants: dict[str, Any] = {"builder": _builder, "like": _like}
        self.lines: list[tuple[str, str, set[str]]] = []
        self.alive: list[Any] = []  # so that no identity is given twice
        self.known = True
        self.apart = True  # no argument given twice, as in x - x
        for name, value in arguments.items():
            if type(value) is _Tensor:
                self.apart &= id(value.handle) not in self.names
                self.names[id(value.handle)] = f"{name}.handle"

    def __getattr__(self, name: str) -> Any:
        member = getattr(_builder, name)
        if not callable(member):
            return member

        def call(*given: Any, **named: Any) -> Any:
            result = member(*given, **named)
            self.note(name, given, named, result)
            return result

        return call

    def note(self, name: str, given: tuple[Any, ...], named: dict[str, Any], result: Any) -> None:
        words = [self.word(each) for each in (*given, *named.values())]
        effects = _EFFECTS.search(name)
        if not effects and all(word in self.constants for word in words):
            self.word(result, constant=True)
            return
        mine = f"h{len(self.lines)}"
        self.alive.append(result)
        if isinstance(result, _Handle):
            self.names[id(result)] = mine
        elif not effects:
            self.known = False
        keys = [""] * len(given) + [f"{key}=" for key in named]
        passed = ", ".join(f"{key}{word}" for key, word in zip(keys, words, strict=True))
        self.lines.append((mine, f"builder.{name}({passed})", set(words)))

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

    def made(self, result: Any) -> Operation | None:
        """The operation again, for arguments of these kinds; None where that is not known."""
        same = [name for name, value in self.arguments.items() if value is result]
        if result is None or same:
            last, wanted = (same or ["None"])[0], set()
        elif type(result) is _Tensor:
            handle = self.word(result.handle)
            shared = {key: value for key, value in vars(result).items() if key != "handle"}
            last, wanted = f"like({self.word(shared)}, {handle})", {handle}
        else:
            return None
        if not self.known:
            return None
        body = [f" return {last}"]
        for name, call, words in reversed(self.lines):
            if name in wanted or _EFFECTS.search(call):
                wanted |= words
                body.append(f" {name} = {call}")
        code = "\n".join([f"def again({', '.join(self.arguments)}):", *reversed(body)])
        exec(code, self.constants)
        return self.constants["again"]


_recorder: _Recorder | None = None


def _is_handle(value: Any) -> bool:
    return isinstance(value, _Handle)


def _like(shared: dict[str, Any], handle: Any) -> Any:
    result = _Tensor.__new__(_Tensor)
    result.__dict__.update(shared)
    result.handle = handle
    return result


_types: dict[object, object] = {}


def _kind(value: Any) -> Any:
    """What of an argument the language may look at; raises TypeError where that is not known."""
    of = value.__class__
    if of is _Tensor:
        try:
            return value.type.interned
        except AttributeError:
            return _type(value.type)
    if of is int or value is None:
        return value
    if of is float:
        return value.hex()  # which tells -0 from 0
    if of is bool or of is str:
        return of, value
    if of is core.constexpr:
        return of, _kind(value.value)
    if of is list or of is tuple:
        return of, *map(_plain, value)
    if of is slice:
        return of, _plain(value.start), _plain(value.stop), _plain(value.step)
    if isinstance(value, core.dtype):
        return core.dtype, _type(value)
    raise TypeError


def _plain(value: Any) -> Any:
    if isinstance(value, _Tensor):
        raise TypeError
    return _kind(value)


def _type(of: Any) -> object:
    where = getattr(of, "address_space", None), getattr(of, "const", None)
    of.interned = _types.setdefault((type(of), of.name, *where), object())
    return of.interned


_numpy_types: dict[object, Any] = {}
_numpy_type_of = interpreter._get_np_dtype


def _numpy_type(of: Any) -> Any:
    """Triton's, which makes a table of all types at each call."""
    try:
        return _numpy_types[of.interned]
    except (AttributeError, KeyError):
        return _numpy_types.setdefault(_type(of), _numpy_type_of(of))


def _remembered(member: Operation) -> Operation:
    """An operation of the language as the interpreter has it."""
    made: dict[Any, Operation | None] = {}

    def operation(*given: Any, **named: Any) -> Any:
        named.pop("_semantic", None)
        if _recorder is not None:
            return member(*given, **named, _semantic=_semantic)
        try:
            kinds = (*map(_kind, given), *named, *map(_kind, named.values()))
            again = made[kinds]
        except KeyError:
            return record(kinds, given, named)
        except TypeError:
            again = None
        if again is None:
            return member(*given, **named, _semantic=_semantic)
        return again(*given, **named)

    def record(kinds: Any, given: tuple[Any, ...], named: dict[str, Any]) -> Any:
        global _recorder
        _recorder = _Recorder({f"a{i}": each for i, each in enumerate(given)} | named)
        _semantic.builder = _recorder
        try:
            result = member(*given, **named, _semantic=_semantic)
            if _recorder.apart:
                made[kinds] = _recorder.made(result)
        finally:
            _semantic.builder, _recorder = _builder, None
        return result

    return operation


@contextmanager
def nothing_remembered() -> Iterator[None]:
    """The interpreter inside as it is without this file."""
    global _recorder
    _recorder = _Recorder({})
    try:
        yield
    finally:
        _recorder = None


def _noticed(member: Callable[[Any], Any]) -> Callable[[Any], Any]:
    def look(value: Any) -> Any:
        if _recorder is not None:
            _recorder.looked_at(value.handle)
        return member(value)

    return look


def _replace_language() -> None:
    """Once and for good; the interpreter itself does so at each launch and call of a function."""

    def patch(on: Any, name: str, member: Operation, builder: object, scope: Any) -> None:
        scope.set_attr(on, name, _remembered(member))

    def any_kernel() -> None: ...

    interpreter._get_np_dtype = _numpy_type
    interpreter._patch_attr = patch
    both = type(any_kernel)(any_kernel.__code__, {"tl": language, "core": core})
    interpreter._patch_lang(both)
    _Tensor.__bool__ = _noticed(_Tensor.__bool__)
    _Tensor.__index__ = _noticed(_Tensor.__index__)
    interpreter._patch_lang = lambda kernel: interpreter._LangPatchScope()


_replace_language()
