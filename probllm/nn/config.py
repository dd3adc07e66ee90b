"""Modules that can be rebuilt from JSON: a class records the arguments of its constructor, nothing else.

``to_config(module)`` gives ``{"class": "probllm.nn.RecurrentEncoder", "arguments": {...}}`` and ``from_config`` builds
an equal module with fresh weights, into which the saved weights are then loaded. A module that is the argument of
another becomes a config within the config; one that is given twice comes back as one module held twice. A config names
classes and holds JSON values, so that reading one from a stranger can build our modules but run nothing else.
"""

import functools
import importlib
import inspect
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeAlias

JSON: TypeAlias = bool | int | float | str | list[Any] | dict[str, Any] | None

_registered: dict[str, type["Configurable"]] = {}
_RESERVED = ("class", "arguments", "same_as")


class Configurable:
    """A class whose instances remember the arguments they were made with, in ``self.config_arguments``.

    Subclass it before ``nn.Module`` or ``PyroModule``: ``class Tagger(Configurable, PyroModule)``. The outermost
    ``__init__`` records its arguments, defaults included; each must be a JSON value (a tuple becomes a list) or a
    Configurable.
    """

    config_arguments: dict[str, Any]

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "__init__" in cls.__dict__:
            cls.__init__ = _recording(cls.__dict__["__init__"])  # type: ignore[method-assign]
        if cls.__module__.startswith("probllm."):
            _registered[class_name(cls)] = cls


def _recording(init: Callable[..., None]) -> Callable[..., None]:
    signature = inspect.signature(init)

    @functools.wraps(init)
    def recorded(self: Configurable, *args: Any, **kwargs: Any) -> None:
        # The outermost constructor is the one that a config calls; those it calls through super() find its record.
        if "config_arguments" not in self.__dict__:
            bound = signature.bind(self, *args, **kwargs)
            bound.apply_defaults()
            # Not through nn.Module's own __setattr__, which must not see anything before its constructor has run.
            object.__setattr__(self, "config_arguments", _named(signature, bound.arguments))
        init(self, *args, **kwargs)

    return recorded


def _named(signature: inspect.Signature, arguments: Mapping[str, Any]) -> dict[str, Any]:
    named: dict[str, Any] = {}
    for position, (name, parameter) in enumerate(signature.parameters.items()):
        if position == 0 or name not in arguments:
            continue
        if parameter.kind is inspect.Parameter.VAR_KEYWORD:
            named.update(arguments[name])
        elif parameter.kind is inspect.Parameter.VAR_POSITIONAL:
            if arguments[name]:
                named["*" + name] = arguments[name]
        else:
            named[name] = arguments[name]
    return named


def class_name(cls: type) -> str:
    """The name of a class in a config: by room for ours (``probllm.nn.RecurrentEncoder``), so that files may move."""
    module = cls.__module__
    if module.startswith("probllm."):
        module = ".".join(module.split(".")[:2])
    return f"{module}.{cls.__qualname__}"


def to_config(module: Configurable) -> dict[str, Any]:
    """The config of a module: its class and its arguments as JSON values, nested for nested modules.

    Raises:
        TypeError: if an argument is neither a JSON value nor a Configurable; the message names it by its path.
    """
    if not isinstance(module, Configurable):
        raise TypeError(f"module is a {type(module).__name__}; only a Configurable has a config")
    config = _to_json(module, "", {})
    assert isinstance(config, dict)
    return config


def _to_json(value: object, path: str, seen: dict[int, str]) -> JSON:
    if isinstance(value, Configurable):
        if id(value) in seen:
            return {"same_as": seen[id(value)]}
        seen[id(value)] = path
        arguments: dict[str, Any] = {}
        for name, argument in value.config_arguments.items():
            if name.startswith("*"):
                raise TypeError(f"{type(value).__name__} was given positional arguments without names ({name})")
            arguments[name] = _to_json(argument, _join(path, name), seen)
        return {"class": class_name(type(value)), "arguments": arguments}
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, (list, tuple)):
        return [_to_json(item, _join(path, str(i)), seen) for i, item in enumerate(value)]
    if isinstance(value, Mapping):
        for key in value:
            if not isinstance(key, str):
                raise TypeError(f"argument {path}: a key is {key!r}, expected a string (JSON has no other keys)")
            if key in _RESERVED:
                raise TypeError(f"argument {path}: the key {key!r} is reserved for nested configs")
        return {key: _to_json(item, _join(path, key), seen) for key, item in value.items()}
    raise TypeError(
        f"argument {path} is a {type(value).__name__}, which a config cannot hold; expected a JSON value or an "
        "instance of a subclass of probllm.nn.Configurable"
    )


def from_config(config: Mapping[str, Any], allow: Iterable[type[Configurable]] = ()) -> Any:
    """Build the module that a config describes, with freshly initialised weights.

    Args:
        config: what ``to_config`` gave, perhaps through JSON.
        allow: classes outside ``probllm`` that the config may name as well.
    Raises:
        ValueError: if the config is malformed, names a class that is neither ours nor in ``allow``, or gives a class
            arguments that it does not take.
    """
    allowed = {class_name(cls): cls for cls in allow}
    if not isinstance(config, Mapping) or "class" not in config:
        raise ValueError(f'config is {config!r}; expected {{"class": ..., "arguments": {{...}}}}')
    return _from_json(config, "", {}, allowed)


def _from_json(value: Any, path: str, built: dict[str, Any], allowed: Mapping[str, type[Configurable]]) -> Any:
    if isinstance(value, list):
        return [_from_json(item, _join(path, str(i)), built, allowed) for i, item in enumerate(value)]
    if not isinstance(value, Mapping):
        return value
    if "same_as" in value:
        if value["same_as"] not in built:
            raise ValueError(
                f"config{path and ' of ' + path} refers to {value['same_as']!r}, which does not precede it"
            )
        return built[value["same_as"]]
    if "class" not in value:
        return {key: _from_json(item, _join(path, key), built, allowed) for key, item in value.items()}
    name, arguments = value["class"], value.get("arguments", {})
    if not isinstance(name, str) or not isinstance(arguments, Mapping):
        raise ValueError(f"config{path and ' of ' + path}: class must be a name and arguments an object, got {value!r}")
    cls = allowed.get(name) or _registered_class(name)
    given = {key: _from_json(item, _join(path, key), built, allowed) for key, item in arguments.items()}
    try:
        inspect.signature(cls.__init__).bind(None, **given)
    except TypeError as error:
        raise ValueError(f"config{path and ' of ' + path}: {name}: {error}") from error
    built[path] = cls(**given)
    return built[path]


def _registered_class(name: str) -> type[Configurable]:
    if name not in _registered and (room := re.match(r"probllm\.[a-z_]+(?=\.\w+$)", name)):
        # Importing our own room is what registers its classes; nothing outside the package is ever imported.
        try:
            importlib.import_module(room.group())
        except ModuleNotFoundError as error:
            if error.name != room.group():
                raise
    if name not in _registered:
        raise ValueError(
            f"the class {name!r} is unknown: expected a Configurable of probllm, or one passed in allow=[...]"
        )
    return _registered[name]


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name
