"""The judge itself: shares of images that match their prompts, beside those of real drawings."""

import functools
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageFilter

from benchmarks.judge_drawings import (
    DESIGNERS,
    GALLERIES,
    concatenate,
    drawings_of,
    galleries,
    images_of,
    matching_subjects,
    read,
    rows,
    sample_rows,
    source_of,
)
from benchmarks.judge_features import Images, cached_arrays, features
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
# Real drawings of the kind that the model is trained on, by other designers than the galleries.
TRAINING_SETS = ("noto", "fluent-flat")
BLUR = 8  # pixels: the radius at which drawings are only blots of their colours


class Judge:
    """Measures images against the prompts that they were drawn for."""

    def __init__(self, data: Path) -> None:
        self.data = data
        self.subject = subjects()  # of each plain prompt
        self.prompt = {subject: prompt for prompt, subject in self.subject.items()}
        self.gallery = galleries()
        self.is_prompted = np.isin(self.gallery.subject, list(self.prompt))
        key = [source_of(name)[:4] for name in GALLERIES]
        self.space = Space(**cached_arrays("space", key, lambda: fit_space(*self.gallery[:2])._asdict()))
        self.designs = self.space(self.gallery.features)

    def __call__(self, kind: str, images: Images, requests: Sequence[Request]) -> dict:
        """The measures of one kind of prompts, and what was taken for what."""
        image_features = features(images)
        if kind == "variety":
            return {"measures": self.variety(image_features, [request.thing for request in requests])}
        report = self.things(image_features, [request.thing for request in requests], every=kind == "plain")
        if kind != "plain":
            predicted, real = getattr(self, kind)(image_features, images)
            report["confusion"] = confusion([request.attribute for request in requests], predicted)
            report["measures"] = {f"right {kind}": compare(predicted, requests, real), **report["measures"]}
        return report

    def subject_ranks(self, image_features: np.ndarray, things: Sequence[str], every: bool) -> np.ndarray:
        """Rank of the right thing for each image, among the things of the plain prompts, or every thing drawn."""
        selected = np.ones(len(self.designs), bool) if every else self.is_prompted
        table, names = scores(self.space(image_features), self.designs[selected], self.gallery.subject[selected])
        return ranks(table, names, [self.right(thing, names) for thing in things])

    def right(self, thing: str, names: Sequence[str]) -> frozenset[str]:
        """Those of the subjects that are right for a plain prompt."""
        return _right(thing, self.subject[thing], tuple(names))

    def things(self, image_features: np.ndarray, things: Sequence[str], every: bool) -> dict:
        """Shares of images whose thing is right; with `every`, also by wider and simpler measures."""
        real_features, real_things = self.training_drawings(set(things))
        shuffled_things, num_things = shuffled(things), len(self.prompt)

        def row(hit) -> dict[str, dict[str, float]]:
            return {
                "model": share(hit(image_features, things), things),
                "real": share(hit(real_features, real_things), real_things),
                "floor": share(hit(image_features, shuffled_things), shuffled_things),
            }

        measures = {f"right thing of {num_things}": row(lambda x, t: self.subject_ranks(x, t, False) == 1)}
        report: dict = {"measures": measures}
        if every:
            subjects = len(set(self.gallery.subject))
            measures[f"right thing in the first 5 of {num_things}"] = row(
                lambda x, t: self.subject_ranks(x, t, False) <= 5
            )
            measures[f"right thing of {subjects}"] = row(lambda x, t: self.subject_ranks(x, t, True) == 1)
            measures[f"right thing of {num_things}, plain cosine"] = row(lambda x, t: self.plain_ranks(x, t) == 1)
            report["galleries"] = self.held_out()
            report["blurred"] = self.blurred()
            report["taken_for"] = self.taken_for(image_features, things)
        return report

    def plain_ranks(self, image_features: np.ndarray, things: Sequence[str]) -> np.ndarray:
        """Ranks by the cosine between features without their mean."""
        mean = self.gallery.features.mean(0)
        designs = unit(self.gallery.features[self.is_prompted] - mean)
        table, names = scores(unit(image_features - mean), designs, self.gallery.subject[self.is_prompted])
        return ranks(table, names, [self.right(thing, names) for thing in things])

    def training_drawings(self, things: set[str]) -> tuple[np.ndarray, list[str]]:
        """Features of real drawings of things that no gallery holds, and the things."""
        drawings = concatenate([drawings_of(name, list(self.prompt)) for name in TRAINING_SETS])
        selected = np.isin(drawings.subject, [self.subject[thing] for thing in things])
        return drawings.features[selected], [self.prompt[subject] for subject in drawings.subject[selected]]

    def held_out(self) -> dict[str, dict[str, float]]:
        """Share of each gallery's drawings that the other galleries recognise."""

        def gallery_ranks(name: str) -> dict[str, np.ndarray]:
            queries, others = self.is_prompted & (self.gallery.source == name), self.gallery.source != name
            space = fit_space(self.gallery.features[others], self.gallery.subject[others])
            designs, subjects = (
                space(self.gallery.features[others & self.is_prompted]),
                self.gallery.subject[others & self.is_prompted],
            )
            table, names = scores(space(self.gallery.features[queries]), designs, subjects)
            things = [self.prompt[subject] for subject in self.gallery.subject[queries]]
            return {"ranks": ranks(table, names, [self.right(thing, names) for thing in things])}

        key = (self.gallery.features.shape, sorted(self.prompt))
        ranks_by_gallery = {
            name: cached_arrays(f"without-{name}", key, lambda name=name: gallery_ranks(name))["ranks"]
            for name in GALLERIES
        }
        return {name: share(r == 1, [str(i) for i in range(len(r))]) for name, r in ranks_by_gallery.items()}

    def blurred(self) -> dict[str, float]:
        """Share of heavily blurred real drawings that are recognised."""

        def compute() -> dict[str, np.ndarray]:
            images, subjects = images_of(TRAINING_SETS[0], list(self.prompt))
            blots = [np.asarray(Image.fromarray(i).filter(ImageFilter.GaussianBlur(BLUR))) for i in images]
            return {"features": features(np.stack(blots)), "subject": np.array(subjects)}

        arrays = cached_arrays("blurred", (BLUR, TRAINING_SETS[0], sorted(self.prompt)), compute)
        things = [self.prompt[subject] for subject in arrays["subject"]]
        return share(self.subject_ranks(arrays["features"], things, False) == 1, things)

    def taken_for(self, image_features: np.ndarray, things: Sequence[str]) -> dict[str, list[str]]:
        """What the images of each plain prompt look like most, where that is something else."""
        table, names = scores(
            self.space(image_features), self.designs[self.is_prompted], self.gallery.subject[self.is_prompted]
        )
        mistaken: dict[str, list[str]] = {}
        for thing, row in zip(things, table, strict=True):
            if (name := names[row.argmax()]) not in self.right(thing, names):
                mistaken.setdefault(thing, []).append(name)
        return mistaken

    def style(self, image_features: np.ndarray, images: Images) -> tuple[list[str], dict]:
        """The styles that images are in; the share of real drawings for which that is found right."""
        probe, answers, predicted = style_probe(self.data, styles(), set(self.gallery.subject))
        return probe(image_features), share(np.array(answers) == predicted, [str(i) for i in range(len(predicted))])

    def color(self, image_features: np.ndarray, images: Images) -> tuple[list[str], dict]:
        """The colours that images have most of; the share of real drawings for which that is found right."""
        probe, answers, predicted = color_probe(self.data)
        return probe(histograms(images)), share(np.array(answers) == predicted, [str(i) for i in range(len(predicted))])

    def background(self, image_features: np.ndarray, images: Images) -> tuple[list[str], dict]:
        """The colours of the backgrounds; the share of real drawings on coloured ones for which that is found right."""
        real = sample_rows([row for row in rows(self.data, "heldout_subjects") if row.style in styles()[:3]], 24)
        colors = [name for name in BACKGROUNDS if name != "white"]
        hits = [nearest_color(border_color(i), BACKGROUNDS) == c for c in colors for i in read(real, BACKGROUNDS[c])]
        names = [nearest_color(border_color(image), BACKGROUNDS) for image in images]
        return names, share(hits, [str(row.path) for _ in colors for row in real])

    def variety(self, image_features: np.ndarray, things: Sequence[str]) -> Measures:
        """Mean distance between images of one prompt, over that between five designers' drawings of the thing."""
        designers = concatenate([drawings_of(n, () if n in GALLERIES else list(self.prompt)) for n in DESIGNERS])
        names = sorted(set(things))
        between = [spread(designers.features[designers.subject == self.subject[name]]) for name in names]
        within = [spread(image_features[[thing == name for thing in things]]) for name in names]
        mean = float(np.mean(between))
        return {
            "variety": {
                "model": share(np.array(within) / mean, names),
                "real": share(np.array(between) / mean, names),
            }
        }


def compare(predicted: Sequence[str], requests: Sequence[Request], real: dict) -> dict[str, dict[str, float]]:
    """Shares of correct images, of correct real drawings, and of images correct under shuffled prompts."""
    expected, things = [request.attribute for request in requests], [request.thing for request in requests]

    def right(expected: Sequence[str]) -> dict[str, float]:
        return share([a == b for a, b in zip(expected, predicted, strict=True)], things)

    return {"model": right(expected), "real": real, "floor": right(shuffled(expected))}


@functools.cache
def _right(thing: str, subject: str, names: tuple[str, ...]) -> frozenset[str]:
    return frozenset(matching_subjects(thing, subject, list(names)))
