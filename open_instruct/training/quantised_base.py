"""The quantised base of a run: what is quantised of it, and whether it can be trained through."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from open_instruct.flags.quantisation import title_of
from open_instruct.model import quantised
from open_instruct.model.gradient_probe import check_gradient
from open_instruct.training.base_model import BaseModelSettings


@dataclass(frozen=True)
class Quantisation:
    """What a run says and records of its base's quantisation; empty where there is none."""

    lines: tuple[str, ...] = ()
    record: dict[str, Any] = field(default_factory=dict)


def check_quantised(model: Any, settings: BaseModelSettings) -> Quantisation:
    """Probe a quantised base's gradient, and describe its form.

    Raises:
        InputError: no right gradient passes through the base.
    """
    if not settings.is_quantised or model.device.type == "meta":  # a dry run without weights
        return Quantisation()
    form = settings.quantise or settings.stored
    described = quantised.describe_quantised(model, settings.quantise, settings.stored)
    figures = check_gradient(model, title_of(form) or "")
    lines = [f"quantised base: {described}", *([figures.text()] if figures else [])]
    record = {"form": form, "described": described, "probe": figures and figures.record()}
    return Quantisation(tuple(lines), {"quantisation": record})
