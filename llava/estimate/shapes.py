"""Sizes of the model that a training loads, whatever its kind."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

from dama.pairs import PreferencePair
from llava.estimate.configs import configs_of
from llava.estimate.hub import hub_shape
from llava.estimate.sizes import ModelShape
from llava.supported import is_hub_model
from llava.train.arguments import Arguments
from llava.train.sft_data import Row


def shape_of(arguments: Arguments, items: Sequence[PreferencePair] | Sequence[Row]) -> ModelShape:
    """Return the sizes of LLaVA-1.5 by its configs, of any other model by its classes on the meta device.

    Raises:
        ValueError: they are not known, and why. OSError: the checkpoint is not at hand.
    """
    model_args, _, args = arguments
    if is_hub_model(model_args.model_name_or_path):
        try:
            return hub_shape(arguments, cast("Sequence[PreferencePair]", items))
        except (AttributeError, KeyError, TypeError, RuntimeError) as error:  # of a model built in another way
            raise ValueError(f"the sizes of this model are not known ({type(error).__name__}: {error})") from error
    return ModelShape.of(*configs_of(model_args, args.cache_dir))
