"""Preflight: what a training will need on this machine, said before anything long starts.

`preflight` begins every training; llava/estimate/doctor.py puts the same and more on a page.
"""

from __future__ import annotations

from collections.abc import Sequence

from dama.console import log
from dama.pairs import PreferencePair
from llava.estimate.disk import check_disk
from llava.estimate.fit import check_memory
from llava.estimate.lengths import lengths_of
from llava.estimate.plan import Plan, backends, error_text
from llava.estimate.shapes import shape_of
from llava.train.arguments import Arguments
from llava.train.sft_data import Row


def preflight(arguments: Arguments, items: Sequence[PreferencePair] | Sequence[Row]) -> None:
    """Before a training loads its model: memory, disk, a trial save; two lines. Every rank calls it.

    With --auto_micro_batch it sets per_device_train_batch_size and gradient_accumulation_steps. Nothing else changes:
    no random number is drawn, and no tensor made on a GPU but the one that ranks compare.

    Raises:
        ValueError: listing what would make the training fail.
    """
    args = arguments[2]
    plan = Plan(arguments, args.world_size, args.device.type == "cuda")
    try:
        shape = shape_of(arguments, items)
    except (OSError, ValueError) as error:
        shape = None
        plan.note("memory", f"not estimated: {str(error).splitlines()[0]}")
    if shape is not None:
        check_memory(plan, shape, *lengths_of(arguments, items, shape.patches))
    if args.process_index == 0:
        check_disk(plan, shape, len(items))
    if plan.errors:
        raise ValueError(error_text(plan.errors))
    said = dict(plan.notes)
    log(f"preflight: {said['memory']}")
    log(f"preflight: {'; '.join([said['disk'], backends(plan)]) if 'disk' in said else backends(plan)}")
