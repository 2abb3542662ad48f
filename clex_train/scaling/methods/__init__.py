"""RoPE scaling methods, one module each: `scaling.methods.yarn` is `scaling=yarn` and `methods=[yarn]`.

Each module ends with `METHOD`, its class. To add a method, add a member to `config.method.Method` and a module of the
same name; training and evaluation then accept it.
"""

from collections.abc import Mapping
from dataclasses import fields
from importlib import import_module
from typing import Any, get_type_hints

import msgspec

from clex_train.config.evaluation import EvaluationConfig
from clex_train.config.method import Method
from clex_train.config.scaling import ScalingConfig
from clex_train.scaling.methods.base import ScalingMethod
from clex_train.utils.errors import ConfigError, require


def create(method: Method) -> ScalingMethod:
    """Return a method with its default settings."""
    return method_class(method)()


def for_training(config: ScalingConfig) -> ScalingMethod:
    """Return the method of `scaling.name` with its settings; `ConfigError` names a setting that it does not have."""
    return _configured(config.name, config.method_settings(), config.options, "scaling.", "scaling.options.")


def for_evaluation(method: Method, config: EvaluationConfig) -> ScalingMethod:
    """Return a method of `evaluation.methods`; `ConfigError` names a setting that it does not have."""
    options, prefix = config.method_options.get(method.value, {}), f"evaluation.method_options.{method.value}."
    return _configured(method, config.method_settings(), options, "evaluation.", prefix)


def method_class(method: Method) -> type[ScalingMethod]:
    """Return the class that the module of this name defines."""
    # Imported on use: a config that names one method need not load the modules of all.
    found: type[ScalingMethod] = import_module(f"{__name__}.{method.value}").METHOD
    return found


def _configured(
    method: Method, shared: Mapping[str, Any], options: Mapping[str, Any], prefix: str, options_prefix: str
) -> ScalingMethod:
    """Create a method from the `shared` keys that it has fields for, and from its own `options`."""
    cls, hints = method_class(method), get_type_hints(method_class(method))
    settings = {field.name for field in fields(cls)}
    own = sorted(settings - shared.keys() - {"prefix", "options_prefix"})
    for name in options:
        remedy = f"{method.value} has {', '.join(own) or 'none'}"
        require(name in own, f"{options_prefix}{name}", options[name], f"no such option; {remedy}")
    values = {name: _typed(value, hints[name], options_prefix + name) for name, value in options.items()}
    values |= {name: shared[name] for name in settings & shared.keys()}
    return cls(prefix=prefix, options_prefix=options_prefix, **values)


def _typed(value: Any, hint: Any, key: str) -> Any:
    """Convert an option to the type of its field; `ConfigError` names the key."""
    try:
        return msgspec.convert(value, hint)
    except msgspec.ValidationError as error:
        raise ConfigError(key, value, str(error)) from error
