"""Fixtures of the experiments' tests."""

import pytest

from stem.experiments import records


@pytest.fixture
def made_up_machine(tmp_path, monkeypatch):
    """An empty results folder on a machine with a made-up GPU."""
    monkeypatch.setenv("STEM_RESULTS", str(tmp_path / "results"))
    monkeypatch.setattr(records, "_CHECKOUT", tmp_path)
    monkeypatch.setattr(records, "device_name", lambda: "Made-up GPU")
    (tmp_path / "pyproject.toml").touch()
