"""What a model's autoencoder loses: real drawings before and after it, judged and compared pixel by pixel."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

import jaxdiff
from benchmarks.bench_upscale import psnr
from benchmarks.judge_drawings import images_of, read, rows, sample_rows
from benchmarks.judge_features import Images, features
from benchmarks.judge_measures import share
from benchmarks.judge_probes import rows_by_style, style_probe
from benchmarks.judge_prompts import styles
from benchmarks.judge_scores import Judge

SOURCES = ("noto", "fluent-flat", "fluent-gradient", "fluent-3d")
COUNT, BATCH = 256, 16


def reconstruct(model, params, images: Images) -> Images:
    """Images through the autoencoder and back, in batches of one size."""

    @jax.jit
    def autoencode(params, x):
        return jnp.round(255 * jaxdiff.decode(model, params, jaxdiff.encode(model, params, x)))

    padded = np.concatenate([images, images[: -len(images) % BATCH]])
    parts = [autoencode(params, padded[i : i + BATCH]) for i in range(0, len(padded), BATCH)]
    return np.concatenate(parts)[: len(images)].astype(np.uint8)


def reconstructions(model, params, judge: Judge, data: Path) -> dict:
    """Right things before and after the autoencoder, by source; right styles and PSNR on unseen subjects, by style."""
    report: dict = {"things": {}, "styles": {}, "psnr": {}}
    for source in SOURCES:
        images, subjects = images_of(source, list(judge.prompt))
        prompts = [judge.prompt[subject] for subject in subjects]
        report["things"][source] = {
            name: share(judge.subject_ranks(features(x), prompts, False) == 1, prompts)
            for name, x in (("originals", images), ("reconstructions", reconstruct(model, params, images)))
        }
    subjects = set(judge.gallery.subject)
    probe, labels, predicted = style_probe(data, styles(), subjects)
    style_rows = rows_by_style(data, "heldout_subjects", styles(), subjects)
    reconstructed_labels = np.array(probe(features(reconstruct(model, params, read(style_rows)))))
    expected, original_labels = np.array(labels), np.array(predicted)
    for name in ("all", *sorted(set(labels))):
        selected = np.full(len(expected), True) if name == "all" else expected == name
        groups = [str(i) for i in range(selected.sum())]
        predictions = {"originals": original_labels, "reconstructions": reconstructed_labels}
        report["styles"][name] = {k: share(x[selected] == expected[selected], groups) for k, x in predictions.items()}
    selected_rows = sample_rows(rows(data, "heldout_subjects"), COUNT)
    images = read(selected_rows)
    decibels = psnr(images, reconstruct(model, params, images))
    names = np.array([row.style for row in selected_rows])
    report["psnr"]["all"] = {"mean": float(decibels.mean()), "count": len(selected_rows)}
    for name in sorted(set(names)):
        report["psnr"][name] = {"mean": float(decibels[names == name].mean()), "count": int((names == name).sum())}
    return report
