"""All measures of a set of images, as rows of the report."""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from jaxdiff.evaluation.agreement import clip_scores, prompt_ranks
from jaxdiff.evaluation.distances import CMMD_SCALE, block_moments, frechet_estimates, kernel_estimate, unit
from jaxdiff.evaluation.estimates import BLOCKS, Estimate, blocks, mean_estimate, median_estimate
from jaxdiff.evaluation.features import Features, pixel_values
from jaxdiff.evaluation.originality import NEAR_COPY, distance_ratios, nearest
from jaxdiff.evaluation.spread import variety

MIN_IMAGES = 2 * BLOCKS  # images of each set that a distance needs: two a block


class EncodedImages(NamedTuple):
    """Images with the features of an encoder."""

    features: np.ndarray  # [N, D]
    pixels: np.ndarray  # uint8 [N, K], small images
    texts: np.ndarray  # [P, D], of their distinct prompts
    prompt_index: np.ndarray  # int [N], index of each image's prompt
    truncated: int = 0  # number of prompts truncated by the encoder


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


def agreement(
    drawn: EncodedImages, held_out: EncodedImages | None
) -> tuple[list[Row], list[str], np.ndarray, np.ndarray]:
    """Rows and notes of the agreement with prompts, and each image's CLIP score [N] and rank of its prompt [N]."""
    scores = clip_scores(drawn.features, drawn.texts[drawn.prompt_index])
    ranks = prompt_ranks(drawn.features, drawn.texts, drawn.prompt_index)
    real = None
    if held_out is not None:
        real = mean_estimate(
            clip_scores(held_out.features, held_out.texts[held_out.prompt_index]), held_out.prompt_index
        )
    meaning = "cosine of image and own prompt, mean; higher is better"
    rows, notes = [Row("agreement", "clip_score", mean_estimate(scores, drawn.prompt_index), real, meaning)], []
    count = len(drawn.texts)
    if drawn.truncated:
        notes.append(f"The encoder truncates {drawn.truncated} of the {count} prompts: their ends do not count.")
    if count < 2:
        notes.append("All images have the same prompt, so it cannot be ranked against others.")
        return rows, notes, scores, ranks
    chance = np.mean(1 / np.arange(1, count + 1))
    rows += [
        Row("agreement", "rank_1", mean_estimate(ranks == 1, drawn.prompt_index), None,
            f"share of images that match their own prompt best, of {count} prompts; chance {1 / count:.3g}"),
        Row("agreement", "reciprocal_rank", mean_estimate(1 / ranks, drawn.prompt_index), None,
            f"1 / rank of the own prompt, mean; chance {chance:.3g}"),
    ]  # fmt: skip
    return rows, notes, scores, ranks


def with_block_ids(features: Features, block_ids: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Chunks of features, each with its slice of `block_ids` [N]."""
    start = 0
    for chunk in features.chunks("features"):
        yield chunk, block_ids[start : start + len(chunk)]
        start += len(chunk)


def random_rows(count: int, max_rows: int, seed: int = 0) -> np.ndarray:
    """At most `max_rows` of 0 … count - 1, chosen at random, in ascending order."""
    return np.sort(np.random.default_rng(seed).permutation(count)[:max_rows])


def distances(
    drawn: EncodedImages, real: Features, held_out: EncodedImages | None, max_real: int
) -> tuple[list[Row], list[str]]:
    """Rows and notes: Fréchet and kernel distance of drawn images, and of held-out images, to real ones.

    Args:
        max_real: maximum number of real images for the kernel distance; the Fréchet distance uses all.
    """
    if min(len(drawn.features), len(real)) < MIN_IMAGES:
        return [], [f"Distances between sets need at least {MIN_IMAGES} images of each, better thousands: left out."]
    block_ids = blocks(np.arange(len(real)))
    moments, rows = block_moments(with_block_ids(real, block_ids), BLOCKS), random_rows(len(real), max_real)
    sample = unit(real.take("features", rows))

    def estimates(images: EncodedImages) -> dict[str, Estimate]:
        image_blocks = blocks(images.prompt_index)
        pairs = frechet_estimates(block_moments([(images.features, image_blocks)], BLOCKS), moments)
        value, error = kernel_estimate(unit(images.features), sample, image_blocks, blocks(rows))
        pairs["kernel"] = CMMD_SCALE * value, CMMD_SCALE * error
        return {name: Estimate(*pair, len(images.features)) for name, pair in pairs.items()}

    held_out_estimates = {} if held_out is None or len(held_out.features) < MIN_IMAGES else estimates(held_out)
    meanings = {
        "frechet": f"Fréchet distance to {len(real)} real images; too large where images are few",
        "frechet_limit": "the same for infinitely many images, extrapolated (Chong & Forsyth 2020); lower is better",
        "kernel": f"{CMMD_SCALE:g} MMD² to {len(rows)} real images, unbiased (Jayasumana et al. 2024); lower is better",
    }
    distance_rows = [
        Row("distance", name, estimate, held_out_estimates.get(name), meanings[name])
        for name, estimate in estimates(drawn).items()
    ]
    width, num_images = drawn.features.shape[1], min(len(drawn.features), len(real))
    notes = []
    if num_images < 4 * width:
        notes.append(
            f"Half of {num_images} images is less than twice the {width} dimensions of a feature: frechet_limit is not "
            "reliable with so few; compare by kernel, or draw more."
        )
    return distance_rows, notes


def varieties(
    drawn: EncodedImages, real: Features | None, groups: Sequence[np.ndarray], kind: str
) -> tuple[list[Row], list[str]]:
    """Rows and notes: how much images of one prompt differ, compared with real images of one group.

    Args:
        groups: for each group of real images, the indices of its members.
        kind: what the members of a group share.
    """
    drawn_variety = variety(unit(drawn.features), drawn.prompt_index)
    if drawn_variety is None:
        return [], ["Variety needs at least two images of a prompt: raise --num_images."]
    meaning = f"mean distance between two images of a prompt, over {drawn_variety.groups} prompts; in [0, 2]"
    if real is None or not groups:
        note = f"No two real images share a {kind}, so variety cannot be compared: name another --group."
        return [Row("variety", "distance", drawn_variety.estimate, None, meaning)], [] if real is None else [note]
    members = np.concatenate(groups)
    group_ids = np.repeat(np.arange(len(groups)), [len(g) for g in groups])
    real_variety = variety(unit(real.take("features", members)), group_ids)
    assert real_variety is not None
    a, b = drawn_variety.estimate, real_variety.estimate
    meaning += f"; real: two images of a {kind}, over {real_variety.groups}"
    rows = [Row("variety", "distance", a, b, meaning)]
    if b.value > 0:
        ratio = a.value / b.value
        errors = [(a.error or 0.0) / b.value, ratio * (b.error or 0.0) / b.value]
        estimate = Estimate(ratio, None if a.error is None else float(np.linalg.norm(errors)), a.images)
        rows.append(Row("variety", "ratio", estimate, None, "of the two; 1 is as varied as real images"))
    return rows, []


def find_nearest(
    images: EncodedImages,
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
    distances, rows = (np.stack(pair) for pair in zip(features, pixels, strict=True))
    ratios = (
        None if typical is None else np.stack([distance_ratios(a, t) for a, t in zip(distances, typical, strict=True)])
    )
    return Nearest(distances, rows, ratios)


def originality(
    drawn: EncodedImages,
    train: Features,
    held_out: EncodedImages | None,
    progress: Callable[[int], None] = lambda n: None,
) -> tuple[list[Row], list[str], Nearest]:
    """Rows and notes of originality, and each image's nearest training images; see `find_nearest`."""
    held_out_nearest = None if held_out is None else find_nearest(held_out, train, progress=progress)
    has_typical = held_out_nearest is not None and float(np.median(held_out_nearest.distances, 1).min()) > 0
    if held_out is None or held_out_nearest is None or not has_typical:
        nearest_train = find_nearest(drawn, train, progress=progress)
        meaning = "distance to the nearest training image, median"
        medians = [median_estimate(x, drawn.prompt_index) for x in nearest_train.distances]
        rows = [Row("originality", f"{k}_distance", m, None, meaning) for k, m in zip(KINDS, medians, strict=True)]
        note = "To detect near copies, distances of held-out images are needed: give --held_out_split."
        if held_out is not None:
            note = (
                "Half of the held-out images are training images, so near copies cannot be detected: hold out others."
            )
        return rows, [note], nearest_train
    typical = held_out_nearest.distances
    nearest_train = find_nearest(drawn, train, typical, progress)
    held_out_nearest = held_out_nearest._replace(ratios=np.stack([distance_ratios(a, a) for a in typical]))
    assert nearest_train.ratios is not None
    assert held_out_nearest.ratios is not None
    rows = []
    for kind, ratios, real in zip(KINDS, nearest_train.ratios, held_out_nearest.ratios, strict=True):
        meaning = f"distance to the nearest training image ({kind}) over that usual of held-out ones, median; 1 is new"
        median = median_estimate(ratios, drawn.prompt_index), median_estimate(real, held_out.prompt_index)
        copies, real_copies = ratios < NEAR_COPY, real < NEAR_COPY
        share = mean_estimate(copies, drawn.prompt_index), mean_estimate(real_copies, held_out.prompt_index)
        rows.append(Row("originality", f"{kind}_ratio", *median, meaning))
        rows.append(Row("originality", f"{kind}_near_copies", *share, f"share with a ratio below {NEAR_COPY}"))
    return rows, [], nearest_train
