"""All measures of a set of images, as rows of the report."""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from jaxdiff.evaluation.agreement import clip_scores, prompt_ranks
from jaxdiff.evaluation.distances import CMMD_SCALE, block_moments, frechet_estimates, kernel_estimate, unit
from jaxdiff.evaluation.estimates import BLOCKS, Estimate, blocks, mean_estimate, median_estimate
from jaxdiff.evaluation.features import Features, pixel_values
from jaxdiff.evaluation.originality import NEAR, distance_ratios, nearest
from jaxdiff.evaluation.spread import variety

LEAST = 2 * BLOCKS  # images of each set that a distance needs: two a block


class Measured(NamedTuple):
    """Images with the features of an encoder."""

    features: np.ndarray  # [N, D]
    pixels: np.ndarray  # uint8 [N, K], small images
    texts: np.ndarray  # [P, D], of their distinct prompts
    own: np.ndarray  # int [N], index of each image's prompt
    cut: int = 0  # number of prompts truncated by the encoder


class Row(NamedTuple):
    """A line of the report."""

    part: str
    name: str
    estimate: Estimate
    real: Estimate | None  # the same measure of held-out real images
    meaning: str


class Nearest(NamedTuple):
    """For each of N images the nearest training image, by features and by pixels."""

    distances: np.ndarray  # [2, N]
    rows: np.ndarray  # int [2, N], indices of training images
    ratios: np.ndarray | None  # [2, N], distances divided by typical ones; None without held-out images


KINDS = ("features", "pixels")


def agreement(drawn: Measured, held_out: Measured | None) -> tuple[list[Row], list[str], np.ndarray, np.ndarray]:
    """Rows and notes of the agreement with prompts, and each image's CLIP score [N] and rank of its prompt [N]."""
    scores = clip_scores(drawn.features, drawn.texts[drawn.own])
    ranks = prompt_ranks(drawn.features, drawn.texts, drawn.own)
    real = None
    if held_out is not None:
        real = mean_estimate(clip_scores(held_out.features, held_out.texts[held_out.own]), held_out.own)
    meaning = "cosine of image and own prompt, mean; higher is better"
    rows, notes = [Row("agreement", "clip_score", mean_estimate(scores, drawn.own), real, meaning)], []
    count = len(drawn.texts)
    if drawn.cut:
        notes.append(f"The encoder truncates {drawn.cut} of the {count} prompts: their ends do not count.")
    if count < 2:
        notes.append("All images have the same prompt, so it cannot be ranked against others.")
        return rows, notes, scores, ranks
    chance = np.mean(1 / np.arange(1, count + 1))
    rows += [
        Row("agreement", "rank_1", mean_estimate(ranks == 1, drawn.own), None,
            f"share of images that match their own prompt best, of {count} prompts; chance {1 / count:.3g}"),
        Row("agreement", "reciprocal_rank", mean_estimate(1 / ranks, drawn.own), None,
            f"1 / rank of the own prompt, mean; chance {chance:.3g}"),
    ]  # fmt: skip
    return rows, notes, scores, ranks


def numbered(features: Features, numbers: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Chunks of features, each with its part of `numbers` [N]."""
    start = 0
    for chunk in features.chunks("features"):
        yield chunk, numbers[start : start + len(chunk)]
        start += len(chunk)


def sample_of(count: int, most: int, seed: int = 0) -> np.ndarray:
    """At most `most` of 0 … count - 1, chosen at random, in ascending order."""
    return np.sort(np.random.default_rng(seed).permutation(count)[:most])


def distances(drawn: Measured, real: Features, held_out: Measured | None, most: int) -> tuple[list[Row], list[str]]:
    """Rows and notes: Fréchet and kernel distance of drawn images, and of held-out images, to real ones.

    Args:
        most: maximum number of real images for the kernel distance; the Fréchet distance uses all.
    """
    if min(len(drawn.features), len(real)) < LEAST:
        return [], [f"Distances between sets need at least {LEAST} images of each, better thousands: left out."]
    numbers = blocks(np.arange(len(real)))
    moments, rows = block_moments(numbered(real, numbers), BLOCKS), sample_of(len(real), most)
    some = unit(real.take("features", rows))

    def measured(images: Measured) -> dict[str, Estimate]:
        own = blocks(images.own)
        found = frechet_estimates(block_moments([(images.features, own)], BLOCKS), moments)
        value, error = kernel_estimate(unit(images.features), some, own, blocks(rows))
        found["kernel"] = CMMD_SCALE * value, CMMD_SCALE * error
        return {name: Estimate(*pair, len(images.features)) for name, pair in found.items()}

    others = {} if held_out is None or len(held_out.features) < LEAST else measured(held_out)
    meanings = {
        "frechet": f"Fréchet distance to {len(real)} real images; too large where images are few",
        "frechet_limit": "the same for infinitely many images, extrapolated (Chong & Forsyth 2020); lower is better",
        "kernel": f"{CMMD_SCALE:g} MMD² to {len(rows)} real images, unbiased (Jayasumana et al. 2024); lower is better",
    }
    found = [
        Row("distance", name, estimate, others.get(name), meanings[name]) for name, estimate in measured(drawn).items()
    ]
    width, fewest = drawn.features.shape[1], min(len(drawn.features), len(real))
    notes = []
    if fewest < 4 * width:
        notes.append(
            f"Half of {fewest} images is less than twice the {width} dimensions of a feature: frechet_limit is not "
            "reliable with so few; compare by kernel, or draw more."
        )
    return found, notes


def varieties(
    drawn: Measured, real: Features | None, groups: Sequence[np.ndarray], kind: str
) -> tuple[list[Row], list[str]]:
    """Rows and notes: how much images of one prompt differ, compared with real images of one group.

    Args:
        groups: for each group of real images, the indices of its members.
        kind: what the members of a group share.
    """
    found = variety(unit(drawn.features), drawn.own)
    if found is None:
        return [], ["Variety needs at least two images of a prompt: raise --num_images."]
    meaning = f"mean distance between two images of a prompt, over {found.groups} prompts; in [0, 2]"
    if real is None or not groups:
        missing = f"No two real images share a {kind}, so variety cannot be compared: name another --group."
        return [Row("variety", "distance", found.estimate, None, meaning)], [] if real is None else [missing]
    members = np.concatenate(groups)
    numbers = np.repeat(np.arange(len(groups)), [len(g) for g in groups])
    other = variety(unit(real.take("features", members)), numbers)
    assert other is not None
    a, b = found.estimate, other.estimate
    rows = [Row("variety", "distance", a, b, f"{meaning}; real: two images of a {kind}, over {other.groups}")]
    if b.value > 0:
        ratio = a.value / b.value
        errors = [(a.error or 0.0) / b.value, ratio * (b.error or 0.0) / b.value]
        error = None if a.error is None else float(np.linalg.norm(errors))
        rows.append(
            Row("variety", "ratio", Estimate(ratio, error, a.images), None, "of the two; 1 is as varied as real images")
        )
    return rows, []


def find_nearest(
    images: Measured,
    train: Features,
    typical: np.ndarray | None = None,
    progress: Callable[[int], None] = lambda n: None,
) -> Nearest:
    """The nearest training image of each image.

    Args:
        typical: distances [2, M] of held-out images, to compute ratios; None: no ratios.
        progress: called with the number of training images compared since the last call; each is compared twice.
    """

    def chunks(name: str, values: Callable[[np.ndarray], np.ndarray]) -> Iterator[np.ndarray]:
        for chunk in train.chunks(name):
            yield values(chunk)
            progress(len(chunk))

    features = nearest(unit(images.features), chunks("features", unit))
    pixels = nearest(pixel_values(images.pixels), chunks("pixels", pixel_values))
    apart, rows = (np.stack(pair) for pair in zip(features, pixels, strict=True))
    ratios = None if typical is None else np.stack([distance_ratios(a, t) for a, t in zip(apart, typical, strict=True)])
    return Nearest(apart, rows, ratios)


def originality(
    drawn: Measured, train: Features, held_out: Measured | None, progress: Callable[[int], None] = lambda n: None
) -> tuple[list[Row], list[str], Nearest]:
    """Rows and notes of originality, and each image's nearest training images; see `find_nearest`."""
    others = None if held_out is None else find_nearest(held_out, train, progress=progress)
    known = others is not None and float(np.median(others.distances, 1).min()) > 0
    if held_out is None or others is None or not known:
        found = find_nearest(drawn, train, progress=progress)
        far = "distance to the nearest training image, median"
        medians = [median_estimate(apart, drawn.own) for apart in found.distances]
        rows = [Row("originality", f"{k}_distance", m, None, far) for k, m in zip(KINDS, medians, strict=True)]
        note = "To detect near copies, distances of held-out images are needed: give --held_out_split."
        if held_out is not None:
            note = (
                "Half of the held-out images are training images, so near copies cannot be detected: hold out others."
            )
        return rows, [note], found
    usual = others.distances
    found = find_nearest(drawn, train, usual, progress)
    others = others._replace(ratios=np.stack([distance_ratios(a, a) for a in usual]))
    assert found.ratios is not None
    assert others.ratios is not None
    rows = []
    for kind, ratios, real in zip(KINDS, found.ratios, others.ratios, strict=True):
        how_far = f"distance to the nearest training image ({kind}) over that usual of held-out ones, median; 1 is new"
        median = median_estimate(ratios, drawn.own), median_estimate(real, held_out.own)
        share = mean_estimate(ratios < NEAR, drawn.own), mean_estimate(real < NEAR, held_out.own)
        rows.append(Row("originality", f"{kind}_ratio", *median, how_far))
        rows.append(Row("originality", f"{kind}_near_copies", *share, f"share with a ratio below {NEAR}"))
    return rows, [], found
