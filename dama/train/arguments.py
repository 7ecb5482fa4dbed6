"""Flags of preference training that no model family changes; llava.train.arguments adds LLaVA's own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import transformers

from dama import corruptions
from dama.console import log
from dama.hardness.sources import HardnessSource
from dama.losses import MIXTURES, OBJECTIVES, Loss, LossConfig
from dama.notices import without_build_notices
from dama.token_weights import NONE, VISUAL, TokenWeights
from dama.views import SECOND, View, ordered
from dama.weighting import STRATEGIES, Selection, Strategy, Variant, WeightingConfig

ZERO = ("zero2", "zero3", "zero3_offload")  # DeepSpeed's files beside this one; scripts/ has links to them


def zero_file(config: Any) -> Any:
    """The path of a DeepSpeed file that is given by a name of ZERO; any other value as it is."""
    return str(Path(__file__).with_name(f"{config}.json")) if config in ZERO else config


def described(default: Any, text: str, **metadata: Any) -> Any:
    """A field with a default and a help text."""
    return field(default=default, metadata={"help": text, **metadata})


@dataclass
class PreferenceArguments(transformers.TrainingArguments):
    """transformers' training arguments and those of the losses, DAMA's weighting, adapters and the log."""

    optim: str | None = described(None, "Optimizer. Default: adamw_torch_fused on GPUs, adamw_torch on CPUs.")
    logging_steps: float = described(10, "Steps between log lines.")
    logging_nan_inf_filter: bool = described(
        False, "Log a loss of NaN or infinity as the loss of the step before (it hides a training that failed, and the "
        "host waits for the GPU twice in every micro-batch)."
    )  # fmt: skip
    remove_unused_columns: bool = described(False, "Kept for LLaVA's scripts.")
    model_max_length: int = described(2048, "Longest sequence in tokens, image features included.")
    bits: int = described(16, "16, or 8 or 4 for a quantized base under LoRA.")
    double_quant: bool = described(True, "4 bits: quantize the scales too.")
    quant_type: str = described("nf4", "4 bits: nf4 or fp4.")
    lora_enable: bool = described(False, "Train LoRA adapters instead of all weights.")
    lora_r: int = described(64, "LoRA: rank.")
    lora_alpha: int = described(16, "LoRA: scale numerator; the update is multiplied by alpha / r.")
    lora_dropout: float = described(0.05, "LoRA: dropout.")
    lora_weight_path: str = described("", "LoRA: adapter to start from.")
    lora_bias: str = described("none", "LoRA: which biases train: none, all or lora_only.")
    trust_checkpoint: bool = described(
        False, "Resume from a checkpoint whose files this user's runs did not sign. Loading it can run code that its "
        "pickles contain."
    )  # fmt: skip
    dpo_beta: float = described(0.1, "beta of the paper: strength of the pull towards the reference.")
    dpo_use_average: bool = described(False, "Mean instead of sum of the answer's token log-probs.")
    loss: list[str] = field(
        default_factory=lambda: ["dpo"],
        metadata={"help": f"Objective, or NAME:WEIGHT for each term of a sum: {', '.join([*OBJECTIVES, *MIXTURES])}."},
    )
    label_smoothing: float = described(0.1, "Losses cdpo and robust: assumed share of flipped pairs, below 0.5.")
    simpo_margin: float = described(0.5, "Loss simpo: target margin of the mean log-probs, in units of beta x nats.")
    orpo_lambda: float = described(0.1, "Loss orpo: weight of the log odds ratio.")
    mdpo_anchor: float = described(0.0, "Loss mdpo: reward that the chosen answer is kept above.")
    symmpo_lambda: float = described(0.5, "Loss symmpo: weight of the comparisons of both answers on each image.")
    token_weights: str = described(
        NONE, "Weights of single tokens: none; segments:G (G, at least 1, in segments that differ between the answers, "
        "as in RLHF-V); visual (by how much the image decides each token, as in TPO). With --dpo_use_average True sums "
        "are divided by the sum of the weights."
    )  # fmt: skip
    corruption: str | None = described(
        None, "Second image of losses and token weights that read one: "
        f"{', '.join(corruptions.names())} (field: the pair's own second image). "
        "Default: noise for --token_weights visual alone, else crop."
    )  # fmt: skip
    corruption_seed: int = described(0, "Seed of the corruption's random numbers, for each pair its own.")
    hardness_from: HardnessSource = described(
        HardnessSource.CLIP, "Where a pair's delta comes from: clip (the hardness stage), generative (the reference's "
        "log-probs per token, chosen minus rejected), vote (the mean of both, the second ranked onto the first)."
    )  # fmt: skip
    strategy: Strategy = described(
        Strategy.BOTH,
        f"What sets beta per pair: {', '.join(f'{name} ({row.summary})' for name, row in STRATEGIES.items())}.",
    )
    variant: Variant = described(
        Variant.PAPER, "paper: Algorithm 1, defined per optimizer step, whatever the hardware; released: what the "
        "authors' released code computes, per gathered micro-batch."
    )  # fmt: skip
    selection: Selection = described(
        Selection.AUTO, "Which pairs of a step are trained on: off (all), sample (Eq. 10-11), nearest (the K smallest "
        "|R - R_bar|), random; auto: off for none and data, sample otherwise."
    )  # fmt: skip
    select_ratio: float = described(0.75, "K / N: share of a step's pairs that is selected (12 of 16).")
    gamma: float = described(0.9, "Decay of the running mean R_bar (Eq. 14).")
    beta_min: float = described(1e-3, "Lower bound of beta per pair.")
    delta_bar: float | None = described(
        None, "Mean hardness. Default: computed from the data in use. 0.0482190464911681 is the released code's."
    )
    check_reference: bool = described(
        True, "Stop after the first forward pass when policy and reference log-probs are not the same model's."
    )
    shared_prefix: bool = described(
        True, "Run image and question once for both answers of a pair, packed without padding; False: two padded rows."
    )
    logp_chunk: int = described(1024, "Answer positions whose logits exist at one time (memory: chunk x vocabulary).")

    pair_log: bool = described(
        False, "Write pair_log.jsonl to the output folder: for every pair of every step its R, alpha_D, beta, selected."
    )
    debug_sync: str = described(
        "off", "Host-device synchronizations in the forward pass: off, warn (name each), or error."
    )

    def __post_init__(self) -> None:
        on_gpu = torch.cuda.is_available() and not self.use_cpu
        self.optim = self.optim or ("adamw_torch_fused" if on_gpu else "adamw_torch")
        self.corruption = self.corruption or default_corruption(self.loss, self.token_weights)
        self.deepspeed: Any = zero_file(self.deepspeed)
        self.dataloader_pin_memory: bool = self.dataloader_pin_memory and on_gpu  # memory to copy to GPUs from
        super().__post_init__()

    @cached_property
    def _setup_devices(self) -> torch.device:
        """This process's own GPU: transformers would spread its batches over all that it sees (DataParallel)."""
        with without_build_notices():  # the ranks of a distributed run join here
            device = super()._setup_devices
        if self.n_gpu > 1:
            log(
                f"warning: {self.n_gpu} GPUs are visible and one process uses one; start one process for each, with "
                "`deepspeed --include localhost:0,1,...` or `torchrun --nproc_per_node N`, to use them all"
            )
            self._n_gpu: int = 1
        return device

    def preference_loss(self) -> Loss:
        """The objective, or the weighted sum of several, that the flags name."""
        config = LossConfig(
            label_smoothing=self.label_smoothing,
            simpo_margin=self.simpo_margin,
            orpo_lambda=self.orpo_lambda,
            mdpo_anchor=self.mdpo_anchor,
            symmpo_lambda=self.symmpo_lambda,
        )
        return Loss.parse(self.loss, config)

    def token_weighting(self) -> TokenWeights | None:
        """The weights of single tokens that the flags name."""
        return TokenWeights.parse(self.token_weights)

    def views(self) -> tuple[View, ...]:
        """All views that a pair is read in: those of the loss, and those that token weights are made of."""
        weights = self.token_weighting()
        return ordered([*self.preference_loss().views, *(weights.views if weights else ())])

    def weighting(self) -> WeightingConfig:
        """The method's constants as the flags give them."""
        return WeightingConfig(
            strategy=Strategy(self.strategy),
            variant=Variant(self.variant),
            selection=Selection(self.selection),
            beta=self.dpo_beta,
            gamma=self.gamma,
            keep=self.select_ratio,
            beta_min=self.beta_min,
            seed=self.data_seed if self.data_seed is not None else self.seed,
        )


def default_corruption(loss: Sequence[str], token_weights: str) -> str:
    """TPO's noise where token weights alone read a second image, else mDPO's crop."""
    try:
        reads_one = any(view.corrupted for view in Loss.parse(loss).views)
    except ValueError:  # reported with the other flags
        reads_one = True
    return "noise" if token_weights == VISUAL and not reads_one else "crop"


def objective_errors(args: PreferenceArguments) -> list[str]:
    """What is wrong with the flags of the loss and its combination with DAMA's, one message each."""
    errors = view_errors(args.loss, str(args.corruption), args.token_weights)
    if not 0 <= args.label_smoothing < 0.5:
        errors.append(f"--label_smoothing: expected a share in [0, 0.5), got {args.label_smoothing}")
    if errors:
        return errors
    loss = args.preference_loss()
    if not loss.has_beta and args.strategy != Strategy.NONE:
        errors.append(
            f"--strategy {Strategy(args.strategy).value}: sets beta, and --loss {loss.name} has none; give --strategy "
            "none, under which --selection still chooses pairs"
        )
    if args.hardness_from != HardnessSource.CLIP and not args.weighting().uses_delta:
        errors.append(
            f"--hardness_from {HardnessSource(args.hardness_from).value}: says where delta comes from, and --strategy "
            f"{Strategy(args.strategy).value} does not use delta; give --strategy data or both, or leave it out"
        )
    if loss.has_state and args.variant == Variant.RELEASED:
        errors.append(
            f"--variant released: decides for each gathered micro-batch, and --loss {loss.name} has a running mean for "
            "each optimizer step; give --variant paper"
        )
    return errors


def view_errors(loss: Sequence[str], corruption: str, token_weights: str = NONE) -> list[str]:
    """What is wrong with --loss, --token_weights and --corruption, one message each."""
    errors: list[str] = []
    views: tuple[View, ...] = ()
    try:
        views = Loss.parse(loss).views
    except ValueError as error:
        errors.append(str(error))
    try:
        weights = TokenWeights.parse(token_weights)
    except ValueError as error:
        errors.append(str(error))
    else:
        if weights and SECOND in views:
            errors.append(
                f"--token_weights {token_weights}: weights tokens of the chosen and the rejected answer, and --loss "
                f"{' '.join(loss)} compares a third answer with them; give --token_weights none"
            )
    if corruption not in corruptions.names():
        errors.append(f"--corruption {corruption}: expected one of {', '.join(corruptions.names())}")
    return errors
