"""Which weights are active: densities of layers, schedules, and the methods that drop and grow."""

from uasparse_kernels.topology.distribution import layer_densities
from uasparse_kernels.topology.dynamic import DynamicSparsity
from uasparse_kernels.topology.methods import METHODS, LayerUpdate, Method
from uasparse_kernels.topology.schedule import CosineSchedule

__all__ = ["METHODS", "CosineSchedule", "DynamicSparsity", "LayerUpdate", "Method", "layer_densities"]
