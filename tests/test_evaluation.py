"""The numbers of jaxdiff.evaluation against closed forms, SciPy and brute force."""

import itertools

import numpy as np
import pytest
import scipy.linalg

from jaxdiff.data.source import Record
from jaxdiff.evaluation import agreement, distances, estimates, groups, originality, spread
from jaxdiff.evaluation.distances import block_moments, frechet_distance, frechet_limit, kernel_distance, moments
from jaxdiff.evaluation.estimates import BLOCKS

RNG = np.random.default_rng(0)


def covariance(width: int, rank: int, seed: int) -> np.ndarray:
    a = np.random.default_rng(seed).standard_normal((width, rank))
    return a @ a.T / rank


# --- distances between sets


def test_frechet_of_gaussians_that_commute():
    """tr(A + B - 2 (AB)^(1/2)) of diagonal matrices is the sum of (√a - √b)²; rounding of sums of float64."""
    a, b, mean = np.array([1.0, 4.0, 9.0]), np.array([4.0, 4.0, 1.0]), np.array([1.0, -2.0, 0.5])
    found = frechet_distance(mean, np.diag(a), np.zeros(3), np.diag(b))
    assert found == pytest.approx(mean @ mean + ((np.sqrt(a) - np.sqrt(b)) ** 2).sum(), rel=1e-12)


@pytest.mark.parametrize("width", [2, 7, 30])
def test_frechet_as_scipys_root_gives_it(width):
    x, y = covariance(width, 2 * width, 1), covariance(width, 3 * width, 2)
    reference = np.trace(x + y - 2 * scipy.linalg.sqrtm(x @ y).real)
    assert frechet_distance(np.zeros(width), x, np.zeros(width), y) == pytest.approx(reference, rel=1e-9)


def test_frechet_of_singular_covariances():
    """Of fewer images than features have numbers; the trace of the root is the sum of singular values of Xᵀ Y."""
    a, b = RNG.standard_normal((20, 5)), RNG.standard_normal((20, 4))
    reference = np.trace(a @ a.T) + np.trace(b @ b.T) - 2 * np.linalg.svd(a.T @ b, compute_uv=False).sum()
    # a root of eigenvalues known to 1e-16 of the largest one is known to 1e-8 of its root
    assert frechet_distance(np.zeros(20), a @ a.T, np.zeros(20), b @ b.T) == pytest.approx(reference, abs=1e-5)
    assert frechet_distance(np.zeros(20), a @ a.T, np.zeros(20), a @ a.T) == pytest.approx(0, abs=1e-5)


def test_moments_of_chunks_are_those_of_all():
    x, numbers = RNG.standard_normal((50, 4)) + 3, RNG.integers(0, 3, 50)
    chunks = ((x[i : i + 7], numbers[i : i + 7]) for i in range(0, 50, 7))
    found = block_moments(chunks, 3)
    assert [m.size for m in found] == np.bincount(numbers).tolist()
    mean, cov = distances.gaussian(distances.combine(found))
    np.testing.assert_allclose(mean, x.mean(0), rtol=1e-12)
    np.testing.assert_allclose(cov, np.cov(x.T), rtol=1e-10, atol=1e-12)


def test_halves_of_uneven_blocks_hold_equally_many():
    """Eighteen prompts make blocks of one and of two: either half of the blocks still holds nine."""
    numbers = estimates.blocks(np.repeat(np.arange(18), 2))
    assert (numbers < BLOCKS // 2).sum() == 18
    assert set(np.bincount(numbers)) == {2, 4}


def in_blocks(x: np.ndarray) -> list[distances.Moments]:
    return [moments(part) for part in np.array_split(x, BLOCKS)]


@pytest.fixture(scope="module")
def repeated():
    """60 pairs of samples of two Gaussians, in blocks, and their true distance."""
    rng, width, size, shift = np.random.default_rng(3), 5, 120, 0.3
    pairs = [
        (in_blocks(rng.standard_normal((size, width)) + shift), in_blocks(rng.standard_normal((size, width))))
        for _ in range(60)
    ]
    return pairs, width * shift**2


def test_the_limit_has_no_bias(repeated):
    """The mean over many samples is within 4 standard errors of the truth; that of the plain distance is far above."""
    pairs, truth = repeated
    for distance, biased in ((distances.frechet_of, True), (frechet_limit, False)):
        found = np.array([distance(x, y) for x, y in pairs])
        error = found.std(ddof=1) / np.sqrt(len(found))
        assert (abs(found.mean() - truth) > 8 * error) == biased
        assert (abs(found.mean() - truth) < 4 * error) != biased


def test_the_error_of_a_distance_is_its_spread(repeated):
    """The jackknife's errors against the deviation over samples; each is known to a tenth."""
    pairs, _ = repeated
    found = [distances.frechet_estimates(x, y) for x, y in pairs[:30]]
    for name in ("frechet", "frechet_limit"):
        spread = np.std([f[name][0] for f in found], ddof=1)
        assert 0.6 < np.mean([f[name][1] for f in found]) / spread < 1.8


@pytest.mark.parametrize("sizes", [[10] * 11, [20] * 6 + [10] * 6])
def test_the_limit_of_unequal_halves(sizes, monkeypatch):
    """Eleven blocks, as when one is left out, or blocks of unequal size: exact where the distance is a + b / N."""
    blocks = [distances.Moments(n, np.zeros(1), np.zeros((1, 1))) for n in sizes]
    monkeypatch.setattr(distances, "frechet_of", lambda x, y: 2.0 + 30.0 / sum(m.size for m in x))
    assert frechet_limit(blocks, blocks) == pytest.approx(2.0, rel=1e-12)


def brute_mmd(x, y, bandwidth):
    def k(a, b):
        return np.exp(-((a - b) ** 2).sum() / (2 * bandwidth**2))

    own = [np.mean([k(a, b) for a, b in itertools.permutations(z, 2)]) for z in (x, y)]
    return sum(own) - 2 * np.mean([k(a, b) for a, b in itertools.product(x, y)])


@pytest.mark.parametrize("rows", [4, 1000])
def test_kernel_distance_by_brute_force(rows, monkeypatch):
    """However many rows are compared at a time."""
    monkeypatch.setattr(distances, "ROWS", rows)
    x, y = RNG.standard_normal((9, 3)), RNG.standard_normal((11, 3)) + 0.5
    assert kernel_distance(x, y, 1.5) == pytest.approx(brute_mmd(x, y, 1.5), rel=1e-10)
    numbers = np.arange(9) % 4, np.arange(11) % 4
    value, error = distances.kernel_estimate(x, y, *numbers, 1.5)
    assert value == pytest.approx(brute_mmd(x, y, 1.5), rel=1e-10)
    without = [brute_mmd(x[numbers[0] != b], y[numbers[1] != b], 1.5) for b in range(4)]
    assert error == pytest.approx(np.sqrt(3 / 4 * ((without - np.mean(without)) ** 2).sum()), rel=1e-8)


@pytest.mark.parametrize("shift", [0.0, 0.4])
def test_kernel_distance_has_no_bias(shift):
    """E k of Gaussians of variances that add up to v is (σ² / (σ² + v))^(D / 2) exp(-|m|² / 2 (σ² + v))."""
    width, bandwidth, rng = 3, 2.0, np.random.default_rng(5)
    spread = (bandwidth**2 / (bandwidth**2 + 2)) ** (width / 2)
    truth = 2 * spread * (1 - np.exp(-width * shift**2 / (2 * (bandwidth**2 + 2))))
    found = [
        kernel_distance(rng.standard_normal((12, width)) + shift, rng.standard_normal((15, width)), bandwidth)
        for _ in range(400)
    ]
    error = np.std(found, ddof=1) / np.sqrt(len(found))
    assert abs(np.mean(found) - truth) < 4 * error
    assert spread * (1 / 12 + 1 / 15) / 2 > 8 * error  # about what the biased estimator would be off by


# --- agreement


def test_scores_are_cosines():
    x, y = RNG.standard_normal((6, 4)), RNG.standard_normal((6, 4))
    reference = [a @ b / np.linalg.norm(a) / np.linalg.norm(b) for a, b in zip(x, y, strict=True)]
    np.testing.assert_allclose(agreement.clip_scores(3 * x, 0.1 * y), reference, rtol=1e-12)


def test_ranks_by_brute_force(monkeypatch):
    monkeypatch.setattr(agreement, "ROWS", 5)
    images, prompts, own = RNG.standard_normal((12, 4)), RNG.standard_normal((7, 4)), RNG.integers(0, 7, 12)
    cosines = np.array([[a @ b / np.linalg.norm(a) / np.linalg.norm(b) for b in prompts] for a in images])
    reference = [1 + sum(row > row[i]) for row, i in zip(cosines, own, strict=True)]
    assert agreement.prompt_ranks(images, prompts, own).tolist() == reference


def test_prompts_that_score_alike_share_their_ranks():
    """An encoder that gives all prompts one vector is no better than chance."""
    prompts = np.tile([[1.0, 2.0, 3.0]], (5, 1)) * (1 + 1e-8 * RNG.standard_normal((5, 3)))  # alike but for rounding
    ranks = agreement.prompt_ranks(np.ones((2, 3)), prompts, np.array([0, 4]))
    assert ranks.tolist() == [3.0, 3.0]


# --- variety


@pytest.mark.parametrize("rows", [3, 512])
def test_variety_by_brute_force(rows, monkeypatch):
    """However many rows are compared at a time."""
    monkeypatch.setattr(spread, "ROWS", rows)
    x, groups = RNG.standard_normal((10, 3)), np.array([0, 0, 0, 5, 5, 2, 2, 2, 2, 9])
    means = [np.mean([np.linalg.norm(a - b) for a, b in itertools.combinations(x[groups == g], 2)]) for g in (0, 2, 5)]
    found = spread.variety(x, groups)
    assert found.estimate.value == pytest.approx(np.mean(means), rel=1e-12)
    assert found.estimate.error == pytest.approx(np.std(means, ddof=1) / np.sqrt(3), rel=1e-9)
    assert (found.groups, found.estimate.images) == (3, 9)


def test_no_variety():
    assert spread.variety(np.ones((4, 3)), [0, 0, 1, 1]).estimate.value == 0
    assert spread.variety(np.ones((2, 3)), [0, 1]) is None


class Listed:
    """A source of (name, captions, metadata)."""

    def __init__(self, *rows) -> None:
        self.rows = rows

    def read(self, index, image=True):
        name, captions, extras = self.rows[index]
        return Record(name, b"", captions, extras)


def test_real_images_that_belong_together():
    """By caption or column; what is empty groups nothing, and an image that is repeated counts once."""
    rows = [("a", ("A cat",), {"kind": "x"}), ("b", ("a  cat", ""), {"kind": ""}), ("c", ("",), {"kind": ""})]
    source = Listed(*rows, ("d", ("",), {"kind": "x"}), ("e", ("dog",), {}), ("e", ("dog",), {}))
    assert [g.tolist() for g in groups.real_groups(source, np.arange(6))] == [[0, 1]]
    assert [g.tolist() for g in groups.real_groups(source, np.arange(6), "kind")] == [[0, 3]]


# --- originality


@pytest.mark.parametrize("rows", [4, originality.ROWS])
def test_nearest_by_brute_force(rows, monkeypatch):
    """Over chunks of any size, an empty one among them, and far from the origin; the queries in parts or at once."""
    monkeypatch.setattr(originality, "ROWS", rows)
    x, y = RNG.standard_normal((9, 5)) + 40, RNG.standard_normal((31, 5)) + 40
    every = np.linalg.norm(x[:, None] - y, axis=-1)
    for cuts in ([], [4], [0, 10, 10, 30]):
        apart, numbers = originality.nearest(x, np.split(y, cuts))
        assert numbers.tolist() == every.argmin(1).tolist()
        np.testing.assert_allclose(apart, every.min(1), rtol=1e-12)


def test_nearest_of_nothing():
    apart, numbers = originality.nearest(np.ones((2, 3)), [])
    assert (apart.tolist(), numbers.tolist()) == ([np.inf] * 2, [-1, -1])


def test_chunks_are_not_held():
    """Each chunk is free again before the one after the next is asked for."""
    import weakref

    alive: list[weakref.ref] = []

    def chunks():
        for _ in range(6):
            assert sum(ref() is not None for ref in alive) <= 1
            chunk = RNG.standard_normal((4, 3))
            alive.append(weakref.ref(chunk))
            yield chunk
            del chunk

    originality.nearest(np.ones((2, 3)), chunks())
    assert len(alive) == 6


def test_copies_are_told_from_new_images():
    """Exact copies have ratio 0, near ones are below NEAR_COPY, and of new images few are."""
    rng = np.random.default_rng(7)
    train, held_out, new = (rng.standard_normal((n, 8)) for n in (300, 100, 100))
    near = train[:20] + 0.02 * rng.standard_normal((20, 8))
    (usual, _), (apart, numbers) = (
        originality.nearest(x, [train]) for x in (held_out, np.concatenate([train[:20], near, new]))
    )
    ratios = originality.distance_ratios(apart, usual)
    assert ratios[:20].tolist() == [0] * 20
    assert (ratios[20:40] < originality.NEAR_COPY).all()
    assert numbers[:40].tolist() == [*range(20), *range(20)]
    assert (ratios[40:] < originality.NEAR_COPY).mean() < 0.05
    assert np.median(ratios[40:]) == pytest.approx(1, abs=0.15)  # the median of 100 errs by about a twentieth here


def test_held_out_images_that_are_training_images():
    with pytest.raises(ValueError, match="hold others out"):
        originality.distance_ratios(np.ones(2), np.zeros(3))


# --- errors


def test_images_of_one_prompt_do_not_count_as_independent():
    """The same value four times a prompt is as sure as once."""
    values = RNG.standard_normal(10)
    once = estimates.mean_estimate(values)
    four = estimates.mean_estimate(np.repeat(values, 4), np.repeat(np.arange(10), 4))
    assert once.error == pytest.approx(values.std(ddof=1) / np.sqrt(10), rel=1e-12)
    assert (four.value, four.error) == (pytest.approx(once.value), pytest.approx(once.error))
    assert four.images == 40


def test_error_of_a_single_image():
    assert estimates.mean_estimate(np.ones(1)) == (1.0, None, 1)
    assert estimates.median_estimate(np.ones(1), np.zeros(1)) == (1.0, None, 1)


def test_error_of_a_median():
    """That of N normal numbers is about sqrt(π / 2N); a bootstrap of one sample knows it to a third or so."""
    errors = [estimates.median_estimate(RNG.standard_normal(200), np.arange(200)).error for _ in range(8)]
    assert np.mean(errors) == pytest.approx(np.sqrt(np.pi / 400), rel=0.4)


def test_blocks_hold_whole_groups():
    groups = np.repeat(np.arange(30), 3)
    numbers = estimates.blocks(groups)
    assert sorted(set(numbers.tolist())) == list(range(BLOCKS))
    assert all(len(set(numbers[groups == g].tolist())) == 1 for g in range(30))
    few = estimates.blocks(np.repeat([0, 1], 20))  # too few groups: each image by itself
    assert np.bincount(few).min() >= 40 // BLOCKS


def test_jackknife_of_a_mean_is_its_standard_error():
    x = RNG.standard_normal(BLOCKS)
    value, error = estimates.jackknife(lambda kept: float(x[list(kept)].mean()))
    assert value == pytest.approx(x.mean())
    assert error == pytest.approx(x.std(ddof=1) / np.sqrt(BLOCKS), rel=1e-9)
