"""Publishing over real HTTP: the real client against the server of this folder."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
import torch
from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError
from sae_lens import SAE
from sae_lens.saes.sae import TrainingSAE
from safetensors.torch import load_file, save, save_file

from sae_lens_auxk import cli
from sae_lens_auxk.hub import HubError, upload_sae
from sae_lens_auxk.hub.errors import explained
from tests.helpers import build_sae
from tests.hub.saes import comparison, fetched, ids, same, train
from tests.hub.server import READ_TOKEN, STRANGER_TOKEN, WRITE_TOKEN, Hub, card

REPO = "me/saes"


def environment(hub: Hub, home: Path) -> dict[str, str]:
    repository = str(Path(__file__).parents[2])
    kept = {name: value for name, value in os.environ.items() if name != "HF_HUB_OFFLINE"}
    return kept | {
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(home),
        "HF_TOKEN": WRITE_TOKEN,
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "PYTHONPATH": repository,
        "OMP_NUM_THREADS": "1",
    }


def test_from_pretrained_opens_it_without_the_plugin(
    client: Hub, trained: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """SAELens alone, in a process of its own: nothing is patched."""
    env = environment(client, tmp_path / "home")
    # It imports SAELens, and waits for the card to tell it what to run.
    program = """
import sys
import sae_lens
from safetensors.torch import load_file, save, save_file
exec(sys.stdin.read())
assert not any("auxk" in name for name in sys.modules)
_, _, sparsity = SAE.from_pretrained_with_cfg_and_sparsity(sys.argv[1], sys.argv[2])
x = load_file("x.safetensors")["x"]
save_file({"out": sae(x), "acts": sae.encode(x), "sparsity": sparsity}, "got.safetensors")
"""
    with subprocess.Popen(
        [sys.executable, "-c", program, REPO, "l1/a"],
        env=env | {"PYTHONPATH": "", "HF_TOKEN": READ_TOKEN},
        cwd=tmp_path,
        text=True,
        stdin=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as reader:  # whose stdin is closed at the end, also of an upload that fails, so it ends
        assert cli.main(["upload", str(trained["output"]), REPO, "--sae_id", "l1/a"]) == 0
        assert f"published at {client.url}/{REPO}" in capsys.readouterr().out
        assert set(client.files(REPO)) == {
            ".gitattributes",
            "README.md",
            *(f"l1/a/{path.name}" for path in trained["output"].iterdir()),
        }
        # What the card tells people to do, word by word.
        (load,) = re.findall(
            r"```python\n(from sae_lens import SAE\n.*?)```", card(client), re.DOTALL
        )
        x = torch.randn(256, 16)
        save_file({"x": x}, tmp_path / "x.safetensors")
        _, errors = reader.communicate(load)
        assert reader.returncode == 0, errors
    got = load_file(tmp_path / "got.safetensors")
    local = SAE.load_from_disk(trained["output"])
    assert torch.equal(got["out"], local(x))
    assert torch.equal(got["acts"], local.encode(x))
    assert got["acts"].count_nonzero() > 0
    sparsity = load_file(trained["output"] / "sparsity.safetensors")["sparsity"]
    assert torch.equal(got["sparsity"], sparsity)


@pytest.mark.oldest
def test_there_and_back(client: Hub, trained: dict[str, Path], tmp_path: Path) -> None:
    upload_sae(trained["output"], REPO, "a")
    target = fetched(REPO, "a", tmp_path / "back")
    assert {path.name for path in target.iterdir()} == {
        path.name for path in trained["output"].iterdir()
    }
    for file in trained["output"].iterdir():
        assert (target / file.name).read_bytes() == file.read_bytes()
    assert same(SAE.load_from_disk(target), SAE.load_from_disk(trained["output"]))


def test_a_checkpoint_goes_up_as_its_inference_model(
    client: Hub, trained: dict[str, Path], tmp_path: Path
) -> None:
    upload_sae(trained["checkpoint"], REPO, "half")
    files = client.files(REPO)
    cfg = json.loads(files["half/cfg.json"])
    assert cfg["architecture"] == "jumprelu"
    assert "decoder_init_norm" not in cfg
    assert {path for path in files if path.startswith("half/")} == {
        *("half/cfg.json", "half/sae_weights.safetensors"),
        *("half/sparsity.safetensors", "half/runner_cfg.json"),
    }
    n_samples = int(trained["checkpoint"].name)
    assert 0 < n_samples < 20 * 64
    assert f"training checkpoint, after {n_samples:,} tokens" in card(client)
    TrainingSAE.load_from_disk(trained["checkpoint"]).save_inference_model(tmp_path / "own")
    back = SAE.load_from_disk(fetched(REPO, "half", tmp_path / "back"))
    assert same(back, SAE.load_from_disk(tmp_path / "own"))


@pytest.mark.parametrize("normalization", ["expected_average_only_in", "covariance_whitening"])
def test_a_checkpoint_at_the_end_is_what_the_run_saved(
    normalization: str, client: Hub, tmp_path: Path
) -> None:
    """The scaling that a checkpoint keeps beside its weights is folded in, as at a run's end."""
    fields = {"training_tokens": 4 * 64, "n_batches_for_norm_estimate": 8}
    made = train(tmp_path, normalize_activations=normalization, lr=1e-20, lr_end=1e-20, **fields)
    upload_sae(made["checkpoint"], REPO, "half")
    back = SAE.load_from_disk(fetched(REPO, "half", tmp_path / "back"))
    whole = SAE.load_from_disk(made["output"])
    assert back.cfg.normalize_activations == whole.cfg.normalize_activations == "none"
    # With a learning rate of nothing, the weights at half of the run are those at its end.
    torch.testing.assert_close(back.W_enc, whole.W_enc)
    torch.testing.assert_close(back.W_dec, whole.W_dec)
    unscaled = TrainingSAE.load_from_disk(made["checkpoint"])
    assert (back.W_enc - unscaled.W_enc).abs().max() > 1e-3

    # Half-written: SAELens writes the scaler after the weights.
    names = ["activation_scaler.json"]
    if normalization == "covariance_whitening":
        names.insert(0, "activation_whitening.safetensors")
    client.log = []
    for name in names:
        (made["checkpoint"] / name).unlink()
        with pytest.raises(
            HubError, match=rf"'{normalization}', but its scaling is missing.*{name}"
        ):
            upload_sae(made["checkpoint"], REPO, "broken")
    assert client.writes() == []


@pytest.mark.parametrize("architecture", ["batchtopk", "topk", "gated"])
def test_a_training_format_of_saelens_itself_is_converted(
    architecture: str, client: Hub, tmp_path: Path
) -> None:
    sae = build_sae(architecture)
    sae.save_model(tmp_path / "training")
    sae.save_inference_model(tmp_path / "own")
    upload_sae(tmp_path / "training", REPO)
    for file in (tmp_path / "own").iterdir():
        assert client.files(REPO)[f"training/{file.name}"] == file.read_bytes()


def test_what_cannot_be_opened_or_converted_is_refused(
    client: Hub, folder: Path, tmp_path: Path
) -> None:
    build_sae("auxk-topk").save_model(tmp_path / "training")
    path = tmp_path / "training" / "cfg.json"
    cfg = json.loads(path.read_text())
    path.write_text(json.dumps(cfg | {"d_sae": 25}))
    with pytest.raises(HubError, match="cannot be converted"):
        upload_sae(tmp_path / "training", REPO)
    path.write_text(json.dumps(cfg | {"architecture": "somebody's"}))
    with pytest.raises(HubError, match=r"cannot be converted.*somebody's"):
        upload_sae(tmp_path / "training", REPO)
    # An inference config under a name that only the plugin knows.
    plain = json.loads((folder / "cfg.json").read_text())
    (folder / "cfg.json").write_text(json.dumps(plain | {"architecture": "auxk-topk"}))
    with pytest.raises(HubError, match=r"'auxk-topk', which SAELens cannot open.*topk"):
        upload_sae(folder, REPO)
    for damage in ({"d_in": 9}, {"k": [3]}):
        (folder / "cfg.json").write_text(json.dumps(plain | damage))
        with pytest.raises(HubError, match="SAELens cannot open the SAE"):
            upload_sae(folder, REPO)
    assert client.writes() == []


def test_a_comparison(client: Hub, tmp_path: Path) -> None:
    made = comparison(tmp_path / "three")
    done = upload_sae(made, REPO, "cmp")
    names = [f"cmp/seed-{seed}/auxk-k3" for seed in range(3)]
    assert ids(client, REPO) == names
    assert done.unchanged == []
    for name in ("results.json", "report.html", "figures/pareto.png"):
        assert client.files(REPO)[f"cmp/{name}"] == (made / name).read_bytes()
    messages = [message for _, _, message in client.repos[REPO].commits]
    assert messages == ["initial commit", *(f"Upload {name}" for name in names)]
    text = card(client)
    assert "3 of 4 runs" in text
    assert "| auxk | auxk-topk | 3 | 3 | 0.910 ± 0.010 | 3.0 ± 0.0 |" in text
    assert "![pareto](cmp/figures/pareto.png)" in text
    assert "sae-lens-auxk compare --output three" in text
    for seed, name in enumerate(names):
        assert f"#### {name}\n\nauxk, seed {seed}: EV 0.9{seed}0, L0 3.0" in text
        back = SAE.load_from_disk(fetched(REPO, name, tmp_path / f"back{seed}"))
        assert same(back, SAE.load_from_disk(made / f"runs/seed-{seed}/auxk-k3"))


# --- interruptions ---------------------------------------------------------------------------


def test_a_dry_run_asks_the_hub_nothing(
    client: Hub,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.delenv("HF_TOKEN")
    assert cli.main(["upload", str(folder), REPO, "--sae_id", "x", "--dry_run"]) == 0
    planned = upload_sae(folder, REPO, "x", dry_run=True)
    assert client.log == []
    out = capsys.readouterr().out
    n_bytes = (folder / "sae_weights.safetensors").stat().st_size
    assert f"{n_bytes:,d}  x/sae_weights.safetensors" in out
    assert "README.md" in out
    monkeypatch.setenv("HF_TOKEN", WRITE_TOKEN)
    upload_sae(folder, REPO, "x")
    assert card(client) == planned.card


@pytest.mark.parametrize(
    ("token", "message"),
    [
        (None, "there is no Hub token: run `hf auth login`"),
        ("hf_nonsense", "the Hub refused the token"),
        (READ_TOKEN, "'read token' may only read"),
        (STRANGER_TOKEN, "the token may not write to me/saes"),
    ],
)
def test_a_token_that_will_not_do(
    token: str | None,
    message: str,
    client: Hub,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    if token is None:
        monkeypatch.delenv("HF_TOKEN")
    else:
        monkeypatch.setenv("HF_TOKEN", token)
    assert cli.main(["upload", str(folder), REPO]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error
    assert client.repos == {}
    assert client.objects == {}


def test_no_hub_to_reach(client: Hub, folder: Path, monkeypatch: Any) -> None:
    # Before 1.0 the client keeps sessions, which know whether they are offline.
    forget_sessions = getattr(huggingface_hub.utils._http, "reset_sessions", lambda: None)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    forget_sessions()
    with pytest.raises(HubError, match="HF_HUB_OFFLINE is set"):
        upload_sae(folder, REPO)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    forget_sessions()
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(HubError, match="connection to the Hub broke"):
        upload_sae(folder, REPO)


def test_an_error_without_an_answer_is_a_broken_connection() -> None:
    # As huggingface_hub before 1.0 raises it; later ones cannot make it.
    error = HfHubHTTPError.__new__(HfHubHTTPError, "nobody there")
    error.response = None  # type: ignore[assignment]
    with pytest.raises(HubError, match="connection to the Hub broke"), explained(REPO):
        raise error


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["nowhere", REPO], "nowhere is not a folder"),
        ([".", REPO], "holds no SAE: it has neither cfg.json nor results.json. Folders in it"),
        (["small", "saes"], "'saes' is not allowed: it must be user/name"),
        (["small", "me/.."], "'me/..' is not allowed"),
        (["small", REPO, "--sae_id", "../x"], "sae_id '../x' is not allowed"),
        (["small", REPO, "--sae_id", "README.md"], "a repository has a file README.md"),
        (["small", REPO, "--sae_id", "results.json/x"], "a repository has a file results.json"),
        (["report.md", REPO], "sae_id 'report.md' is not allowed"),
        (["\x1b[2J", REPO], r"\x1b[2J is not a folder"),
        (["noweights", REPO], "has cfg.json but no sae_weights.safetensors"),
        (["broken", REPO], "results.json is damaged: results has no name"),
        (["secret", REPO], "holds what looks like a Hub token"),
    ],
)
def test_bad_arguments(
    args: list[str],
    message: str,
    client: Hub,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(folder.parent)
    for name in ("noweights", "broken"):
        Path(name).mkdir()
    Path("noweights/cfg.json").write_text("{}")
    Path("broken/results.json").write_text('{"version": 2}')
    for name in ("secret", "report.md"):
        build_sae("auxk-topk").save_inference_model(name)
    Path("secret/runner_cfg.json").write_text(json.dumps({"token": "hf_" + 30 * "x"}))
    assert cli.main(["upload", *args]) == 2
    assert message in capsys.readouterr().err
    assert client.writes() == []


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("sparsity.safetensors", b"damaged"),
        ("sparsity.safetensors", save({"other": torch.zeros(24)})),
        ("runner_cfg.json", b"[1, 2]"),
        ("runner_cfg.json", b"\xff\xfe"),
        ("runner_cfg.json", b'{"training_tokens": "many"}'),
    ],
)
def test_a_damaged_file_beside_an_sae(
    name: str, content: bytes, client: Hub, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / name).write_bytes(content)
    assert cli.main(["upload", str(folder), REPO]) == 2
    assert re.search("cannot be read|object|malformed", capsys.readouterr().err)
    assert client.writes() == []


@pytest.mark.parametrize(
    "change",
    [
        {"runs": [5]},
        {"runs": [{"status": "finished", "folder": 5}]},
        {"runs": [{"status": "finished"}]},
        {"data": []},
        {"data": None},
        "name",
        "metrics",
    ],
    ids=str,
)
def test_malformed_results(
    change: Any, client: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = comparison(tmp_path / "one", n_seeds=1)
    results = json.loads((made / "results.json").read_text())
    if isinstance(change, dict):
        results |= change
    else:
        results.pop(change, None)
        results["runs"][0].pop(change)
    (made / "results.json").write_text(json.dumps(results))
    assert cli.main(["upload", str(made), REPO]) == 2
    assert str(made / "results.json") in capsys.readouterr().err
    assert client.writes() == []


def test_private_does_not_go_to_a_public_repository(client: Hub, folder: Path) -> None:
    upload_sae(folder, REPO, "a")
    with pytest.raises(HubError, match="already exists and is public"):
        upload_sae(folder, REPO, "b", private=True)
    assert ids(client, REPO) == ["a"]


def test_a_private_repository_is_only_for_its_owner(
    client: Hub, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    upload_sae(folder, REPO, private=True)
    assert client.repos[REPO].private
    fetched(REPO, "small", tmp_path / "mine")
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(RepositoryNotFoundError):
        fetched(REPO, "small", tmp_path / "theirs")


# --- large files -----------------------------------------------------------------------------
