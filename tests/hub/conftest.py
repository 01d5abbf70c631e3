"""The real client against the server of this folder, in this process."""

import logging
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub.constants
import huggingface_hub.file_download
import huggingface_hub.utils._http
import pytest

from tests.helpers import build_sae
from tests.hub import endpoints  # noqa: F401  (registers what the Hub answers)
from tests.hub.saes import train
from tests.hub.server import WRITE_TOKEN, Hub


@pytest.fixture
def hub() -> Iterator[Hub]:
    with Hub() as server:
        yield server


@pytest.fixture
def client(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    """huggingface_hub set as HF_ENDPOINT, HF_HOME and so on set it when it is imported."""
    cache = tmp_path / "hf"
    constants = huggingface_hub.constants
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    template = hub.url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    # Before 1.0 the client has its own copy of it.
    file_download = huggingface_hub.file_download
    monkeypatch.setattr(file_download, "HUGGINGFACE_CO_URL_TEMPLATE", template, raising=False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache / "hub"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(cache / "token"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setenv("HF_TOKEN", WRITE_TOKEN)
    # The client waits up to 8 s between its tries, and needs nothing else of the module.
    patient = SimpleNamespace(sleep=lambda seconds: None)
    monkeypatch.setattr(huggingface_hub.utils._http, "time", patient)
    monkeypatch.setattr(file_download, "time", patient)
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    return hub


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return train(tmp_path_factory.mktemp("trained"))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A small SAE as ``save_inference_model`` writes it."""
    build_sae("auxk-topk").save_inference_model(tmp_path / "small")
    return tmp_path / "small"
