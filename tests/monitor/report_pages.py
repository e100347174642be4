"""Runs for `mae-dist report`, as the real stages write them, and its page, examined."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import yaml

from mae_dist import config
from mae_dist.monitor import report
from mae_dist.run import layout

DASH = "\N{EN DASH}"
EVIL = '<script>alert("&")</script>'


def make_run(path: Path, verb: str = "pretrain", *overrides: str, num_steps: int = 40) -> Path:
    """A small run as the real stages write it: 128 images a step, 10 steps an epoch, 640 images a second."""
    always = [f"out={path}", "data.path=/data", "model.name=vit_p4_d128", "train.global_batch=128"]
    settings = config.load(verb, None, [*always, *overrides])
    path.mkdir(parents=True)
    head = {"format": layout.FORMAT, "verb": verb, "data_fingerprint": "abc"}
    head |= {"total_steps": config.total_steps(settings.train, 1280)}
    (path / "config.yaml").write_text(yaml.safe_dump(head, sort_keys=False) + config.dump(settings))
    same = {"kind": "step", "lr": 1e-3, "grad_norm": 0.5, "images_per_second": 640.0, "data_wait": 0.05}
    steps = range(1, num_steps + 1)
    write_lines(path / "metrics.jsonl", [{"step": step, "epoch": step / 10, "loss": 1 / step} | same for step in steps])
    return path


def write_lines(file: Path, lines: list[dict[str, Any]], cut: str = "") -> None:
    file.write_text("".join(json.dumps(line) + "\n" for line in lines) + cut)


def finish(path: Path, **numbers: Any) -> Path:
    (path / "result.json").write_text(json.dumps(numbers))
    return path


def render(*paths: Path, title: str = "A title") -> str:
    """The page, which is well-formed."""
    html = report.page(report.read(paths, title, "today"))
    Checker(html)
    return html


def text_of(html: str) -> str:
    """What a page says, without tags, with single spaces."""
    return " ".join(re.sub("<[^>]*>", " ", html).split())


def figures(html: str) -> list[tuple[str, ElementTree.Element]]:
    """The plots of a page with their titles, parsed as XML, in order."""
    found = [ElementTree.fromstring(f) for f in re.findall(r'<figure class="plot.*?</figure>', html, re.DOTALL)]
    return [((figure.findtext("figcaption") or "").strip(), figure) for figure in found]


class Checker(HTMLParser):
    """Holds open tags against closing ones, and collects every address that a browser would load."""

    VOID = ("meta", "img", "br", "input")

    def __init__(self, html: str):
        super().__init__()
        self.open: list[str] = []
        self.tags: set[str] = set()
        self.addresses: list[str] = []
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.addresses += [value or "" for name, value in attrs if name in ("src", "href", "srcset", "action", "data")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        self.handle_endtag(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag
