"""Uploads that are interrupted or large, and repositories that somebody else writes to."""

import hashlib
from pathlib import Path

import pytest
import torch
from sae_lens import SAE
from safetensors.torch import save_file

from sae_lens_auxk.hub import HubError, upload, upload_sae
from tests.helpers import build_sae
from tests.hub.saes import comparison, fetched, ids, same
from tests.hub.server import Fault, Hub, card

REPO = "me/saes"


@pytest.mark.parametrize(
    "fault",
    [
        Fault("PUT", "/lfs/", "in the middle", times=99),
        Fault("PUT", "/lfs/", 403, times=99),
        Fault("POST", "/commit/", "before"),
        Fault("POST", "/commit/", 500),
        Fault("POST", "/preupload/", "before", times=99),
    ],
    ids=str,
)
def test_an_interrupted_upload_leaves_no_half_and_is_completed(
    fault: Fault, client: Hub, folder: Path
) -> None:
    client.faults = [fault]
    with pytest.raises(HubError) as error:
        upload_sae(folder, REPO)
    assert "connection to the Hub broke" in str(error.value) or str(fault.when) in str(error.value)
    assert set(client.files(REPO)) == {".gitattributes"}
    client.faults = []
    upload_sae(folder, REPO)
    assert ids(client, REPO) == ["small"]
    files = client.files(REPO)
    assert (
        files["small/sae_weights.safetensors"] == (folder / "sae_weights.safetensors").read_bytes()
    )
    assert "## small" in card(client)


def test_a_commit_whose_answer_is_lost_is_not_made_twice(client: Hub, folder: Path) -> None:
    client.faults = [Fault("POST", "/commit/", "after")]
    with pytest.raises(HubError, match="connection to the Hub broke"):
        upload_sae(folder, REPO)
    assert ids(client, REPO) == ["small"]
    assert upload_sae(folder, REPO).unchanged == ["small"]
    assert len(client.repos[REPO].commits) == 2


def test_an_interrupted_comparison_goes_on_where_it_was(client: Hub, tmp_path: Path) -> None:
    made = comparison(tmp_path / "three")
    weights = (made / "runs/seed-1/auxk-k3/sae_weights.safetensors").read_bytes()
    oid = hashlib.sha256(weights).hexdigest()
    client.faults = [Fault("PUT", oid, "in the middle", times=99)]
    with pytest.raises(HubError):
        upload_sae(made, REPO)
    assert ids(client, REPO) == ["seed-0/auxk-k3"]
    client.faults, client.log = [], []
    assert upload_sae(made, REPO).unchanged == ["seed-0/auxk-k3"]
    assert len(ids(client, REPO)) == 3
    first = hashlib.sha256((made / "runs/seed-0/auxk-k3/sae_weights.safetensors").read_bytes())
    assert not any(first.hexdigest() in path for _, path, _ in client.log)


# --- what must not happen --------------------------------------------------------------------


def test_an_existing_sae_is_not_overwritten(client: Hub, folder: Path, tmp_path: Path) -> None:
    upload_sae(folder, REPO, "a")
    before = client.files(REPO)
    other = tmp_path / "other"
    build_sae("auxk-jumprelu").save_inference_model(other)
    save_file({"sparsity": torch.zeros(24)}, folder / "sparsity.safetensors")
    client.log = []
    with pytest.raises(HubError, match=r"already has another version of a\."):
        upload_sae(other, REPO, "a")
    assert client.writes() == []
    assert client.files(REPO) == before

    # More of the same SAE is no conflict; what is left over of another one would be one.
    upload_sae(folder, REPO, "a")
    assert "a/sparsity.safetensors" in client.files(REPO)
    upload_sae(other, REPO, "a", overwrite=True)
    assert {path for path in client.files(REPO) if path.startswith("a/")} == {
        *("a/cfg.json", "a/sae_weights.safetensors"),
    }
    assert "`jumprelu`" in card(client)
    assert card(client).count("## a\n") == 1


def test_what_is_left_of_another_sae_goes_away(client: Hub, folder: Path) -> None:
    save_file({"sparsity": torch.zeros(24)}, folder / "sparsity.safetensors")
    upload_sae(folder, REPO, "a")
    (folder / "sparsity.safetensors").unlink()
    with pytest.raises(HubError, match=r"already has another version of a\."):
        upload_sae(folder, REPO, "a")
    assert upload_sae(folder, REPO, "a", overwrite=True).unchanged == []
    assert "a/sparsity.safetensors" not in client.files(REPO)


def test_other_weights_of_the_same_size_are_another_sae(
    client: Hub, folder: Path, tmp_path: Path
) -> None:
    upload_sae(folder, REPO, "a")
    build_sae("auxk-topk").save_inference_model(tmp_path / "other")
    assert (tmp_path / "other/cfg.json").read_bytes() == (folder / "cfg.json").read_bytes()
    with pytest.raises(HubError, match=r"already has another version of a\."):
        upload_sae(tmp_path / "other", REPO, "a")


def test_reports_of_another_comparison_are_not_overwritten(client: Hub, tmp_path: Path) -> None:
    made = comparison(tmp_path / "three", n_seeds=1)
    upload_sae(made, REPO)
    (made / "report.html").write_text("<html/>of old")  # as long as the other
    with pytest.raises(HubError, match=r"already has another version of report\.html\."):
        upload_sae(made, REPO)
    upload_sae(made, REPO, overwrite=True)
    assert client.files(REPO)["report.html"] == b"<html/>of old"


def test_what_somebody_else_commits_meanwhile_is_not_overwritten(
    client: Hub, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    upload_sae(folder, REPO, "a")
    send = upload._send

    def late(*args: object) -> str:
        client.repos[REPO].commit({"b/cfg.json": ("regular", b"{}")}, "somebody else's")
        return send(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(upload, "_send", late)
    with pytest.raises(HubError, match="changed by someone else"):
        upload_sae(folder, REPO, "b")
    assert client.files(REPO)["b/cfg.json"] == b"{}"


@pytest.mark.parametrize("part_size", [5_000_000, 10**9], ids=["multipart", "basic"])
def test_a_large_file(part_size: int, client: Hub, tmp_path: Path) -> None:
    client.part_size = part_size
    sae = build_sae("auxk-topk", d_in=512, d_sae=8192, k=8)
    sae.save_inference_model(tmp_path / "large")
    weights = (tmp_path / "large" / "sae_weights.safetensors").read_bytes()
    assert len(weights) > 33_000_000
    upload_sae(tmp_path / "large", REPO)
    n_parts = sum(
        method == "PUT" and "/part/" in path and status == 200
        for method, path, status in client.log
    )
    assert n_parts == (7 if part_size == 5_000_000 else 0)
    back = fetched(REPO, "large", tmp_path / "back")
    assert (back / "sae_weights.safetensors").read_bytes() == weights


def test_a_broken_part_is_sent_again_by_the_client(client: Hub, tmp_path: Path) -> None:
    client.part_size = 1000
    build_sae("auxk-topk").save_inference_model(tmp_path / "sae")
    client.faults = [Fault("PUT", "/part/2", "in the middle")]
    upload_sae(tmp_path / "sae", REPO)
    assert same(
        SAE.load_from_disk(fetched(REPO, "sae", tmp_path / "back")),
        SAE.load_from_disk(tmp_path / "sae"),
    )
