"""Responder of `python -m dama synth` for this repository's checkpoints."""

from __future__ import annotations

from dama.synth.respond import DrivenResponder, Sampling
from llava.generation.hub import HubAnswerer
from llava.generation.local import Answerer
from llava.generation.request import Decoding, Request
from llava.supported import answers_by_hub


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

    kind = HubAnswerer if answers_by_hub(checkpoint) else Answerer
    return DrivenResponder(lambda: kind(checkpoint, device=device), Request, decoding)
