from uasparse_kernels import ops
from uasparse_kernels.pattern import SparsityPattern

__all__ = ["SparsityPattern", "ops"]
