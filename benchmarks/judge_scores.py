"""The judge itself: images and what was asked for, to shares of right ones, beside those of real drawings."""

import functools
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageFilter

from benchmarks.judge_drawings import (
    DESIGNERS,
    GALLERIES,
    drawings_of,
    galleries,
    images_of,
    joined,
    named_like,
    read,
    rows,
    some,
    source_of,
)
from benchmarks.judge_features import Images, cached, features
from benchmarks.judge_measures import (
    Space,
    border_color,
    confusion,
    fit_space,
    nearest_color,
    ranks,
    scores,
    share,
    shuffled,
    spread,
)
from benchmarks.judge_probes import color_probe, histograms, style_probe
from benchmarks.judge_prompts import Request, styles, subjects
from jaxdiff.data.folder import BACKGROUNDS
from jaxdiff.evaluation.distances import unit

Measures = dict[str, dict]  # name -> {"model": share, "real": share, "floor": share}
LEARNED = ("noto", "fluent-flat")  # real drawings such as the model learned from, by other designers than the galleries
BLUR = 8  # pixels: the radius at which drawings are only blots of their colours


class Judge:
    """Measures images against the prompts that they were drawn for."""

    def __init__(self, data: Path) -> None:
        self.data = data
        self.subject = subjects()  # of each plain prompt
        self.prompt = {subject: prompt for prompt, subject in self.subject.items()}
        self.gallery = galleries()
        self.few = np.isin(self.gallery.subject, list(self.prompt))
        self.space = Space(
            **cached("space", [source_of(n)[:4] for n in GALLERIES], lambda: fit_space(*self.gallery[:2])._asdict())
        )
        self.designs = self.space(self.gallery.features)

    def __call__(self, kind: str, images: Images, wanted: Sequence[Request]) -> dict:
        """The measures of one kind of prompts, and what was taken for what."""
        seen = features(images)
        if kind == "variety":
            return {"measures": self.variety(seen, [request.thing for request in wanted])}
        report = self.things(seen, [request.thing for request in wanted], every=kind == "plain")
        if kind != "plain":
            found, real = getattr(self, kind)(seen, images)
            report["confusion"] = confusion([request.wanted for request in wanted], found)
            report["measures"] = {f"right {kind}": compared(found, wanted, real), **report["measures"]}
        return report

    def places(self, seen: np.ndarray, things: Sequence[str], every: bool) -> np.ndarray:
        """Rank of the right thing for each image, among the things of the plain prompts, or every thing drawn."""
        kept = np.ones(len(self.designs), bool) if every else self.few
        table, names = scores(self.space(seen), self.designs[kept], self.gallery.subject[kept])
        return ranks(table, names, [self.right(thing, names) for thing in things])

    def right(self, thing: str, names: Sequence[str]) -> frozenset[str]:
        """Those of the subjects that are right for a plain prompt."""
        return _right(thing, self.subject[thing], tuple(names))

    def things(self, seen: np.ndarray, things: Sequence[str], every: bool) -> dict:
        """Shares of images whose thing is right; with `every`, also by wider and simpler measures."""
        real, named = self.learned(set(things))
        floor, number = shuffled(things), len(self.prompt)

        def row(hit) -> dict[str, dict[str, float]]:
            return {
                "model": share(hit(seen, things), things),
                "real": share(hit(real, named), named),
                "floor": share(hit(seen, floor), floor),
            }

        measures = {f"right thing of {number}": row(lambda x, t: self.places(x, t, False) == 1)}
        report: dict = {"measures": measures}
        if every:
            subjects = len(set(self.gallery.subject))
            measures[f"right thing in the first 5 of {number}"] = row(lambda x, t: self.places(x, t, False) <= 5)
            measures[f"right thing of {subjects}"] = row(lambda x, t: self.places(x, t, True) == 1)
            measures[f"right thing of {number}, plain cosine"] = row(lambda x, t: self.plainly(x, t) == 1)
            report["galleries"] = self.held_out()
            report["blurred"] = self.blurred()
            report["taken_for"] = self.taken_for(seen, things)
        return report

    def plainly(self, seen: np.ndarray, things: Sequence[str]) -> np.ndarray:
        """Ranks by the cosine between features without their mean."""
        mean = self.gallery.features.mean(0)
        designs = unit(self.gallery.features[self.few] - mean)
        table, names = scores(unit(seen - mean), designs, self.gallery.subject[self.few])
        return ranks(table, names, [self.right(thing, names) for thing in things])

    def learned(self, things: set[str]) -> tuple[np.ndarray, list[str]]:
        """Features of real drawings of things that no gallery holds, and the things."""
        found = joined([drawings_of(name, list(self.prompt)) for name in LEARNED])
        kept = np.isin(found.subject, [self.subject[thing] for thing in things])
        return found.features[kept], [self.prompt[subject] for subject in found.subject[kept]]

    def held_out(self) -> dict[str, dict[str, float]]:
        """Share of each gallery's drawings that the other galleries recognise."""

        def of(name: str) -> dict[str, np.ndarray]:
            asked, others = self.few & (self.gallery.source == name), self.gallery.source != name
            space = fit_space(self.gallery.features[others], self.gallery.subject[others])
            designs, subjects = space(self.gallery.features[others & self.few]), self.gallery.subject[others & self.few]
            table, names = scores(space(self.gallery.features[asked]), designs, subjects)
            things = [self.prompt[subject] for subject in self.gallery.subject[asked]]
            return {"ranks": ranks(table, names, [self.right(thing, names) for thing in things])}

        made_of = (self.gallery.features.shape, sorted(self.prompt))
        found = {name: cached(f"without-{name}", made_of, lambda name=name: of(name))["ranks"] for name in GALLERIES}
        return {name: share(r == 1, [str(i) for i in range(len(r))]) for name, r in found.items()}

    def blurred(self) -> dict[str, float]:
        """Share of heavily blurred real drawings that are recognised."""

        def make() -> dict[str, np.ndarray]:
            images, subjects = images_of(LEARNED[0], list(self.prompt))
            blots = [np.asarray(Image.fromarray(i).filter(ImageFilter.GaussianBlur(BLUR))) for i in images]
            return {"features": features(np.stack(blots)), "subject": np.array(subjects)}

        found = cached("blurred", (BLUR, LEARNED[0], sorted(self.prompt)), make)
        things = [self.prompt[subject] for subject in found["subject"]]
        return share(self.places(found["features"], things, False) == 1, things)

    def taken_for(self, seen: np.ndarray, things: Sequence[str]) -> dict[str, list[str]]:
        """What the images of each plain prompt look like most, where that is something else."""
        table, names = scores(self.space(seen), self.designs[self.few], self.gallery.subject[self.few])
        found: dict[str, list[str]] = {}
        for thing, row in zip(things, table, strict=True):
            if (name := names[row.argmax()]) not in self.right(thing, names):
                found.setdefault(thing, []).append(name)
        return found

    def style(self, seen: np.ndarray, images: Images) -> tuple[list[str], dict]:
        """The styles that images are in; the share of real drawings for which that is found right."""
        probe, answers, found = style_probe(self.data, styles(), set(self.gallery.subject))
        return probe(seen), share(np.array(answers) == found, [str(i) for i in range(len(found))])

    def color(self, seen: np.ndarray, images: Images) -> tuple[list[str], dict]:
        """The colours that images have most of; the share of real drawings for which that is found right."""
        probe, answers, found = color_probe(self.data)
        return probe(histograms(images)), share(np.array(answers) == found, [str(i) for i in range(len(found))])

    def background(self, seen: np.ndarray, images: Images) -> tuple[list[str], dict]:
        """The colours of the backgrounds; the share of real drawings on coloured ones for which that is found right."""
        real = some([row for row in rows(self.data, "heldout_subjects") if row.style in styles()[:3]], 24)
        colors = [name for name in BACKGROUNDS if name != "white"]
        hits = [nearest_color(border_color(i), BACKGROUNDS) == c for c in colors for i in read(real, BACKGROUNDS[c])]
        names = [nearest_color(border_color(image), BACKGROUNDS) for image in images]
        return names, share(hits, [str(row.path) for _ in colors for row in real])

    def variety(self, seen: np.ndarray, things: Sequence[str]) -> Measures:
        """Mean distance between images of one prompt, over that between five designers' drawings of the thing."""
        designers = joined([drawings_of(n, () if n in GALLERIES else list(self.prompt)) for n in DESIGNERS])
        names = sorted(set(things))
        between = [spread(designers.features[designers.subject == self.subject[name]]) for name in names]
        within = [spread(seen[[thing == name for thing in things]]) for name in names]
        mean = float(np.mean(between))
        return {
            "variety": {
                "model": share(np.array(within) / mean, names),
                "real": share(np.array(between) / mean, names),
            }
        }


def compared(found: Sequence[str], wanted: Sequence[Request], real: dict) -> dict[str, dict[str, float]]:
    """Shares of images that are what was asked for, of real drawings, and of images under shuffled prompts."""
    asked, things = [request.wanted for request in wanted], [request.thing for request in wanted]

    def right(asked: Sequence[str]) -> dict[str, float]:
        return share([a == b for a, b in zip(asked, found, strict=True)], things)

    return {"model": right(asked), "real": real, "floor": right(shuffled(asked))}


@functools.cache
def _right(thing: str, subject: str, names: tuple[str, ...]) -> frozenset[str]:
    return frozenset(named_like(thing, subject, list(names)))
