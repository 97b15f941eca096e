"""A module's own forward with other parameters than its own."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

from torch import Tensor


def own_forward(module: Any, weight: Tensor, bias: Tensor | None = None) -> Callable[..., Any]:
    """The forward of the module's class, with another weight and bias; what the module was wrapped in is passed by.

    Args:
        module: Whose settings stay, and whose parameters are not touched.
        weight: In place of its ``weight``.
        bias: In place of its ``bias``.
    """
    twin = copy.copy(module)
    twin.__dict__.pop("forward", None)
    # Plain attributes, because the parameter table only takes parameters.
    twin._parameters = {}
    twin.__dict__.update(weight=weight, bias=bias)
    return lambda *args, **kwargs: type(module).forward(twin, *args, **kwargs)
