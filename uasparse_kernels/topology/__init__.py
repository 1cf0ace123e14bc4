"""Which weights are active: densities of layers, schedules, and the methods that drop and grow."""

from uasparse_kernels.topology.averages import AveragedModel
from uasparse_kernels.topology.distribution import layer_densities
from uasparse_kernels.topology.dynamic import DynamicSparsity
from uasparse_kernels.topology.methods import (
    GMP,
    MEST,
    METHODS,
    SET,
    GradientGrowth,
    GraNet,
    GroupGrowth,
    LayerUpdate,
    Method,
    NOfM,
    RandomGrowth,
    RigL,
    SRigL,
    Update,
    magnitude,
    magnitude_and_gradient,
    relative_magnitude,
)
from uasparse_kernels.topology.schedule import CosineSchedule, cubic_sparsity
from uasparse_kernels.topology.structure import structured_pattern

__all__ = [
    "GMP",
    "MEST",
    "METHODS",
    "SET",
    "AveragedModel",
    "CosineSchedule",
    "DynamicSparsity",
    "GraNet",
    "GradientGrowth",
    "GroupGrowth",
    "LayerUpdate",
    "Method",
    "NOfM",
    "RandomGrowth",
    "RigL",
    "SRigL",
    "Update",
    "cubic_sparsity",
    "layer_densities",
    "magnitude",
    "magnitude_and_gradient",
    "relative_magnitude",
    "structured_pattern",
]
