"""The command line in a checkout, `python -m training`; the code is in uasparse_kernels/training.

Modules keep their old names here: `training.data` is `uasparse_kernels.training.data`, the same object.
"""

import sys
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec

from uasparse_kernels.training import main

_MOVED = {"unknowns": "uasparse_kernels.unknowns"}
_MOVED |= {name: f"uasparse_kernels.unknowns.{name}" for name in ("vote", "scores", "feature_network")}
_MOVED |= {name: f"uasparse_kernels.training.study.{name}" for name in ("claims", "compare", "suites", "mixture")}
_MOVED |= {"study_report": "uasparse_kernels.training.study.report"}


class _OldNames(MetaPathFinder, Loader):
    def find_spec(self, fullname, path=None, target=None):
        package, _, name = fullname.partition(".")
        if package != __name__ or not name or name.startswith("__"):
            return None
        target = _MOVED.get(name, f"uasparse_kernels.training.{name}")
        return ModuleSpec(fullname, self, origin=target) if find_spec(target) else None

    def create_module(self, spec):
        module = import_module(spec.origin)
        spec.loader_state = module.__spec__
        return module

    def exec_module(self, module):
        module.__spec__ = module.__spec__.loader_state  # an import sets that of the name it was given


sys.meta_path.insert(0, _OldNames())  # before the one that would find a subpackage's files, and load them twice

__all__ = ["main"]
