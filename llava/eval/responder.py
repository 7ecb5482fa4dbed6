"""Responder of `python -m dama synth` for this repository's checkpoints."""

from __future__ import annotations

from dama.synth.respond import DrivenResponder, Sampling
from llava.generation.local import Answerer
from llava.generation.request import Decoding, Request


def open_checkpoint(checkpoint: str, device: str) -> DrivenResponder:
    """Open a responder that answers with a checkpoint; its weights are loaded at the first answer."""

    def decoding(sampling: Sampling, seed: int) -> Decoding:
        return Decoding(
            sampling.max_new_tokens,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            samples=sampling.samples,
            seed=seed,
        )

    return DrivenResponder(lambda: Answerer(checkpoint, device=device), Request, decoding)
