"""Fits that end soon."""

from __future__ import annotations

import pytest

from solq_lab.codecs import autoencoder


@pytest.fixture(autouse=True, scope="session")
def _few_steps():
    """The autoencoder's laws and files do not depend on how well it has learnt."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(autoencoder, "STEPS", 20)
        yield
