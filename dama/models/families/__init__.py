"""Models that need more than their config says: one module here for each, named as the config's `model_type`.

Such a module has a class `Family`, a HubFamily whose methods do what is different: `adapted_processor` for training and
answering, all others for training. The file is enough: no other one lists it. A "-" of the model type is "_" here.
"""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from typing import Any

from dama.models.family import HubFamily


def family_of(config: Any) -> type[HubFamily]:
    """Return the class for a model of this config: `Family` of its module here, or HubFamily where it has none."""
    name = str(config.model_type).replace("-", "_")
    if not name.isidentifier() or find_spec(f"{__name__}.{name}") is None:
        return HubFamily
    return import_module(f"{__name__}.{name}").Family
