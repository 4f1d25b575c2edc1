"""Fixtures that many tests share."""

import pytest


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
