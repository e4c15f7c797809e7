"""A small model, and the folder that it was saved to."""

import pytest


@pytest.fixture(scope="module")
def model():
    from hf_models import make  # needs transformers

    return make()


@pytest.fixture(scope="module")
def folder(model, tmp_path_factory):
    path = tmp_path_factory.mktemp("saved")
    model.save_pretrained(path)
    return path
