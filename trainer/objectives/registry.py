"""Objectives by name and preset."""

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from index.errors import OptionError
from trainer.objectives.base import Objective
from trainer.objectives.coalescer import PAPER, Coalescer
from trainer.objectives.consistency import Consistency
from trainer.objectives.endpoint import Endpoint
from trainer.objectives.flow_matching import FlowMatching
from trainer.objectives.hyperparameters import convert_hyperparameters
from trainer.objectives.imle import IMLE
from trainer.objectives.mean_flow import MeanFlow
from trainer.objectives.rectified_flow import RectifiedFlow
from trainer.objectives.shortcut import Shortcut

OBJECTIVES: dict[str, type[Objective]] = {
    "coalescer": Coalescer,
    "endpoint": Endpoint,
    "flow_matching": FlowMatching,
    "rectified_flow": RectifiedFlow,
    "mean_flow": MeanFlow,
    "shortcut": Shortcut,
    "consistency": Consistency,
    "imle": IMLE,
}
PRESETS: dict[str, dict[str, Mapping[str, Any]]] = {name: {"default": {}} for name in OBJECTIVES}
"""For each objective the hyperparameters of each preset that differ from the defaults."""
PRESETS["coalescer"]["paper"] = PAPER


def name_of(objective: Objective) -> str:
    """Return the name of an objective's class."""
    return next(name for name, kind in OBJECTIVES.items() if type(objective) is kind)


def make_objective(name: str, preset: str, **hyperparameters: Any) -> Objective:
    """Make an objective from its name, a preset, and hyperparameters that replace the preset's.

    Raises:
        OptionError: a name is unknown, or a value is not allowed.
    """
    if name not in OBJECTIVES:
        raise OptionError(f"--objective {name!r} is unknown: choose one of {', '.join(OBJECTIVES)}")
    if preset not in PRESETS[name]:
        raise OptionError(f"--preset {preset!r} is unknown for {name}: choose one of {', '.join(PRESETS[name])}")
    defaults = {each.name: each.default for each in fields(OBJECTIVES[name])}
    return OBJECTIVES[name](**{**PRESETS[name][preset], **convert_hyperparameters(hyperparameters, defaults, name)})
