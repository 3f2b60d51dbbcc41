"""Values as JSON data and as digests: a value has the same name in every process and on every machine."""

from __future__ import annotations

import ast
import dataclasses
import functools
import hashlib
import inspect
import json
import reprlib
import textwrap
import types
from collections.abc import Mapping
from typing import Any

WRITTEN_BY_DATACLASS = ("__init__", "__repr__", "__eq__", "__hash__", "__lt__", "__le__", "__gt__", "__ge__", "__setattr__",
                        "__delattr__", "__replace__")


def digest(value: Any) -> str:
    """The sha256 of `encode(value)`, in hex. Raises TypeError where `encode` does."""
    return hashlib.sha256(json.dumps(encode(value), sort_keys=True).encode()).hexdigest()


def encode(value: Any, *, defaults: bool = False) -> Any:
    """`value` as plain JSON data. A dataclass becomes {"type": name, field: ...}; weights become their digest.

    A field of ihbook's own classes is left out while it stands at its default, unless `defaults` is true: old runs are then still
    found after a field is added. If a default changes, `VERSION` must change too. A reader's dataclass keeps all its fields and
    adds a digest of its code. Raises TypeError for any other value, because two such values could not be told apart, and for a
    field called `type` or `code`.
    """
    if hasattr(value, "content_digest"):
        return {"type": type(value).__name__, "digest": value.content_digest}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        own, fields = not _is_ours(type(value)), {}
        for f in dataclasses.fields(value):
            if f.name in ("type", "code"):
                raise TypeError(f"{type(value).__name__}: a field can't be called {f.name!r}, which a digest uses; rename it")
            if own or defaults or not _at_default(f, getattr(value, f.name)):
                try:
                    fields[f.name] = encode(getattr(value, f.name), defaults=defaults)
                except TypeError as error:
                    raise TypeError(f"{type(value).__name__}: {f.name}: {error}") from error
        return {"type": type(value).__name__, **fields, **({"code": code_digest(type(value))} if own else {})}
    if isinstance(value, (tuple, list)):
        return [encode(item, defaults=defaults) for item in value]
    if isinstance(value, float) and value.is_integer():
        return int(value)  # 1.0 and 1 are equal, so they must have the same name
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise TypeError(f"{reprlib.repr(value)} can't be part of a run's digest; use numbers, strings, tuples and frozen dataclasses")


def _is_ours(kind: type) -> bool:
    return kind.__module__.partition(".")[0] == "ihbook"


def _at_default(f: dataclasses.Field, value: Any) -> bool:
    if f.default is not dataclasses.MISSING:
        return value == f.default
    return f.default_factory is not dataclasses.MISSING and value == f.default_factory()


def code_digest(kind: type) -> str:
    """A digest of what a reader's class does: its methods' syntax, the same under every version of Python, and its attributes.

    Comments, docstrings and layout do not count. Code outside the class that a method calls is not seen. The class keeps its
    digest, so that a process without the source knows it too. Raises TypeError for a part that can't be told from another: a
    method without source, or an attribute, default or captured value that `encode` refuses.
    """
    try:
        found = [[name, part] for base in kind.__mro__ if base is not object and not _is_ours(base)
                 for name, member in sorted(vars(base).items()) if (part := _part(base, name, member)) is not None]
    except TypeError:
        if "_code_digest" not in vars(kind):
            raise
    else:
        kind._code_digest = hashlib.sha256(json.dumps(found, sort_keys=True).encode()).hexdigest()[:16]
    return vars(kind)["_code_digest"]


def _part(kind: type, name: str, member: Any) -> Any:
    """A member of a class as JSON data. None for fields, whose values `encode` reads from the instance, and for declarations that
    change no result."""
    wrapped = member.func if isinstance(member, functools.cached_property) else member  # a partial's arguments count, too
    function = getattr(member, "fget", None) or getattr(member, "__func__", None) or wrapped
    if inspect.isfunction(function):
        return _function(f"{kind.__name__}.{name}", function)
    fields = [f.name for f in dataclasses.fields(kind)] if dataclasses.is_dataclass(kind) else []
    if name.startswith("__") or name in ("_code_digest", "broadcasts", "extra_pass", *fields):
        return None
    return _value(f"{kind.__name__}.{name}", member)


def _function(name: str, function: types.FunctionType) -> Any:
    """A function's syntax, its defaults and the values that it captures. None for one that `dataclass` writes."""
    if function.__code__.co_filename in (dataclasses.__file__, reprlib.__file__):
        return None
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    except (OSError, SyntaxError) as error:
        if name.rpartition(".")[2] in WRITTEN_BY_DATACLASS:
            return None
        raise TypeError(f"the source of {name} can't be read, so an edit of it would go unseen ({error}); define the class in a "
                        "file or in a notebook's cell") from error
    captured = [cell.cell_contents for cell in function.__closure__ or ()]
    values = [*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values(), *captured]
    return [_syntax(tree), [_value(name, value) for value in values if not isinstance(value, type)]]


def _value(name: str, value: Any) -> Any:
    """What a class or method holds, as JSON data; a function by its code, or by its name if it is built in."""
    if inspect.isfunction(value):
        return _function(name, value)
    if inspect.isbuiltin(value):
        return f"{value.__module__}.{value.__qualname__}"
    try:
        return encode(value)
    except TypeError as error:
        raise TypeError(f"{name} holds a value that can't be part of a digest: a change of it would go unseen ({error})") from error


def _syntax(node: Any) -> Any:
    """A syntax tree as JSON data, without docstrings and without what only some versions of Python put in it."""
    if isinstance(node, list):
        return [_syntax(each) for each in node if not (isinstance(each, ast.Expr) and isinstance(each.value, ast.Constant))]
    if isinstance(node, ast.AST):
        return [type(node).__name__, {name: _syntax(value) for name, value in ast.iter_fields(node)
                                      if value not in (None, []) and name not in ("ctx", "kind", "type_comment", "type_params")}]
    return repr(node)


def content_digest(tensors: Mapping[str, Any], about: str = "") -> str:
    """The sha256, in hex, of a text and of the names, shapes, dtypes and bytes of tensors on a CPU, in their order."""
    found = hashlib.sha256(about.encode())
    for name, tensor in tensors.items():
        found.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode() + tensor.numpy().tobytes())
    return found.hexdigest()
