"""The methods of scaling RoPE, one module each: `scaling.methods.yarn` is `scaling=yarn` and `methods=[yarn]`.

Each module ends with `METHOD`, its class. A member of `config.method.Method` and a module of the same name are all that
it takes to be trained with and evaluated.
"""

from collections.abc import Mapping
from dataclasses import fields
from importlib import import_module
from typing import Any

from clex_train.config.evaluation import EvaluationConfig
from clex_train.config.method import Method
from clex_train.config.scaling import ScalingConfig
from clex_train.scaling.methods.base import ScalingMethod


def create(method: Method) -> ScalingMethod:
    """Return a method with its default settings."""
    return method_class(method)()


def for_training(config: ScalingConfig) -> ScalingMethod:
    """Return the method of `scaling.name` with its settings."""
    return _configured(config.name, config.method_settings(), "scaling.")


def for_evaluation(method: Method, config: EvaluationConfig) -> ScalingMethod:
    """Return a method of `evaluation.methods` with its settings."""
    return _configured(method, config.method_settings(), "evaluation.")


def method_class(method: Method) -> type[ScalingMethod]:
    """Return the class that the module of this name defines."""
    found: type[ScalingMethod] = import_module(f"{__name__}.{method.value}").METHOD
    return found


def _configured(method: Method, shared: Mapping[str, Any], prefix: str) -> ScalingMethod:
    """Create a method from those of the `shared` keys that it has fields for."""
    cls = method_class(method)
    names = {field.name for field in fields(cls)} & shared.keys()
    return cls(prefix=prefix, **{name: shared[name] for name in names})
