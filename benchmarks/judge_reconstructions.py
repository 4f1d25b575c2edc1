"""What a model's autoencoder loses: real drawings before and after it, judged and compared pixel by pixel."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

import jaxdiff
from benchmarks.judge_drawings import images_of, read, rows, some
from benchmarks.judge_features import Images, features
from benchmarks.judge_measures import share
from benchmarks.judge_probes import style_probe, styled
from benchmarks.judge_prompts import styles
from benchmarks.judge_scores import Judge

SOURCES = ("noto", "fluent-flat", "fluent-gradient", "fluent-3d")
COUNT, BATCH = 256, 16


def passed(model, params, images: Images) -> Images:
    """Images through the autoencoder and back, in batches of one size."""

    @jax.jit
    def there_and_back(params, x):
        return jnp.round(255 * jaxdiff.decode(model, params, jaxdiff.encode(model, params, x)))

    filled = np.concatenate([images, images[: -len(images) % BATCH]])
    parts = [there_and_back(params, filled[i : i + BATCH]) for i in range(0, len(filled), BATCH)]
    return np.concatenate(parts)[: len(images)].astype(np.uint8)


def psnr(first: Images, second: Images) -> np.ndarray:
    """Peak signal-to-noise ratio of each pair, in decibels: [N]."""
    error = np.mean((first.astype(np.float64) - second) ** 2, (1, 2, 3))
    return 10 * np.log10(255**2 / np.maximum(error, 1e-10))


def reconstructions(model, params, judge: Judge, data: Path) -> dict:
    """Right things before and after the autoencoder, by source; right styles and PSNR on unseen subjects, by style."""
    report: dict = {"things": {}, "styles": {}, "psnr": {}}
    for source in SOURCES:
        images, subjects = images_of(source, list(judge.prompt))
        prompts = [judge.prompt[subject] for subject in subjects]
        report["things"][source] = {
            name: share(judge.places(features(x), prompts, False) == 1, prompts)
            for name, x in (("originals", images), ("reconstructions", passed(model, params, images)))
        }
    subjects = set(judge.gallery.subject)
    probe, labels, found = style_probe(data, styles(), subjects)
    chosen = styled(data, "heldout_subjects", styles(), subjects)
    after = np.array(probe(features(passed(model, params, read(chosen)))))
    asked, before = np.array(labels), np.array(found)
    for name in ("all", *sorted(set(labels))):
        mine = np.full(len(asked), True) if name == "all" else asked == name
        words = [str(i) for i in range(mine.sum())]
        both = {"originals": before, "reconstructions": after}
        report["styles"][name] = {what: share(x[mine] == asked[mine], words) for what, x in both.items()}
    chosen = some(rows(data, "heldout_subjects"), COUNT)
    images = read(chosen)
    decibels = psnr(images, passed(model, params, images))
    names = np.array([row.style for row in chosen])
    report["psnr"]["all"] = {"mean": float(decibels.mean()), "count": len(chosen)}
    for name in sorted(set(names)):
        report["psnr"][name] = {"mean": float(decibels[names == name].mean()), "count": int((names == name).sum())}
    return report
