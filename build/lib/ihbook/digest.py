"""Values as JSON data and as digests: the same value has the same name in every process, on every machine."""

from __future__ import annotations

import ast
import dataclasses
import hashlib
import inspect
import json
import reprlib
import textwrap
from typing import Any


def digest(value: Any) -> str:
    """The sha256 of `encode(value)`, in hex."""
    return hashlib.sha256(json.dumps(encode(value), sort_keys=True).encode()).hexdigest()


def encode(value: Any, *, defaults: bool = False) -> Any:
    """`value` as plain JSON data. Dataclasses become {"type": name, field: ...}; weights their digest.

    A field of ihbook's own that stands at its default is left out, unless `defaults` asks for it: so a field can be added and
    old runs are still found. A default that changes is another `VERSION`. A reader's dataclass has all its fields, and a digest
    of its code. Raises TypeError for a value that has no such form, since it could not be told from another.
    """
    if hasattr(value, "content_digest"):
        return {"type": type(value).__name__, "digest": value.content_digest}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        own = not _is_ours(type(value))
        fields = {f.name: encode(getattr(value, f.name), defaults=defaults) for f in dataclasses.fields(value)
                  if own or defaults or not _at_default(f, getattr(value, f.name))}
        return {"type": type(value).__name__, **fields, **({"code": code_digest(type(value))} if own else {})}
    if isinstance(value, (tuple, list)):
        return [encode(item, defaults=defaults) for item in value]
    if isinstance(value, float) and value.is_integer():
        return int(value)  # 1.0 and 1 are equal values, and must have one name
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise TypeError(f"{value!r} can't be part of a run's digest; use numbers, strings, tuples and dataclasses")


def _is_ours(kind: type) -> bool:
    return kind.__module__.partition(".")[0] == "ihbook"


def _at_default(f: dataclasses.Field, value: Any) -> bool:
    if f.default is not dataclasses.MISSING:
        return value == f.default
    return f.default_factory is not dataclasses.MISSING and value == f.default_factory()


def code_digest(kind: type) -> str:
    """A digest of what a reader's class does: the syntax of its methods, which no version of Python writes otherwise.

    Comments, docstrings and layout do not count; what a method calls outside of the class is not seen. The class keeps its digest,
    so that it is known where its source is not: in another process. Raises TypeError where there is no source to read.
    """
    if "_code_digest" not in vars(kind):
        found = [(name, _syntax(source)) for base in kind.__mro__ if base is not object and not _is_ours(base)
                 for name, member in sorted(vars(base).items()) if (source := _source(base, name, member))]
        kind._code_digest = hashlib.sha256(json.dumps(found, sort_keys=True).encode()).hexdigest()[:16]
    return vars(kind)["_code_digest"]


def _source(kind: type, name: str, member: Any) -> ast.AST | None:
    """The syntax tree of a method or property; None for what is neither, and for what `dataclass` writes, which the fields tell."""
    function = getattr(member, "fget", None) or getattr(member, "__func__", None) or getattr(member, "func", member)
    if not inspect.isfunction(function) or function.__code__.co_filename in (dataclasses.__file__, reprlib.__file__):
        return None
    try:
        return ast.parse(textwrap.dedent(inspect.getsource(function)))
    except (OSError, SyntaxError) as error:
        if name.startswith("__"):
            return None
        raise TypeError(f"the source of {kind.__name__}.{name} can't be read, so an edit of it would go unseen ({error}); define "
                        f"{kind.__name__} in a file or in a notebook's cell") from error


def _syntax(node: Any) -> Any:
    """A syntax tree as JSON data, without what only some versions of Python put in it."""
    if isinstance(node, list):
        return [_syntax(each) for each in node if not (isinstance(each, ast.Expr) and isinstance(each.value, ast.Constant))]
    if isinstance(node, ast.AST):
        return [type(node).__name__, {name: _syntax(value) for name, value in ast.iter_fields(node)
                                      if value not in (None, []) and name not in ("ctx", "kind", "type_comment", "type_params")}]
    return repr(node)
