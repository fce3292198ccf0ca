"""torchvision's CUDA wheel beside a CPU torch: declare the operators whose library cannot be loaded.

The wheel on PyPI is built for CUDA. Its extension does not load on a CPU build of torch, and `import torchvision` then
fails in registering shape functions for operators that nobody declared. transformers' model files and SGLang both import
it (for images, which are not used here). With the operators declared but not implemented, the import succeeds.
"""

import functools
import importlib.util
from pathlib import Path

import torch

OPERATORS = ("nms", "qnms")
SIGNATURE = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"


@functools.cache
def declare_torchvision_operators() -> torch.library.Library | None:
    """Make `import torchvision` possible in this process. Call before the first import of it; calling again is free.

    Returns:
        The declarations, which live as long as this process; None where nothing was needed: torchvision is absent, or
        its own library loads (a CPU wheel, or CUDA).
    """
    spec = importlib.util.find_spec("torchvision")
    if spec is None or spec.origin is None or _own_library_loads(Path(spec.origin).parent):
        return None
    library = torch.library.Library("torchvision", "DEF")
    for name in OPERATORS:
        library.define(name + SIGNATURE)
    return library


def _own_library_loads(folder: Path) -> bool:
    libraries = [path for path in folder.glob("_C*") if path.suffix in (".so", ".dylib", ".pyd")]
    for path in libraries:
        try:
            torch.ops.load_library(str(path))
        except OSError:
            return False
    return bool(libraries)
