# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
"""# DAMA in images, on TinyCOCO.

TinyCOCO is a miniature world in this repository: drawn scenes, a CLIP and a LLaVA of 2.5 million parameters, and
preference pairs. This notebook goes through DAMA once, from captions that name missing objects to a model that names
fewer of them. It needs no download and no GPU, and takes about a minute on a CPU.
"""

# %%
import io
import json
import sys
import tempfile
from contextlib import redirect_stderr
from pathlib import Path

# The repository's folder, from which `playground` is imported.
sys.path.insert(0, next(str(f) for f in (Path.cwd(), *Path.cwd().parents) if (f / "playground/tinycoco").is_dir()))

import matplotlib.pyplot as plt
import torch
from IPython.display import HTML, Markdown, display

from dama.cli import main as dama
from dama.report import url_of
from dama.stage import read_stage
from dama.weighting import alpha_data, update_R_bar
from eval.core.scores import Score
from eval.core.types import Answer
from eval.objhal import format_table, score_captions
from llava.generation.local import Answerer
from llava.generation.request import Decoding, Request
from playground.tinycoco.preferences import scene_of
from playground.tinycoco.run import CLIP, SFT, prepare, vocabulary
from playground.tinycoco.scenes import draw, sample_scene
from playground.tinycoco.vocabulary import find_mentions

torch.set_num_threads(1)
OUT = Path(tempfile.mkdtemp(prefix="tinycoco-"))
PAIRS, SCENES = 128, 24
KINDS = {"sampled": "tab:blue", "edit": "tab:orange", "unrelated": "tab:green"}


def run(*words: object) -> None:
    """Run a command, such as `python -m dama hardness ...`, without its progress bars."""
    with redirect_stderr(io.StringIO()) as errors:
        status = dama([str(word) for word in words])
    if status != 0:
        raise RuntimeError(errors.getvalue())


# %% [markdown]
# ## Scenes
# A scene is sampled from its number and drawn when it is needed. What is in it is known exactly, so hallucination is
# counted, not judged.

# %%
figure, axes = plt.subplots(1, 4, figsize=(12, 3.4))
for axis, number in zip(axes, range(4)):
    scene = sample_scene(number, "test")
    axis.imshow(draw(scene))
    axis.set_title(", ".join(scene.categories), fontsize=9)
    axis.axis("off")
plt.show()

# %% [markdown]
# ## What the model says before alignment
# The model was fine-tuned on captions that name objects which usually go with what is there. Objects that are not in
# the scene are marked in red.


# %%
def marked(image: str, caption: str) -> str:
    """A caption as HTML, with every object in bold: green if it is in the scene, red if not."""
    html, end = "", 0
    for category, start, stop in find_mentions(caption):
        color = "green" if category in scene_of(image).categories else "crimson"
        html += f"{caption[end:start]}<b style='color:{color}'>{caption[start:stop]}</b>"
        end = stop
    return html + caption[end:]


def gallery(images: list[str], models: dict[str, dict[str, str]]) -> HTML:
    """The scenes with the captions of each model."""
    rows = []
    for image in images:
        lines = "".join(f"<p><i>{name}:</i> {marked(image, captions[image])}</p>" for name, captions in models.items())
        shown = f"<img width=112 src='{url_of(draw(scene_of(image)))}'>"
        rows.append(f"<tr><td>{shown}</td><td style='text-align:left'>{lines}</td></tr>")
    return HTML(f"<table>{''.join(rows)}</table>")


def captions_of(model: Path) -> dict[str, str]:
    """Greedy captions of the held-out scenes: image -> text."""
    asked = [json.loads(line) for line in (OUT / "data/questions.jsonl").read_text().splitlines()]
    requests = [Request(row["question_id"], row["text"], row["image"]) for row in asked]
    answers = Answerer(str(model), conv_mode="v1").answer(requests, OUT / "data/images", Decoding(max_new_tokens=96))
    return {str(request.image): text for request, (text,) in zip(requests, answers)}


with redirect_stderr(io.StringIO()):
    prepare(OUT / "data", PAIRS, SCENES, "test")
before = captions_of(SFT)
images = list(before)
display(gallery(images[:5], {"before": before}))

# %% [markdown]
# ## Preference pairs
# There are three kinds. `sampled`: two of the model's own answers, ranked by what is drawn. `edit`: a true caption and
# the same one with an object made wrong. `unrelated`: a true caption and one of another scene.

# %%
pairs = json.loads((OUT / "data/pairs.json").read_text())
for kind in KINDS:
    pair = next(pair for pair in pairs if pair["idx"].startswith(kind))
    display(Markdown(f"**{kind}**"))
    answers = {name: {pair["image_path"]: pair[name]} for name in ("chosen", "rejected")}
    display(gallery([pair["image_path"]], answers))

# %% [markdown]
# ## Hardness
# The hardness stage splits both answers into statements and scores them with CLIP. $\delta$ is the sum of the chosen
# answer's scores minus that of the rejected one. A large $\delta$ means that the image decides the pair plainly. DAMA
# multiplies beta by $\alpha_D = \sigma(\delta) / \sigma(\bar\delta)$: less pull to the reference for hard pairs.

# %%
data = ["--data", OUT / "data/pairs.json", "--image_folder", OUT / "data/images"]
run("hardness", *data, "--clip", CLIP, "--workers", 0, "--out", OUT / "hardness")
manifest, records = read_stage(OUT / "hardness", "hardness")
delta_bar = manifest["summary"]["delta_bar"]

# %%
figure, (left, right) = plt.subplots(1, 2, figsize=(11, 3.6))
deltas = {kind: [record["delta"] for record in records if record["kind"] == kind] for kind in KINDS}
left.hist(list(deltas.values()), bins=20, stacked=True, label=list(KINDS), color=list(KINDS.values()))
left.axvline(delta_bar, color="black", linestyle="--", label="mean")
left.set(xlabel="delta", ylabel="pairs")
left.legend()
for kind, values in deltas.items():
    betas = 0.1 * alpha_data(torch.tensor(values), delta_bar)
    right.scatter(values, betas, s=12, color=KINDS[kind], label=kind)
right.axhline(0.1, color="black", linestyle="--", label="beta of plain DPO")
right.set(xlabel="delta", ylabel="beta x alpha_D")
right.legend()
plt.show()

# %% [markdown]
# ## Training
# First the log-probs of both answers under the model that training starts from, then a short training: 16 steps of 16
# pairs, of which 12 are selected in each. The learning rate is ten times that of `scripts/dama_tiny.sh`, so that a few
# steps show an effect.

# %%
model = ["--model", SFT, "--model_max_length", 512]
run("reference", *data, *model, "--device", "cpu", "--workers", 0, "--out", OUT / "reference")

# %%
flags = {"hardness": OUT / "hardness", "reference": OUT / "reference", "use_cpu": True, "pair_log": True,
         "per_device_train_batch_size": 16, "learning_rate": 1e-4, "lr_scheduler_type": "cosine", "num_train_epochs": 2,
         "logging_steps": 4, "save_strategy": "no", "report_to": "none"}  # fmt: skip
run(
    "train",
    *data,
    *model,
    *(word for name, value in flags.items() for word in (f"--{name}", value)),
    "--out",
    OUT / "dama",
)

# %% [markdown]
# ## How beta varies
# `--pair_log True` writes R, alpha_D, beta and the selection of every pair in every step. Left: the reward gap R of all
# pairs with its running mean R_bar; pairs far from it are rarely selected (hollow). Right: beta of each pair. Its
# spread within a step is alpha_D, the data-aware part; its drift over steps is alpha_M, the model-aware part.

# %%
rows = [json.loads(line) for line in (OUT / "dama/pair_log.jsonl").read_text().splitlines()]
steps = sorted({row["step"] for row in rows})
R_bar = [0.0]
for step in steps[:-1]:
    selected = [row["R"] for row in rows if row["step"] == step and row["selected"]]
    R_bar.append(update_R_bar(R_bar[-1], sum(selected) / len(selected), gamma=0.9))

figure, (left, right) = plt.subplots(1, 2, figsize=(11, 3.8))
for kind, color in KINDS.items():
    own = [row for row in rows if row["id"].startswith(kind)]
    faces = [color if row["selected"] else "none" for row in own]
    for axes, name in ((left, "R"), (right, "beta")):
        axes.scatter([row["step"] for row in own], [row[name] for row in own], s=16, edgecolors=color, facecolors=faces)
        axes.scatter([], [], s=16, color=color, label=kind)
left.plot(steps, R_bar, color="black", label="R_bar")
left.legend(fontsize=8)
right.axhline(0.1, color="black", linestyle="--", label="beta of plain DPO")
left.set(xlabel="step", ylabel="R")
right.set(xlabel="step", ylabel="beta")
right.legend(fontsize=8)
plt.show()

# %% [markdown]
# ## Before and after
# The same scenes, captioned by the aligned model. None of them is among the pairs.

# %%
after = captions_of(OUT / "dama")
changed = [image for image in images if before[image] != after[image]]
display(gallery(changed[:5], {"before": before, "after": after}))


# %%
def score(captions: dict[str, str]) -> Score:
    """Object HalBench's metrics by rules, against what is drawn."""
    answers = [Answer(image, image, "", text) for image, text in captions.items()]
    return score_captions(answers, {image: scene_of(image).categories for image in captions}, vocabulary())


print(format_table({"before": score(before), "after": score(after)}))  # noqa: T201

# %% [markdown]
# So few scenes leave wide intervals. `bash scripts/dama_tiny.sh` trains on all 1,500 pairs, compares with plain DPO on
# 300 scenes, and writes a report; `python -m playground.tinycoco study` repeats it over learning rates and seeds.
# There, at equal recall, DAMA and plain DPO do not differ clearly.
