"""The report: nothing from outside, text escaped, marks in place, best values, plots, Markdown and its files."""

from __future__ import annotations

import base64
import io
import re
from dataclasses import replace
from html.parser import HTMLParser

import pytest
from PIL import Image

from dama.report import (
    GalleryItem,
    Hardness,
    MarkedCaption,
    Metric,
    Report,
    cut_at_spans,
    encode_picture,
    escape_markdown,
    render_html,
    render_markdown,
    write_report,
)

ATTACK = '<script>alert("x")</script><img src=x onerror=alert(1)>'

PLOTS = dict(
    hardness=Hardness({"sampled": [0.0, 0.1, 0.2], "edit": [0.05]}, 0.0875),
    curves={
        "DPO": [{"step": 1, "loss": 0.69}, {"step": 2, "loss": 0.5}, {"step": 2, "train_runtime": 3.0}],
        "DAMA": [{"step": 1, "loss": 0.69, "R_bar": 0.0}, {"step": 2, "loss": 0.6, "R_bar": 0.2}],
    },
)


def small_report(**changes):
    report = Report(
        title="Before and after",
        how_to_read="Lower is better.",
        metrics={
            "rate": Metric("Rate", "lower", unit="%"),
            "recall": Metric("Recall", "higher"),
            "words": Metric("Words"),
        },
        results={
            "SFT": {"rate": (58.3, 52.0, 64.0), "recall": (90.0, 88.0, 92.0), "words": (30.0, 29.0, 31.0)},
            "DAMA": {"rate": (21.2, 16.0, 26.0), "recall": (None, None, None), "words": (26.0, 25.0, 27.0)},
        },
        provenance={"Command": "bash run.sh"},
        gallery=[
            GalleryItem(
                Image.new("RGB", (8, 8), "red"),
                "Describe.",
                [MarkedCaption("SFT", "A dog and a car.", [(2, 5, "hallucinated"), (12, 15, "correct")])],
            )
        ],
    )
    return replace(report, **changes)


class Page(HTMLParser):
    """Every start tag with its attributes, and the text of every <mark>; unbalanced tags raise."""

    def __init__(self, html):
        super().__init__()
        self.tags, self.marks, self.open = [], [], []
        self.feed(html)
        assert not self.open, self.open

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, tag

    def handle_data(self, data):
        if self.open and self.open[-1] == "mark":
            self.marks.append((dict(self.tags[-1][1])["class"], data))


def test_page_is_balanced_and_takes_nothing_from_outside():
    page = Page(render_html(small_report(**PLOTS)))
    assert not {"script", "link", "iframe", "object"} & {tag for tag, _ in page.tags}
    for _, attributes in page.tags:
        for name in ("src", "href", "xlink:href"):
            assert attributes.get(name, "#").startswith(("#", "data:image/"))
        assert not any(name.startswith("on") for name in attributes)
    outside = re.findall(r'(?:url\(|@import)\s*["\']?(?!#)[^)]*', render_html(small_report(**PLOTS)))
    assert outside == []


def test_ids_on_the_page_are_unique():
    ids = [attributes["id"] for _, attributes in Page(render_html(small_report(**PLOTS))).tags if "id" in attributes]
    assert ids and len(ids) == len(set(ids))


def test_objects_are_marked_in_place():
    page = Page(render_html(small_report()))
    assert page.marks[2:] == [("hallucinated", "dog"), ("correct", "car")]
    assert "1 of 2 wrong" in render_html(small_report())


def test_text_of_every_kind_is_escaped():
    """The attack in each text field: no tag of it arrives in the page, in Markdown only as visible text."""
    report = small_report(
        title=ATTACK,
        how_to_read=ATTACK,
        metrics={"rate": Metric(ATTACK, unit=ATTACK)},
        results={ATTACK: {"rate": (1.0, 0.0, 2.0)}},
        provenance={ATTACK: ATTACK},
        notes=[ATTACK],
        gallery=[
            GalleryItem(
                Image.new("RGB", (8, 8)), ATTACK, [MarkedCaption(ATTACK, ATTACK, [(0, len(ATTACK), "hallucinated")])]
            )
        ],
        hardness=Hardness({ATTACK: [0.0, 1.0]}, 0.5),
        curves={ATTACK: [{"step": 1, "loss": 0.6}]},
        panels={"loss": ATTACK, "absent": "x"},
    )
    html = render_html(report)
    assert "<script" not in html and "<img src=x" not in html
    assert Page(html).marks[-1] == ("hallucinated", ATTACK)
    markdown, _ = render_markdown(report, "files")
    assert "<script" not in markdown and "<img" not in markdown


def test_best_value_in_the_better_direction_only():
    """Rate: 21.2 is the lowest. Recall: one model defined, nothing to compare. Words: no direction."""
    html = render_html(small_report())
    assert re.findall(r'class="best"><span class="value">([^<]+)<', html) == ["21.2"]
    assert '<span class="value">n/a</span>' in html
    assert "[16.0, 26.0]" in html


def test_ties_at_the_shown_precision_are_both_best():
    results = {"a": {"rate": (10.04, 9, 11)}, "b": {"rate": (10.01, 9, 11)}, "c": {"rate": (12, 11, 13)}}
    html = render_html(small_report(metrics={"rate": Metric("Rate", "lower")}, results=results))
    assert html.count('class="best"') == 2


def test_bar_on_paper():
    """Column from 10 to 30: [15, 20, 25] begins 25 % from the left, ends 25 % from the right, its dot at 50 %."""
    results = {"a": {"rate": (20, 15, 25)}, "b": {"rate": (20, 10, 30)}}
    html = render_html(small_report(metrics={"rate": Metric("Rate")}, results=results))
    assert '<i style="left:25.0%;right:25.0%"></i><b style="left:50.0%"></b>' in html


def test_missing_or_unknown_metric_is_refused():
    report = small_report(results={"SFT": {"rate": (1, 0, 2), "speed": (1, 0, 2)}})
    with pytest.raises(ValueError, match=r"results of 'SFT': expected the metrics \['rate', 'recall', 'words'\]"):
        render_html(report)


def test_plots_follow_the_theme_and_name_who_did_not_log():
    html = render_html(small_report(**PLOTS))
    assert html.count("<svg") == 3  # delta, loss, R_bar; nothing logged accuracy, margins or alpha_M
    assert "stroke: var(--series-0)" in html and "#2f6fb7" not in html.split("</style>")[1]
    assert "Not logged: DPO." in html
    assert "sampled (3)" in html and "mean 0.0875" in html


def test_the_same_report_makes_the_same_bytes():
    assert render_html(small_report(**PLOTS)) == render_html(small_report(**PLOTS))
    assert render_markdown(small_report(**PLOTS), "f") == render_markdown(small_report(**PLOTS), "f")


def test_a_bare_report_has_a_table_and_nothing_else():
    bare = small_report(gallery=[], hardness=Hardness({"sampled": []}, 0.0), curves={}, provenance={})
    assert "<h2" not in render_html(bare)
    assert "##" not in render_markdown(bare, "files")[0]


def test_names_with_dollars_and_underscores_are_drawn_as_they_are():
    report = small_report(curves={"a$b$c_d": [{"step": 1, "loss": 0.6}], "_hidden": [{"step": 1, "loss": 0.5}]})
    assert "a$b$c_d" in render_html(report)


def test_written_files_belong_together(tmp_path):
    html, markdown = write_report(small_report(**PLOTS), tmp_path / "out")
    assert html.read_text(encoding="utf-8") == render_html(small_report(**PLOTS))
    sources = re.findall(r"!\[[^\]]*\]\(([^)]+)\)", markdown.read_text(encoding="utf-8"))
    assert len(sources) == 4
    for source in sources:
        Image.open(tmp_path / "out" / source).verify()
    assert {path.name for path in (tmp_path / "out" / "report_files").iterdir()} == {s.split("/")[1] for s in sources}


def test_markdown_table_and_marks():
    markdown, _ = render_markdown(small_report(), "files")
    assert "| | Rate, % ↓ | Recall ↑ | Words |\n|---|---:|---:|---:|\n" in markdown
    assert "| DAMA | **21.2** \\[16.0, 26.0\\] | n/a  | 26.0 \\[25.0, 27.0\\] |" in markdown
    assert "- SFT: A **dog** ✗ and a *car*." in markdown
    assert "> Describe." in markdown


@pytest.mark.parametrize(
    "text, shown",
    [
        ("a *b* _c_", r"a \*b\* \_c\_"),
        ("a|b\n\n# c", r"a\|b \# c"),
        ("<b> & [x](y)", r"&lt;b&gt; &amp; \[x\](y)"),
        ("`$x$`\\", r"\`\$x\$\`" + r"\\"),
    ],
)
def test_markdown_escapes(text, shown):
    assert escape_markdown(text) == shown


def test_cut_at_spans_on_paper():
    pieces = cut_at_spans("A dog, a car", [(9, 12, "correct"), (2, 5, "hallucinated")])
    assert pieces == [("A ", None), ("dog", "hallucinated"), (", a ", None), ("car", "correct")]
    assert cut_at_spans("", []) == []


@pytest.mark.parametrize("spans", [[(0, 3), (2, 4)], [(2, 2)], [(0, 9)], [(-1, 1)]])
def test_spans_that_do_not_fit_are_refused(spans):
    with pytest.raises(ValueError, match="is empty, overlaps another or leaves the text"):
        cut_at_spans("A dog", [(*span, "correct") for span in spans])


def test_unknown_kind_is_refused():
    with pytest.raises(ValueError, match="expected kind hallucinated or correct, got 'wrong'"):
        cut_at_spans("A dog", [(0, 1, "wrong")])


def test_drawings_stay_exact_and_photographs_become_small():
    drawing = Image.new("RGBA", (112, 112), (10, 20, 30, 255))
    content, kind = encode_picture(drawing)
    assert kind == "png"
    assert Image.open(io.BytesIO(content)).getpixel((5, 5)) == (10, 20, 30)
    content, kind = encode_picture(Image.effect_noise((2000, 1000), 80))
    assert kind == "jpg"
    assert Image.open(io.BytesIO(content)).size == (640, 320)
    embedded = re.search(r'src="data:image/png;base64,([^"]+)"', render_html(small_report())).group(1)
    assert Image.open(io.BytesIO(base64.b64decode(embedded))).size == (8, 8)


def test_a_warning_stands_above_every_number_on_the_page_and_in_markdown():
    warned = small_report(warning="Smoke run: it shows <nothing>.")
    page, markdown = render_html(warned), render_markdown(warned, "report")[0]
    assert page.index("Smoke run: it shows &lt;nothing&gt;.") < page.index("<table>")
    assert markdown.index("Smoke run: it shows") < markdown.index("58.3")
    assert 'role="note"' not in render_html(small_report())
    assert "****" not in render_markdown(small_report(), "report")[0]


def test_the_scale_of_a_bar_is_its_columns_range():
    """Rate: intervals from 16 to 64; recall: 88 to 92; words: 25 to 31. No scale where there is no bar."""
    scale = r'class="scale" aria-hidden="true"><span>(.*?)</span><span>(.*?)</span>'
    found = re.findall(scale, render_html(small_report()))
    assert found == [("16.0", "64.0"), ("88.0", "92.0"), ("25.0", "31.0"), ("16.0", "64.0"), ("25.0", "31.0")]
