"""The generation driver: prompts and images in, answers out; batched, sharded, resumable, ignorant of any benchmark.

`python -m llava.eval.generate --model-path M --question-file Q.jsonl --image-folder DIR --out DIR` reads LLaVA's
question files ({"question_id", "image", "text"} a line) and writes DIR/answers.jsonl in LLaVA's answer format. Under
torchrun or srun each process answers its part; `--backend openai` asks a server instead of loading the checkpoint.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import torch
from torch import Tensor
from tqdm import tqdm

from dama.console import digest_of, digest_of_file, report_error, say
from dama.images import open_image
from dama.pairs import ImageFolder, fault_list, find_image_faults, load_image, resolve_image
from dama.redact import redacted
from dama.stage import WHOLE, Record, Shard, open_stage, read_stage
from llava.constants import DEFAULT_IM_END_TOKEN, DEFAULT_IM_START_TOKEN, DEFAULT_IMAGE_TOKEN
from llava.conversation import get_template
from llava.eval.questions import prompt_of_row, read_question_rows
from llava.mm_utils import encode_prompt, literal, process_images
from llava.model.builder import load_pretrained_model
from llava.model.fingerprint import digest_of_checkpoint
from llava.supported import validate_supported_model

if TYPE_CHECKING:
    from dama.chat import ChatClient, ChatRequest, ChatSettings

STAGE = "answers"
FLAGS = {
    "requests": "--question-file (content)", "pictures": "--image-folder (content)", "model": "--model-path",
    "weights": "--model-path (content)", "base": "--model-base", "template": "--conv-mode", "precision": "precision",
    "batch_size": "--batch-size", "decoding.max_new_tokens": "--max-new-tokens", "decoding.num_beams": "--num-beams",
    "decoding.temperature": "--temperature", "decoding.top_p": "--top-p", "decoding.samples": "--samples",
    "decoding.seed": "--seed",
}  # fmt: skip
READERS = 8  # threads that decode the pictures of a batch


@dataclass(frozen=True, slots=True)
class Request:
    """One question about one picture, or about none."""

    id: str
    prompt: str
    image: str | None = None  # relative to the image folder
    image_id: str = ""


@dataclass(frozen=True)
class Decoding:
    """How answers are drawn; part of every result. temperature 0 is greedy (or beam search)."""

    max_new_tokens: int = 1024
    num_beams: int = 1
    temperature: float = 0.0
    top_p: float | None = None
    samples: int = 1  # answers to each question; more than one needs a temperature
    seed: int = 0

    def options(self) -> dict[str, Any]:
        chosen: dict[str, Any] = {"max_new_tokens": self.max_new_tokens, "num_beams": self.num_beams, "use_cache": True}
        chosen["do_sample"] = self.temperature > 0
        if self.temperature > 0:
            chosen |= {"temperature": self.temperature, "top_p": self.top_p, "num_return_sequences": self.samples}
        return chosen


class Reply(NamedTuple):
    """A server's answer. finish: why it ends, as the server says it. missing: why there is no answer, or ""."""

    text: str
    finish: str
    missing: str


class Responder(Protocol):
    """Whatever answers batches of requests: a checkpoint loaded here, or a server."""

    name: str

    def identity(self) -> dict[str, Any]:
        """What the answers depend on besides requests and decoding, for the fingerprint."""

    def length(self, request: Request) -> int:
        """By which prompts are put together in batches."""

    def answer(self, requests: Sequence[Request], image_folder: ImageFolder, decoding: Decoding) -> list[list[str]]:
        """`decoding.samples` answers to each request, stripped of white space at both ends."""


class Answerer:
    """A checkpoint that answers: loaded when it is first needed, asked in batches.

    Args:
        model_path: checkpoint folder or hub name. model_base: the base of a LoRA folder.
        conv_mode: prompt template. dtype: of all weights; bfloat16 on a GPU and float32 on a CPU when None.
    """

    def __init__(
        self,
        model_path: str,
        model_base: str | None = None,
        *,
        conv_mode: str = "vicuna_v1",
        device: str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        self.device = device or default_device()
        self.dtype = dtype or (torch.bfloat16 if self.device.startswith("cuda") else torch.float32)
        self.name, self.model_path, self.model_base = Path(model_path).name, model_path, model_base
        self.template = get_template(conv_mode)

    @classmethod
    def of(cls, model: Any, tokenizer: Any, image_processor: Any, *, conv_mode: str = "vicuna_v1") -> Answerer:
        """Of a model that is in memory, for instance in training; it answers as it stands when it is asked."""
        answerer = cls("", conv_mode=conv_mode, device=str(model.device), dtype=model.dtype)
        answerer.__dict__["_loaded"] = (tokenizer, model, image_processor)
        return answerer

    @cached_property
    def _loaded(self) -> tuple[Any, Any, Any]:
        tokenizer, model, image_processor, _ = load_pretrained_model(
            self.model_path, self.model_base, self.name, device=self.device, dtype=self.dtype
        )
        return tokenizer, model, image_processor

    @property
    def tokenizer(self) -> Any:
        return self._loaded[0]

    @property
    def model(self) -> Any:
        return self._loaded[1]

    @property
    def image_processor(self) -> Any:
        return self._loaded[2]

    @property
    def pad_token_id(self) -> int:
        """A model may name its end of text; ours stops there and pads with it."""
        return self.tokenizer.pad_token_id

    def identity(self) -> dict[str, Any]:
        return {
            "model": self.model_path,
            "weights": digest_of_checkpoint(self.model_path),
            **({"base": self.model_base} if self.model_base else {}),
            "template": self.template.version,
            "precision": str(self.dtype).removeprefix("torch."),
        }

    def length(self, request: Request) -> int:
        return len(self.token_ids(request))

    def token_ids(self, request: Request) -> Tensor:
        """[T] ids of the prompt, up to where the answer begins; a "</s>" in the question is encoded as text."""
        question = literal(request.prompt, self.tokenizer)
        if request.image is not None:
            image = DEFAULT_IMAGE_TOKEN
            if getattr(self.model.config, "mm_use_im_start_end", False):
                image = DEFAULT_IM_START_TOKEN + image + DEFAULT_IM_END_TOKEN
            question = f"{image}\n{question}"
        conversation = self.template.copy()
        conversation.append_message(conversation.roles[0], question)
        conversation.append_message(conversation.roles[1], None)
        return encode_prompt(conversation.get_prompt(), self.tokenizer)

    def pixels(self, request: Request, image_folder: ImageFolder) -> tuple[Tensor, tuple[int, int]]:
        """Pixel values [3, H, W], for "anyres" [crops, 3, H, W], and (width, height) of the image as it is."""
        picture = load_image(resolve_image(image_folder, str(request.image)))
        return process_images([picture], self.image_processor, self.model.config)[0], picture.size

    def answer(self, requests: Sequence[Request], image_folder: ImageFolder, decoding: Decoding) -> list[list[str]]:
        """`decoding.samples` answers to each request, stripped of white space at both ends."""
        new = self.new_tokens(requests, image_folder, decoding)
        texts = [text.strip() for text in self.tokenizer.batch_decode(new, skip_special_tokens=True)]
        return [texts[i : i + decoding.samples] for i in range(0, len(texts), decoding.samples)]

    @torch.inference_mode()
    def new_tokens(self, requests: Sequence[Request], image_folder: ImageFolder, decoding: Decoding) -> Tensor:
        """[requests x samples, T] ids of the answers, padded at the right behind the end of text."""
        ids = [self.token_ids(request) for request in requests]
        width = max(len(row) for row in ids)
        input_ids = torch.full((len(ids), width), self.pad_token_id)
        mask = torch.zeros((len(ids), width), dtype=torch.bool)
        for i, row in enumerate(ids):
            input_ids[i, width - len(row) :], mask[i, width - len(row) :] = row, True
        return self.model.generate(
            input_ids.to(self.device),
            **self._pictures([request for request in requests if request.image is not None], image_folder),
            attention_mask=mask.to(self.device),
            pad_token_id=self.pad_token_id,
            **decoding.options(),
        )

    def _pictures(self, requests: Sequence[Request], image_folder: ImageFolder) -> dict[str, Any]:
        """images, [N, 3, H, W] or a list of [crops, 3, H, W] ("anyres"), on the model's device, and image_sizes.

        They are decoded side by side, or else short answers wait for the pictures.
        """
        if not requests:
            return {"images": None}
        with ThreadPoolExecutor(min(READERS, os.cpu_count() or 1)) as readers:
            pictures, sizes = zip(*readers.map(lambda request: self.pixels(request, image_folder), requests))
        if pictures[0].dim() == 3:
            return {"images": torch.stack(pictures).to(self.device, self.dtype)}
        return {"images": [crops.to(self.device, self.dtype) for crops in pictures], "image_sizes": list(sizes)}


class ServedAnswerer:
    """A model behind an OpenAI-compatible server, such as vLLM with an export in llava-hf's layout.

    The server has the prompt template and prepares the pictures, which travel as they are. Beams are not in this
    protocol.

    Args:
        model: its name, as the server lists it. base_url: of the API, up to and with its version (/v1).
        concurrency: requests under way at once. timeout: seconds that the server may be silent.
        omit: settings that are left to the server, of `dama.completion.SETTINGS`.
    """

    def __init__(
        self,
        model: str,
        base_url: str,
        *,
        concurrency: int = 8,
        timeout: float = 600.0,
        omit: Sequence[str] = (),
    ) -> None:
        self.name, self.base_url = model, base_url
        self.concurrency, self.timeout, self.omit = concurrency, timeout, tuple(sorted(set(omit)))
        self._clients: dict[Decoding, ChatClient] = {}

    def identity(self) -> dict[str, Any]:
        served = {"model": self.name, "weights": "served", "template": "the server's", "precision": "the server's"}
        return served | ({"omitted": list(self.omit)} if self.omit else {})

    def length(self, request: Request) -> int:
        return len(request.prompt)

    def answer(self, requests: Sequence[Request], image_folder: ImageFolder, decoding: Decoding) -> list[list[str]]:
        """As `Answerer.answer`, without a reasoning model's thoughts; "" for a missing answer. Raises as `replies`."""
        return [[reply.text for reply in group] for group in self.replies(requests, image_folder, decoding)]

    def replies(self, requests: Sequence[Request], image_folder: ImageFolder, decoding: Decoding) -> list[list[Reply]]:
        """`decoding.samples` replies to each request.

        Raises ValueError for beams, and for replies that did not come, each with its error.
        """
        client = self._client(decoding)
        asked = [
            self._chat_request(request, image_folder, sample)
            for request in requests
            for sample in range(decoding.samples)
        ]
        replies = list(client.ask(asked, desc=self.name).values())
        faults = [f"{reply.id}: {reply.error}" for reply in replies if reply.text is None]
        if faults:
            server = client.settings.shown_url
            raise ValueError(fault_list(f"server {server}", faults, "run the same again, it continues"))
        read = [Reply(reply.answer, reply.finish, reply.missing) for reply in replies]
        return [read[i : i + decoding.samples] for i in range(0, len(read), decoding.samples)]

    def _client(self, decoding: Decoding) -> ChatClient:
        """One for all batches, since it finds out with the first whether the server can be used."""
        from dama.chat import ChatClient

        if decoding not in self._clients:
            self._clients[decoding] = ChatClient(self._settings(decoding))
        return self._clients[decoding]

    def _settings(self, decoding: Decoding) -> ChatSettings:
        from dama.chat import ChatSettings

        if decoding.num_beams > 1:
            raise ValueError(
                f"num_beams: a server decodes without beams, got {decoding.num_beams}; load the checkpoint here "
                "instead, or set --num-beams 1, which is another protocol"
            )
        return ChatSettings(
            self.base_url,
            self.name,
            temperature=decoding.temperature,
            max_tokens=decoding.max_new_tokens,
            top_p=decoding.top_p,
            seed=decoding.seed,
            concurrency=self.concurrency,
            timeout=self.timeout,
            give_up=True,
        ).without(self.omit)

    @staticmethod
    def _chat_request(request: Request, image_folder: ImageFolder, sample: int) -> ChatRequest:
        from dama.chat import ChatRequest, picture

        content: list[dict[str, Any]] = [{"type": "text", "text": request.prompt}]
        if request.image is not None:
            path = resolve_image(image_folder, request.image)
            with open_image(path) as image:
                kind = str(image.format).lower()
            content.insert(0, picture(path.read_bytes(), "jpeg" if kind == "mpo" else kind))
        return ChatRequest(f"{request.id}#{sample}", ({"role": "user", "content": content},), sample)


def default_device() -> str:
    """The GPU that the launcher gave this process, the first one without a launcher, or the CPU."""
    if not torch.cuda.is_available():
        return "cpu"
    local = os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID"))
    # srun may show each process its own GPU only, which then is the first.
    return "cuda" if local is None else f"cuda:{int(local) % torch.cuda.device_count()}"


def run_answers(
    responder: Responder,
    requests: Sequence[Request],
    image_folder: ImageFolder,
    out: str | Path,
    decoding: Decoding,
    *,
    batch_size: int = 16,
    shard: Shard = WHOLE,
    overwrite: bool = False,
) -> Record | None:
    """Answers the shard's requests and keeps the answers in `out` as they come; resumes by batch.

    Batches hold prompts of similar length, and so does answers.jsonl until the last answer is there; then it is put in
    the order of the requests. A line of `out`/answers.jsonl is {"question_id", "image_id", "prompt", "text",
    "model_id", "sample"}; a server's also has its "finish_reason" and, where there is no answer, the reason as
    "missing". Returns the manifest of the whole stage, or None while
    other shards are unfinished; the last one merges.
    """
    fingerprint = fingerprint_of(responder, requests, image_folder, decoding, batch_size)
    sizes = [len(chunk) * decoding.samples for chunk in _chunks(requests, batch_size)]
    with open_stage(out, STAGE, fingerprint, sizes, shard=shard, overwrite=overwrite, flags=FLAGS) as stage:
        # Only now, because the length of a prompt takes the model's tokenizer.
        chunks = list(_chunks(by_length(responder, requests), batch_size)) if stage.to_do else []
        total, done = (records // decoding.samples for records in (stage.total, stage.records_done))
        silent = stage.complete or shard.index > 0
        with tqdm(total=total, initial=done, desc=STAGE, unit="answer", disable=silent) as bar:
            for number in stage.to_do:
                chunk = chunks[number]
                torch.manual_seed(decoding.seed * 1_000_003 + number)
                stage.append(_records(responder, chunk, image_folder, decoding))
                bar.update(len(chunk))
        return stage.conclude(summarise, {}, place_of(requests, decoding.samples))


def place_of(requests: Sequence[Request], samples: int) -> Callable[[Record], int]:
    """Where an answer belongs in answers.jsonl: by its question, then by its sample."""
    order = {request.id: i * samples for i, request in enumerate(requests)}
    return lambda record: order[record["question_id"]] + record["sample"]


def fingerprint_of(
    responder: Responder,
    requests: Sequence[Request],
    image_folder: ImageFolder,
    decoding: Decoding,
    batch_size: int,
) -> Record:
    """Whatever answers depend on. Raises ValueError for faults of the requests."""
    return {
        "requests": digest_of([[r.id, r.prompt, r.image] for r in requests]),
        "pictures": digest_of(check_requests(requests, image_folder)),
        **responder.identity(),
        "decoding": asdict(decoding),
        "batch_size": batch_size,
    }


def by_length(responder: Responder, requests: Sequence[Request]) -> list[Request]:
    """Shortest prompt first; the id settles ties, so that the order is always the same."""
    lengths = {request.id: responder.length(request) for request in requests}
    return sorted(requests, key=lambda request: (lengths[request.id], request.id))


def summarise(records: list[Record], _: list[Record]) -> Record:
    """The manifest's summary of all answers."""
    words = sum(len(record["text"].split()) for record in records)
    missing = Counter(record["missing"] for record in records if record.get("missing"))
    summary = {"answers": len(records), "mean_words": words / max(1, len(records))}
    return summary | ({"missing": dict(missing.most_common())} if missing else {})


def generate_answers(
    responder: Responder,
    requests: Sequence[Request],
    image_folder: ImageFolder,
    out: str | Path,
    decoding: Decoding,
    *,
    batch_size: int = 16,
    overwrite: bool = False,
) -> list[dict[str, Any]]:
    """All answers of `run_answers`, in the order of the requests."""
    run_answers(responder, requests, image_folder, out, decoding, batch_size=batch_size, overwrite=overwrite)
    # An earlier revision left them in the order of the batches.
    return sorted(read_stage(out, STAGE)[1], key=place_of(requests, decoding.samples))


def _records(
    responder: Responder, requests: Sequence[Request], image_folder: ImageFolder, decoding: Decoding
) -> list[Record]:
    if not isinstance(responder, ServedAnswerer):
        texts = responder.answer(requests, image_folder, decoding)
        return [_record(r, text, k, responder) for r, group in zip(requests, texts) for k, text in enumerate(group)]
    return [
        _record(request, reply.text, sample, responder)
        | {"finish_reason": reply.finish}
        | ({"missing": reply.missing} if reply.missing else {})
        for request, group in zip(requests, responder.replies(requests, image_folder, decoding))
        for sample, reply in enumerate(group)
    ]


def _record(request: Request, text: str, sample: int, responder: Responder) -> dict[str, Any]:
    return {
        "question_id": request.id,
        "image_id": request.image_id or (request.image or ""),
        "prompt": request.prompt,
        "text": text,
        "model_id": responder.name,
        "sample": sample,
    }


def _chunks(items: Sequence[Request], size: int) -> Iterator[Sequence[Request]]:
    """Consecutive runs of at most `size`, with and without picture apart."""
    for has_image in (True, False):
        part = [item for item in items if (item.image is not None) is has_image]
        yield from (part[i : i + size] for i in range(0, len(part), size))


def check_requests(requests: Sequence[Request], image_folder: ImageFolder) -> dict[str, str]:
    """Image -> digest of its file, every image decoded once.

    Raises:
        ValueError: naming every error: ids used twice, image tags in a prompt, images that cannot be used.
    """
    faults = [f"id {id_!r} is used {n} times" for id_, n in Counter(r.id for r in requests).items() if n > 1]
    faults += [
        f"question {r.id}: {DEFAULT_IMAGE_TOKEN} inside the text would be read as one more image"
        for r in requests if DEFAULT_IMAGE_TOKEN in r.prompt
    ]  # fmt: skip
    askers: dict[str, str] = {}
    for request in requests:
        if request.image is not None:
            askers.setdefault(request.image, request.id)
    outside, bad = find_image_faults(list(askers), image_folder)
    faults += [f"question {askers[name]}: image {name}: {fault}" for name, fault in (outside | bad).items()]
    if faults:
        raise ValueError(fault_list("questions", faults, "correct the question file or the image folder"))
    return {name: digest_of_file(resolve_image(image_folder, name)) for name in askers}


def read_questions(path: str | Path) -> list[Request]:
    """The requests of a question file, see `llava.eval.questions`. image_id is the image where a row has none."""
    return [
        Request(
            str(row["question_id"]),
            prompt_of_row(row),
            row.get("image"),
            str(row.get("image_id", row.get("image", ""))),
        )
        for row in read_question_rows(path)
    ]


class AddFolder(argparse.Action):
    """Collects the folders of a flag that may be given more than once."""

    def __call__(self, parser: Any, namespace: argparse.Namespace, values: Any, option_string: Any = None) -> None:
        setattr(namespace, self.dest, [*(getattr(namespace, self.dest) or []), values])


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m llava.eval.generate", description=__doc__)
    parser.add_argument("--model-path", required=True, help="checkpoint folder or hub name; with a server, its model")
    parser.add_argument("--model-base", help="base of a LoRA folder")
    parser.add_argument("--question-file", required=True, help="JSONL with question_id, image, text")
    parser.add_argument(
        "--image-folder", action=AddFolder, required=True,
        help="folder that image paths are relative to; symbolic links may lead into further ones, given the same way",
    )  # fmt: skip
    parser.add_argument("--out", required=True, help="folder for answers.jsonl")
    parser.add_argument("--conv-mode", default="vicuna_v1", help="prompt template (default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=16, help="prompts at a time (default: %(default)s)")
    parser.add_argument("--max-new-tokens", type=int, default=1024, help="tokens of an answer (default: %(default)s)")
    parser.add_argument("--num-beams", type=int, default=1, help="beams (default: %(default)s)")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 is greedy (default: %(default)s)")
    parser.add_argument("--top-p", type=float, help="nucleus, with a temperature")
    parser.add_argument("--samples", type=int, default=1, help="answers to each question (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of sampling (default: %(default)s)")
    parser.add_argument("--device", help="cuda or cpu (default: what is there)")
    parser.add_argument("--overwrite", action="store_true", help="start anew in --out")
    parser.add_argument(
        "--shard", type=Shard.parse, metavar="I/N", help="this process's part, as 0/4 (default: the launcher's rank)"
    )
    add_backend_flags(parser)
    return parser


def add_backend_flags(parser: argparse.ArgumentParser) -> None:
    """Where the answers come from."""
    group = parser.add_argument_group("backend")
    group.add_argument(
        "--backend",
        choices=("local", "openai"),
        default="local",
        help="load the checkpoint here, or ask an OpenAI-compatible server that runs it (default: %(default)s)",
    )
    group.add_argument("--base-url", metavar="URL", help="of that server, e.g. http://127.0.0.1:8000/v1")
    group.add_argument("--concurrency", type=int, default=16, help="requests to it at once (default: %(default)s)")
    group.add_argument(
        "--omit",
        nargs="+",
        default=(),
        choices=("max_tokens", "temperature", "top_p", "seed"),
        metavar="SETTING",
        help="settings that the server refuses, to be left to it: max_tokens, temperature, top_p, seed",
    )


def responder_of(args: argparse.Namespace) -> Responder:
    """As the flags say. Raises ValueError where they do not fit together."""
    if args.backend == "openai":
        if not args.base_url:
            raise ValueError("--base-url: expected the server's URL with --backend openai, got none")
        return ServedAnswerer(args.model_path, args.base_url, concurrency=args.concurrency, omit=args.omit)
    if args.base_url:
        raise ValueError(f"--base-url {redacted(args.base_url)}: the checkpoint is loaded here; add --backend openai")
    return Answerer(args.model_path, args.model_base, conv_mode=args.conv_mode, device=args.device)


def main(argv: Sequence[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    decoding = Decoding(args.max_new_tokens, args.num_beams, args.temperature, args.top_p, args.samples, args.seed)
    shard = args.shard or Shard.from_launcher()
    try:
        if args.backend == "local":
            validate_supported_model(args.model_path, "--model-path")
            validate_supported_model(args.model_base, "--model-base")
        requests = read_questions(args.question_file)
        manifest = run_answers(
            responder_of(args), requests, args.image_folder, args.out, decoding,
            batch_size=args.batch_size, shard=shard, overwrite=args.overwrite,
        )  # fmt: skip
    except Exception as error:
        report_error(error, "generate")
        return 2
    if manifest is not None:
        say(f"answers: {manifest['summary']['answers']} -> {Path(args.out) / 'answers.jsonl'}")
        for reason, count in manifest["summary"].get("missing", {}).items():
            say(f"missing: {count}, {reason}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
