"""`python -m dama reference`: flags and checks of the reference stage."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from dama.finished import StageCall
from dama.flags import (
    add_batch_flags,
    add_pair_flags,
    add_shard_flag,
    device_errors,
    load_pairs,
    logging_on_every_rank,
    pick_device,
    pick_shard,
)
from dama.train.describe import describe

if TYPE_CHECKING:
    from llava.train.arguments import Arguments

DESCRIPTION = """\
Reference log-probs: log pi_ref(y | I, x) of both answers of each pair, summed over the answer's tokens ("</s>"
included), in nats. Training compares the policy with them (Eq. 1) and needs no second copy of the model.

It uses the model set-up and data path of training: give it the checkpoint, prompt template and image preparation that
training will start from. Training refuses log-probs of another model, other pairs or other images.

At the end of each shard 0.5 % of its pairs, at least one, are computed again one by one; the stage stops if a
difference exceeds what rounding explains (0.001 nats in fp32, 0.1 in bf16, times the root of the answer's tokens).

A finished folder is extended: what another --loss, --corruption or --per_token needs beside it is computed alone, and
added in OUT/added.

Writes OUT/reference.jsonl  id, chosen_logp, rejected_logp, chosen_tokens, rejected_tokens
       OUT/tokens.f32       with --per_token: log-probs of single tokens, float32, in the order of the records
       OUT/manifest.json    counts, skipped pairs, and the inputs' fingerprint
"""

EXAMPLES = """\
examples:
  python -m dama reference --model_name_or_path liuhaotian/llava-v1.5-7b --data pairs.json --image_folder images \\
      --precision bf16 --out runs/reference
  deepspeed --include localhost:0,1,2,3 --module dama reference --model_name_or_path liuhaotian/llava-v1.5-7b \\
      --data pairs.json --image_folder images --precision bf16 --out runs/reference
"""


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add all flags of the stage."""
    add_pair_flags(parser)
    _add_model_flags(parser.add_argument_group("model"))
    _add_view_flags(parser.add_argument_group("views"))
    group = parser.add_argument_group("speed")
    add_batch_flags(group, "pairs", 8)
    group.add_argument(
        "--device", choices=("auto", "cpu", "cuda"), default="auto",
        help="CUDA_VISIBLE_DEVICES selects among several GPUs (default: auto)",
    )  # fmt: skip
    add_shard_flag(group)


def _add_model_flags(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--model_name_or_path", "--model", required=True, metavar="NAME|DIR", help="the reference model pi_ref"
    )
    group.add_argument("--version", default="v1", metavar="NAME", help="prompt template (default: %(default)s)")
    group.add_argument(
        "--image_aspect_ratio", choices=("pad", "square"),
        help="pad to a square with the mean color, or resize and center crop (default: the checkpoint's, else pad)",
    )  # fmt: skip
    group.add_argument(
        "--system_prompt", default="", metavar="TEXT",
        help="models other than LLaVA-1.5: text of a system turn before each question, as in the training",
    )  # fmt: skip
    group.add_argument(
        "--min_pixels", type=int, metavar="N", help="as in the training (default: the checkpoint's, in pixels)"
    )
    group.add_argument(
        "--max_pixels", type=int, metavar="N", help="as in the training (default: the checkpoint's, in pixels)"
    )
    group.add_argument(
        "--processor_option", nargs="+", default=[], metavar="NAME=VALUE",
        help="options of the image processor, as in the training, each value as JSON",
    )  # fmt: skip
    group.add_argument("--vision_tower", metavar="NAME|DIR", help="CLIP vision tower (default: the checkpoint's own)")
    group.add_argument(
        "--model_max_length", type=int, default=2048, metavar="N",
        help="maximum sequence length in tokens (default: %(default)s)",
    )  # fmt: skip
    group.add_argument(
        "--on_long_pair", choices=("fail", "skip"), default="fail",
        help="pairs longer than that: report all of them and stop, or leave them out and list them (default: fail)",
    )  # fmt: skip


def _add_view_flags(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--loss", nargs="+", default=["dpo"], metavar="NAME",
        help="loss of the training, as there (`dama train --help` lists the names): which views of a pair need "
        "log-probs (default: dpo)",
    )  # fmt: skip
    group.add_argument(
        "--token_weights", default="none", metavar="NAME",
        help="token weights of the training, as there: all but none imply --per_token (default: %(default)s)",
    )  # fmt: skip
    group.add_argument(
        "--per_token", action="store_true",
        help="keep the log-probs of single tokens too, for a training with token weights",
    )  # fmt: skip
    group.add_argument(
        "--corruption", metavar="NAME",
        help="second image of losses that read one, as in the training (default: crop)",
    )  # fmt: skip
    group.add_argument(
        "--corruption_seed", type=int, default=0, metavar="N",
        help="seed of the corruption's random numbers, as in the training (default: %(default)s)",
    )  # fmt: skip


def training_arguments(args: argparse.Namespace) -> Arguments:
    """Arguments of a training with this model, data and loss."""
    from llava.train.arguments import DataArguments, ModelArguments, TrainingArguments

    return (
        ModelArguments(
            model_name_or_path=args.model_name_or_path,
            version=args.version,
            vision_tower=args.vision_tower,
            system_prompt=args.system_prompt,
            min_pixels=args.min_pixels,
            max_pixels=args.max_pixels,
            processor_option=args.processor_option,
        ),
        DataArguments(
            data_path=args.data,
            image_folder=args.image_folder,
            image_aspect_ratio=args.image_aspect_ratio,
            on_long_pair=args.on_long_pair,
        ),
        TrainingArguments(
            output_dir=args.out,
            task="DPO",
            bf16=args.precision == "bf16",
            use_cpu=pick_device(args.device) == "cpu",
            model_max_length=args.model_max_length,
            dataloader_num_workers=args.workers,
            report_to="none",
            loss=args.loss,
            corruption=args.corruption,
            corruption_seed=args.corruption_seed,
        ),
    )


def run(args: argparse.Namespace) -> None:
    """Check flags and pairs, then run the stage on the code of training."""
    call = StageCall.begin("reference", args)
    if (done := call.manifest()) is not None:
        describe(done, args.out)
        return
    from dama.losses import Loss
    from dama.token_weights import NONE
    from dama.train.arguments import default_corruption, view_errors
    from dama.train.data import ImageChoice
    from llava.supported import validate_trained_model

    validate_trained_model(args.model_name_or_path, "--model_name_or_path")
    errors = device_errors(args.device)
    if args.batch_size < 1:
        errors.append(f"--batch_size {args.batch_size}: expected 1 pair or more")
    args.corruption = args.corruption or default_corruption(args.loss, args.token_weights)
    errors += view_errors(args.loss, args.corruption, args.token_weights)
    shard = pick_shard(args.shard, errors)
    checked = load_pairs(args, errors)
    # What the pairs lack is known before the model is loaded.
    ImageChoice.of(checked.pairs, Loss.parse(args.loss).views, args)
    from dama.train.reference import run_reference
    from dama.train.reference_parts import complete_parts
    from llava.train.reference import reference_family

    arguments = training_arguments(args)
    family = reference_family(arguments)
    manifest = run_reference(
        family, *arguments[1:], checked.pairs, checked.skipped, args.out, args.batch_size, shard=shard,
        overwrite=args.overwrite, progress=args.shard is not None or shard.index == 0,
        per_token=args.per_token or args.token_weights != NONE, data=checked.fingerprint,
    )  # fmt: skip
    if manifest is not None:
        call.remember(checked.table, family.files, [part.folder for part in complete_parts(args.out)[1:]])
        with logging_on_every_rank():
            describe(manifest, args.out)
