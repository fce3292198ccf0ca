"""SGLang imports torchvision at its start, for image models. The CPU environment does without it.

torchvision's wheel is built for CUDA and does not load beside a CPU build of torch; installed there, it would also break
`from transformers import ...` for everybody. So it is not in the CPU lock file, and the engine's processes get modules of
that name whose functions raise when they are called.
"""

import importlib.abc
import importlib.machinery
import importlib.util
import sys
import types

from transformers.utils.import_utils import is_torchvision_available


class Missing:
    """Any name of torchvision: may be looked up and imported, not called."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __getattr__(self, attribute: str) -> "Missing":
        if attribute.startswith("__"):
            raise AttributeError(attribute)
        return Missing(f"{self._name}.{attribute}")

    def __call__(self, *_: object, **__: object) -> None:
        raise RuntimeError(f"{self._name} was called: torchvision is not part of the CPU environment")


class StandInModule(types.ModuleType):
    __path__: list[str] = []  # noqa: RUF012  (a package, as the import system knows it)

    def __getattr__(self, attribute: str) -> Missing:
        if attribute.startswith("__"):
            raise AttributeError(attribute)
        return Missing(f"{self.__name__}.{attribute}")


class StandInFinder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds torchvision and everything below it."""

    def find_spec(self, fullname, path=None, target=None):
        if fullname.split(".")[0] != "torchvision":
            return None
        return importlib.machinery.ModuleSpec(fullname, self, is_package=True)

    def create_module(self, spec):
        return StandInModule(spec.name)

    def exec_module(self, module):
        """There is nothing to run."""


def provide_torchvision() -> None:
    """Make `import torchvision` succeed in this process where it is not installed. Calling again changes nothing."""
    if importlib.util.find_spec("torchvision") is not None:
        return
    # transformers looks once whether torchvision is there, and must not find the stand-in.
    is_torchvision_available()
    sys.meta_path.append(StandInFinder())
