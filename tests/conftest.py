"""Fixtures that many tests share."""

import os

import pytest

if "PYTEST_XDIST_WORKER" in os.environ:  # PyTorch's threads would wait in turns for cores that other workers have
    os.environ.setdefault("OMP_NUM_THREADS", "1")

# The files that take longest, by which parallel workers begin so that they end together.
LONGEST = (
    "test_training_devices", "test_scheduler_oracle", "test_train_cli", "test_training", "test_finetune", "test_trust",
    "test_models", "test_sampling", "test_examples", "test_tasks", "test_generate", "test_single_file",
)  # fmt: skip


def pytest_collection_modifyitems(items):
    names = {name: i for i, name in enumerate(LONGEST)}
    items.sort(key=lambda item: names.get(item.path.stem, len(names)))


@pytest.fixture(scope="session")
def tiny():
    """(model, params) of the tiny random model."""
    from tests.tiny import tiny_model, tiny_params

    model = tiny_model()
    return model, tiny_params(model)


@pytest.fixture(scope="session")
def tiny_folder(tiny, tmp_path_factory):
    """The tiny model as a diffusers folder. Not to be written to: tests that damage files copy it."""
    from jaxdiff.io.pretrained import save

    folder = tmp_path_factory.mktemp("model") / "tiny"
    save(folder, *tiny)
    return folder
