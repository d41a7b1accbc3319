"""The runtimes that models are written for. A new one is one more module with a ``TARGET`` in it."""

import importlib
import pkgutil

from onnx_ocs.targets.base import Target

TARGETS: dict[str, Target] = {}

for _module in pkgutil.iter_modules(__path__):
    if _module.name != "base":
        _found: Target = importlib.import_module(f"{__name__}.{_module.name}").TARGET
        TARGETS[_found.name] = _found
