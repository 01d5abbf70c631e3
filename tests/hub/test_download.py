"""Fetching over real HTTP."""

import json
import re
import shutil
from pathlib import Path

import pytest
from sae_lens import SAE

from sae_lens_auxk import cli
from sae_lens_auxk.hub import HubError, download_sae, list_saes, upload_sae
from tests.helpers import build_sae
from tests.hub.server import Fault, Hub

REPO = "me/saes"


@pytest.fixture
def published(client: Hub, tmp_path: Path) -> Hub:
    for name in ("a", "b"):
        build_sae("auxk-topk").save_inference_model(tmp_path / name)
        upload_sae(tmp_path / name, REPO, f"layer-1/{name}")
    return client


def test_the_command(
    published: Hub,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.delenv("HF_TOKEN")
    capsys.readouterr()
    assert cli.main(["download", REPO]) == 2
    assert "holds 2 SAEs; name one of them:\n  layer-1/a\n  layer-1/b" in capsys.readouterr().err
    assert cli.main(["download", REPO, "layer-1/b"]) == 0
    assert [path.name for path in Path().iterdir()] == ["b"]
    weights = Path("b/sae_weights.safetensors").read_bytes()
    assert weights == (tmp_path / "b" / "sae_weights.safetensors").read_bytes()
    assert eval(capsys.readouterr().out, {"SAE": SAE}).cfg.d_sae == 24


def test_an_existing_folder_is_kept(published: Hub, tmp_path: Path) -> None:
    target = tmp_path / "target"
    target.mkdir()
    (target / "mine.txt").write_text("mine")
    published.log = []
    with pytest.raises(HubError, match="already exists"):
        download_sae(REPO, "layer-1/a", target)
    assert published.log == []
    assert (target / "mine.txt").read_text() == "mine"
    with pytest.raises(HubError, match=r"also holds mine\.txt: --overwrite only replaces a folder"):
        download_sae(REPO, "layer-1/a", target, overwrite=True)
    assert published.log == []
    (target / "mine.txt").unlink()
    with pytest.raises(HubError, match="target holds no SAE"):
        download_sae(REPO, "layer-1/a", target, overwrite=True)
    target.rmdir()
    download_sae(REPO, "layer-1/b", target)
    download_sae(REPO, "layer-1/a", target, overwrite=True)
    assert (target / "sae_weights.safetensors").read_bytes() == (
        tmp_path / "a" / "sae_weights.safetensors"
    ).read_bytes()
    assert sorted(path.name for path in target.iterdir()) == ["cfg.json", "sae_weights.safetensors"]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def test_overwrite_deletes_nothing_but_an_sae(
    published: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An SAE with more beside it, the working folder, links to an SAE and to nothing."""
    home = tmp_path / "home"
    sae = download_sae(REPO, "layer-1/b", home / "sae")
    for extra in ("more", "folder"):
        shutil.copytree(sae, home / extra)
    (home / "more" / "notes.txt").write_text("notes")
    (home / "folder" / "sparsity.safetensors").mkdir()
    shutil.copytree(sae, home / "linked_weights")
    (home / "linked_weights" / "cfg.json").unlink()
    (home / "linked_weights" / "cfg.json").symlink_to(sae / "cfg.json")
    (home / "link").symlink_to(sae)
    (home / "dangling").symlink_to(tmp_path / "nowhere")
    (home / "file").write_text("a file")
    before = contents(home)
    monkeypatch.chdir(home)
    names = ("more", "folder", "linked_weights", "link", "dangling", "file")
    for target in (".", "..", home / "link" / "..", *names, *(home / name for name in names)):
        with pytest.raises(HubError, match="--overwrite only replaces|symbolic link|is a file"):
            download_sae(REPO, "layer-1/a", target, overwrite=True)
    assert contents(home) == before
    assert (home / "dangling").is_symlink()


def test_an_interrupted_download_leaves_nothing_and_is_completed(
    published: Hub, tmp_path: Path
) -> None:
    before = sorted(tmp_path.iterdir())
    published.faults = [Fault("GET", "/storage/", "before", times=99)]
    with pytest.raises(HubError, match="connection to the Hub broke"):
        download_sae(REPO, "layer-1/a", tmp_path / "new")
    assert sorted(tmp_path.iterdir()) == before
    published.faults = []
    target = download_sae(REPO, "layer-1/a", tmp_path / "new")
    assert SAE.load_from_disk(target).cfg.d_sae == 24


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["me/nothing"], "me/nothing is not on the Hub, or it is private"),
        ([REPO, "layer-1"], "holds no SAE 'layer-1', only:\n  layer-1/a"),
        (["me"], "'me' is not allowed: it must be user/name"),
    ],
)
def test_bad_arguments(
    args: list[str],
    message: str,
    published: Hub,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    before = sorted(tmp_path.iterdir())
    assert cli.main(["download", *args, "--output", str(tmp_path / "x")]) == 2
    assert message in capsys.readouterr().err
    assert sorted(tmp_path.iterdir()) == before


def test_a_private_repository_is_only_for_its_owner(
    client: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build_sae("auxk-topk").save_inference_model(tmp_path / "sae")
    upload_sae(tmp_path / "sae", REPO, private=True)
    assert client.repos[REPO].private
    download_sae(REPO, output=tmp_path / "mine")
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(HubError, match="private"):
        download_sae(REPO, output=tmp_path / "theirs")


def test_what_saelens_cannot_open_is_not_kept(client: Hub, published: Hub, tmp_path: Path) -> None:
    files = dict(client.repos[REPO].commits[-1][1])
    files["layer-1/a/cfg.json"] = ("regular", b'{"architecture": "somebody\'s"}')
    client.repos[REPO].commit(files, "broken")
    with pytest.raises(HubError, match="SAELens cannot open layer-1/a"):
        download_sae(REPO, "layer-1/a", tmp_path / "new")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    "sae_id", ["\x1b[2Jx", "x\u202ey", "a\nb", "..", "../x", "/x", "a//b", "./a"]
)
def test_an_id_that_is_no_folder_or_cannot_be_shown_is_no_sae(
    sae_id: str, published: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = contents(tmp_path / "a")
    files = dict(published.repos[REPO].commits[-1][1])
    for name in ("cfg.json", "sae_weights.safetensors"):
        files[f"{sae_id}/{name}"] = files[f"layer-1/a/{name}"]
    published.repos[REPO].commit(files, "malicious")
    assert list_saes(REPO) == ["layer-1/a", "layer-1/b"]
    with pytest.raises(HubError, match="holds no SAE"):
        download_sae(REPO, sae_id, tmp_path / "new")
    capsys.readouterr()
    assert cli.main(["download", REPO, sae_id]) == 2
    error = capsys.readouterr().err.removesuffix("\n")
    assert all(character.isprintable() or character == "\n" for character in error)
    assert contents(tmp_path / "a") == before
    assert not (tmp_path / "new").exists()


def test_what_a_config_says_is_printed_without_control_characters(
    published: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = dict(published.repos[REPO].commits[-1][1])
    cfg = json.loads(files["layer-1/a/cfg.json"][1])
    cfg["architecture"] = "\x1b[31mred\x9b2J"
    files["layer-1/a/cfg.json"] = ("regular", json.dumps(cfg).encode())
    published.repos[REPO].commit(files, "malicious")
    capsys.readouterr()
    assert cli.main(["download", REPO, "layer-1/a", "--output", str(tmp_path / "new")]) == 2
    error = capsys.readouterr().err
    assert r"\x1b[31mred\x9b2J" in error
    assert not {"\x1b", "\x9b"} & {*error}


@pytest.mark.parametrize("name", ["a/cfg.json/below", "x" * 300, "/proc/nowhere/x"])
def test_a_place_that_cannot_be_written_to(
    name: str, published: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["download", REPO, "layer-1/a", "--output", str(tmp_path / name)]) == 2
    assert re.search(r"error: .* cannot be written: .*\n$", capsys.readouterr().err)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b", "hf"]
