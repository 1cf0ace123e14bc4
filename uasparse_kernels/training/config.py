"""What a run is made of: `FitConfig`, and arms, the short names of methods (`rigl+moon+vote`)."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, get_type_hints

from uasparse_kernels.training.batches import AUGMENTATIONS
from uasparse_kernels.training.data import SPEC_HELP
from uasparse_kernels.training.errors import TrainingError, told
from uasparse_kernels.training.losses import LOSSES
from uasparse_kernels.training.models import MODELS, STEMS
from uasparse_kernels.unknowns.patch_shuffle import UNKNOWNS, PatchShuffle

METHODS = ("dense", "static", "set", "rigl", "mest", "gmp", "granet", "srigl", "2:4")
FIXED_SPARSITY = {"dense": 0.0, "2:4": 0.5}  # whatever the config says
INITIAL_SPARSITY = {"gmp": 0.0, "granet": 0.5}  # of methods that prune gradually to the config's
BLOCKS = ((4, 1), (16, 1), (4, 4), (16, 16), (32, 32))  # that an arm can name; --block takes any
UPDATE_STEPS = ("instead", "extra")
DROP_SCORES = ("magnitude", "relative")  # relative: a weight's share of its output
UNKNOWN_HEADS = ("shared", "own")  # a row of the last layer, or an UnknownHead
DROPS_BY_CHOICE = ("set", "rigl", "granet")  # the others say themselves what they drop


def option(default: Any, help: str) -> Any:
    """A field of FitConfig that is an option of the command line too."""
    return field(default=default, metadata={"help": help})


def _between(low: float, high: float, *, open_low: bool = False, closed_high: bool = False) -> tuple[Any, str]:
    """A test whether a number is in the range, and how a message says it."""
    text = f"in {'(' if open_low else '['}{low:g}, {high:g}{']' if closed_high else ')'}"
    return lambda v: (low < v if open_low else low <= v) and (v <= high if closed_high else v < high), text


_COUNT = (lambda v: 1 <= v < 1 << 31, "to be at least 1 (and of 31 bits)")
_COUNT_OR_NONE = (lambda v: 0 <= v < 1 << 31, "to be at least 0 (and of 31 bits)")
_POSITIVE = (lambda v: 0 < v < math.inf, "to be above 0 and finite")
_NOT_NEGATIVE = (lambda v: 0 <= v < math.inf, "to be at least 0 and finite")
RANGES: dict[str, tuple[Callable[[float], bool], str]] = {
    "image_size": _COUNT_OR_NONE,
    "limit_train": _COUNT_OR_NONE,
    "validation": _between(0, 1),
    "sparsity": _between(0, 1),
    "delta_t": _COUNT,
    "drop_fraction": _between(0, 1, open_low=True, closed_high=True),
    "stop_fraction": _between(0, 1, open_low=True, closed_high=True),
    "warmup_epochs": _COUNT_OR_NONE,
    "alpha_final": _NOT_NEGATIVE,
    "rho": _POSITIVE,
    "logit_temperature": _POSITIVE,
    "weight_dropout": _between(0, 1),
    "vote_fraction": _between(0, 1, open_low=True, closed_high=True),
    "votes_per_epoch": _COUNT,
    "unknown_share": _between(0, 1, open_low=True),
    "unknown_weight": _NOT_NEGATIVE,
    "epochs": _COUNT,
    "batch_size": _COUNT,
    "lr_max": _POSITIVE,
    "lr_min": _POSITIVE,
    "lr_rise": _NOT_NEGATIVE,
    "momentum": _between(0, 1),
    "weight_decay": _NOT_NEGATIVE,
    "seed": (lambda v: -(1 << 63) <= v < (1 << 63) - 1, "of 63 bits"),
}


@dataclass(frozen=True)
class FitConfig:
    """All that decides the result of a run. Defaults are those of arXiv 2403.20047 where it names them."""

    data: str = option("fashion-mnist", f"Data set to train on: {SPEC_HELP}.")
    data_dir: str = option("", "Folder of downloaded data sets; default $UASPARSE_DATA or ~/.cache/uasparse_kernels.")
    holdout: str = option("", "Classes (indices, comma-separated) left out of training: near-OOD.")
    image_size: int = option(0, "Side of the images in pixels; 0 takes them as they come.")
    limit_train: int = option(0, "Use so many training images; 0 uses all.")
    validation: float = option(0.0, "Share of the training images not trained on: export finds its threshold on them.")
    augment: str = option("auto", f"One of {', '.join(AUGMENTATIONS)}; auto is crop, with flips for colour images.")

    model: str = option("convnet", f"One of {', '.join(MODELS)}.")
    stem: str = option("auto", "First layer of a ResNet: cifar, imagenet, or auto (by image size).")
    method: str = option("rigl", f"One of {', '.join(METHODS)}.")
    sparsity: float = option(0.9, "Share of absent weights, in the end (dense and 2:4 ignore it).")
    distribution: str = option("erk", "Density over the layers: erk, er or uniform.")
    block: str = option("1x1", "Size of the blocks that are pruned and grown, rows x columns.")
    storage: str = option("auto", "Weights packed (active ones only), dense, or auto.")
    delta_t: int = option(100, "Steps between topology updates.")
    drop: str = option("magnitude", f"What an update drops: the lowest by one of {', '.join(DROP_SCORES)}.")
    drop_fraction: float = option(0.3, "Share of the active weights that the first update moves; decays by a cosine.")
    stop_fraction: float = option(0.75, "Share of the steps after which the topology is frozen.")
    update_step: str = option("instead", "A topology update comes instead of the optimiser step, or extra after it.")

    loss: str = option("moon", f"One of {', '.join(LOSSES)}.")
    warmup_epochs: int = option(5, "moon and reweight: epochs of plain cross entropy first.")
    alpha_final: float = option(1.0, "moon and reweight: strength in the last epoch.")
    rho: float = option(64.0, "moon and reweight: divisor of the first alpha.")
    logit_temperature: float = option(0.04, "logitnorm: temperature.")
    weight_dropout: float = option(0.0, "Share of the active weights absent at random in each step (CigL: 0.1).")
    vote: bool = option(True, "Average the weights late in training and evaluate the average.")
    vote_fraction: float = option(0.2, "Share of the epochs, at the end, over which the vote runs.")
    votes_per_epoch: int = option(10, "Weights averaged per epoch of the vote.")
    unknowns: str = option("none", f"Synthetic unknowns in each batch: one of {', '.join(UNKNOWNS)}.")
    unknown_share: float = option(0.125, "Share of each batch that is replaced by synthetic unknowns.")
    unknown_weight: float = option(0.25, "Weight of a synthetic unknown in the loss.")
    unknown_grid: str = option(
        "4", "patch-shuffle: patches per side, 0 for single pixels; several, comma-separated, take equal parts."
    )
    unknown_seam: str = option(
        "0", "patch-shuffle: pixels beyond each seam over which patches fade into each other; one, or one a grid."
    )
    unknown_head: str = option(
        "shared",
        f"The output for unknown: one of {', '.join(UNKNOWN_HEADS)}; own is dense, of features and their squares.",
    )
    as_released: bool = option(
        False, "Repeat two faults of MOON's released program: a drop fraction that is 0 almost at once, and a vote "
        "over the first tenth of each epoch.",
    )  # fmt: skip

    epochs: int = option(100, "Passes over the training data.")
    batch_size: int = option(128, "Images per step.")
    lr_max: float = option(0.12, "Learning rate at the start of the cosine.")
    lr_rise: float = option(0.0, "Epochs over which the learning rate rises from 0 to lr_max first.")
    lr_min: float = option(0.008, "Learning rate at its end, and during the vote.")
    momentum: float = option(0.9, "Nesterov momentum of SGD.")
    weight_decay: float = option(5e-4, "Weight decay of SGD.")
    precision: str = option("float32", "float32, or bfloat16 for mixed precision.")
    compile: bool = option(False, "Compile the network by torch.compile, which takes a minute: for long runs on a GPU.")
    seed: int = option(0, "Seed of everything random.")

    def __post_init__(self) -> None:
        self._check_types()
        for name, allowed in (
            ("model", MODELS), ("method", METHODS), ("loss", LOSSES), ("unknowns", UNKNOWNS),
            ("augment", AUGMENTATIONS), ("update_step", UPDATE_STEPS), ("precision", ("float32", "bfloat16")),
            ("drop", DROP_SCORES), ("stem", STEMS), ("unknown_head", UNKNOWN_HEADS),
            ("distribution", ("erk", "er", "uniform")), ("storage", ("auto", "packed", "dense")),
        ):  # fmt: skip
            if getattr(self, name) not in allowed:
                raise TrainingError(f"Expected {name} to be one of {', '.join(allowed)}, got {getattr(self, name)!r}.")
        for name, (in_range, expected) in RANGES.items():
            if not in_range(getattr(self, name)):  # NaN is in none
                raise TrainingError(f"Expected {name} {expected}, got {getattr(self, name)}.")
        if self.weight_dropout and self.method == "dense":
            raise TrainingError("Expected a sparse method with weight_dropout: it drops weights of sparse layers.")
        if self.drop != "magnitude" and self.method not in DROPS_BY_CHOICE:
            named = ", ".join(DROPS_BY_CHOICE)
            raise TrainingError(f"Expected a method of {named} with drop {self.drop}, got {self.method}.")
        if self.unknown_head != "shared" and not self.has_unknown_output:
            raise TrainingError(
                f"Expected an output for unknown with unknown_head {self.unknown_head}, got loss {self.loss} and no "
                "synthetic unknowns: give --unknowns patch-shuffle, or loss moon."
            )
        if self.as_released and self.method not in ("rigl", "set"):
            raise TrainingError(f"Expected method rigl or set with as_released, got {self.method}.")
        if self.sparsity == 0 and self.method not in FIXED_SPARSITY:
            raise TrainingError(f"Expected a sparsity above 0 with method {self.method}, got 0: give method dense.")
        if self.lr_min > self.lr_max:
            raise TrainingError(f"Expected 0 < lr_min <= lr_max, got lr_min {self.lr_min} and lr_max {self.lr_max}.")
        if self.lr_rise > self.epochs:
            raise TrainingError(f"Expected lr_rise of at most the {self.epochs} epochs, got {self.lr_rise}.")
        if self.loss in ("moon", "reweight") and not 0 < self.warmup_epochs < self.epochs:
            raise TrainingError(
                f"Expected warmup_epochs below the {self.epochs} epochs (and at least 1), got {self.warmup_epochs}: "
                "alpha rises only after the warm-up. Give more epochs or fewer warmup_epochs."
            )
        rows, columns = self.block_size
        if min(rows, columns) < 1 or columns not in (1, rows):
            raise TrainingError(f"Expected a block as 1x1, 4x1 (rows x 1) or 16x16, got {self.block}.")
        if self.method == "2:4" and self.block_size != (1, 1):
            raise TrainingError(f"Expected block 1x1 for method 2:4, got {self.block}.")
        if self.loss == "reweight" and self.unknowns != "none":
            raise TrainingError("Expected no synthetic unknowns with the loss reweight: it has no output for them.")
        if self.unknowns == "patch-shuffle":
            with told():
                PatchShuffle(0, share=self.unknown_share, grids=self.unknown_grids, seams=self.unknown_seams)
        _ = self.holdout_classes, self.unknown_grids, self.unknown_seams

    def _check_types(self) -> None:
        for name, expected in get_type_hints(FitConfig).items():
            value = getattr(self, name)
            fits = (int, float) if expected is float else expected
            if not isinstance(value, fits) or (isinstance(value, bool) and expected is not bool):
                raise TrainingError(f"Expected {name} to be of type {expected.__name__}, got {value!r}.")

    @property
    def block_size(self) -> tuple[int, int]:
        """Rows and columns of `block`. Raises TrainingError for what is no size."""
        try:
            rows, columns = (int(part) for part in self.block.split("x"))
        except ValueError as error:
            raise TrainingError(f"Expected a block as 1x1 or 16x16, got {self.block!r}.") from error
        return rows, columns

    @property
    def holdout_classes(self) -> tuple[int, ...]:
        """Indices of the classes that are left out of training."""
        return _integers(self.holdout, "class indices as 7,8,9 for holdout")

    @property
    def unknown_grids(self) -> tuple[int, ...]:
        """Patches a side, by grid."""
        return _integers(str(self.unknown_grid), "patches per side as 4 or 2,4 for unknown_grid")

    @property
    def unknown_seams(self) -> tuple[int, ...]:
        """Pixels of fading beyond the patches: one, or one a grid."""
        return _integers(str(self.unknown_seam), "pixels as 2 or 0,2 for unknown_seam")

    @property
    def vote_start_epoch(self) -> int:
        """First epoch (from 0) of the vote; `epochs` when there is none."""
        return self.epochs - max(1, round(self.epochs * self.vote_fraction)) if self.vote else self.epochs

    @property
    def has_unknown_output(self) -> bool:
        """Whether the network has K+1 outputs."""
        return self.loss == "moon" or self.unknowns != "none"

    @property
    def arm(self) -> str:
        """The short name of the method: topology, and what is not plain of loss, vote, unknowns and faults."""
        parts = []
        for tokens in ARM_PARTS.values():
            fits = [t for t, settings in tokens.items() if all(getattr(self, k) == v for k, v in settings.items())]
            parts += [max(fits, key=lambda token: len(tokens[token]))] if fits else []  # cigl is more than vote
        return "+".join(part for part in parts if part != "ce")

    def to_dict(self) -> dict[str, Any]:
        """All settings by name, which `from_dict` takes."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> FitConfig:
        """Raises TrainingError for keys that this version does not know, and for wrong values."""
        if not isinstance(values, dict):
            raise TrainingError(f"Expected settings by name, got {values!r}.")
        unknown = set(values) - {f.name for f in fields(cls)}
        if unknown:
            raise TrainingError(f"Unknown settings {', '.join(sorted(map(str, unknown)))}: written by another version?")
        return cls(**values)

    def differences(self, other: FitConfig) -> list[str]:
        """Every setting in which two runs differ, with both values."""
        return [
            f"{f.name}: {getattr(self, f.name)!r} and {getattr(other, f.name)!r}"
            for f in fields(self)
            if getattr(self, f.name) != getattr(other, f.name)
        ]


def _integers(text: str, expected: str) -> tuple[int, ...]:
    try:
        values = tuple(int(part) for part in text.split(",") if part.strip())
        if all(abs(value) < 1 << 31 for value in values):
            return values
        raise ValueError("beyond 31 bits")
    except ValueError as error:
        raise TrainingError(f"Expected {expected}, got {text!r}.") from error


def with_arm(config: FitConfig, arm: str) -> FitConfig:
    """Sets what an arm is made of from its name: see `arm_settings`."""
    return replace(config, **arm_settings(arm))


def arm_settings(arm: str) -> dict[str, Any]:
    """The settings that the name of an arm stands for, such as `dense`, `rigl+vote`, `set+moon+vote+patch-shuffle`.

    Parts that are not named take the plain choice (PLAIN_ARM). Raises TrainingError.
    """
    chosen: dict[str, Any] = {}
    seen: set[str] = set()
    for part in arm.split("+"):
        kind = next((kind for kind, tokens in ARM_PARTS.items() if part in tokens), None)
        if kind is None or kind in seen:
            known = "; ".join(f"{kind}: {', '.join(tokens)}" for kind, tokens in ARM_PARTS.items())
            raise TrainingError(
                f"Cannot read {part!r} in the arm {arm!r}. Expected one at most of each, joined by +: {known}."
            )
        seen.add(kind)
        chosen |= ARM_PARTS[kind][part]
    return PLAIN_ARM | chosen


# What an arm consists of: at most one token a kind, and what it sets.
ARM_PARTS: dict[str, dict[str, dict[str, Any]]] = {
    "method": {name: {"method": name} for name in METHODS},
    "structure": {f"{rows}x{columns}": {"block": f"{rows}x{columns}"} for rows, columns in BLOCKS},
    "drop": {"relative": {"drop": "relative"}},
    "loss": {name: {"loss": name} for name in LOSSES},
    "average": {"vote": {"vote": True}, "cigl": {"vote": True, "weight_dropout": 0.1}},
    "unknowns": {
        "patch-shuffle": {"unknowns": "patch-shuffle"},
        "hard-shuffle": {
            "unknowns": "patch-shuffle",
            "unknown_grid": "4,2,0",
            "unknown_seam": "0",
            "unknown_share": 0.03125,
            "unknown_weight": 0.5,
        },
        "mixed-shuffle": {
            "unknowns": "patch-shuffle",
            "unknown_grid": "4,4,2",
            "unknown_seam": "0,3,0",
            "unknown_share": 0.03125,
            "unknown_weight": 0.5,
        },
    },
    "head": {"own-u": {"unknown_head": "own"}},
    "faults": {"as-released": {"as_released": True}},
}
PLAIN_ARM: dict[str, Any] = {
    "method": "rigl", "drop": "magnitude", "loss": "ce", "vote": False, "weight_dropout": 0.0, "unknowns": "none",
    "unknown_head": "shared", "as_released": False,
}  # fmt: skip
