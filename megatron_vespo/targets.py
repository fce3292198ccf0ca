"""Python objects named in a configuration: `package.module:name`."""

import importlib
import os
import sys
from collections.abc import Callable
from typing import Any

from megatron_vespo.config import ConfigError


def load_target(target: str, key: str) -> object:
    """Import what `package.module:name` names. Modules of the working directory are found too.

    Raises:
        ConfigError: it is not of that form, does not import, or has no such name; `key` is the setting's path.
    """
    module_name, separator, name = target.partition(":")
    if not separator or not module_name or not name:
        raise ConfigError(f"{key}: '{target}' is not of the form package.module:name")
    if os.getcwd() not in sys.path and "" not in sys.path:
        sys.path.append(os.getcwd())
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # the module's own code runs, and may raise anything
        raise ConfigError(
            f"{key}: module '{module_name}' of '{target}' does not import ({type(error).__name__}: {error}); "
            "it must be installed, or lie in the working directory"
        ) from error
    try:
        return getattr(module, name)
    except AttributeError:
        raise ConfigError(f"{key}: module '{module_name}' has no '{name}'") from None


def load_function(target: str, key: str) -> Callable[..., Any]:
    """`load_target`, and a ConfigError too if what it names is not callable."""
    function = load_target(target, key)
    if not callable(function):
        raise ConfigError(f"{key}: '{target}' is not a function")
    return function
