"""What must not leave the machine with an upload."""

import getpass
import json
import re
from pathlib import Path
from typing import Any

import pytest
from sae_lens import SAE

from sae_lens_auxk.compare.report import write_report
from sae_lens_auxk.hub import HubError, upload_sae
from sae_lens_auxk.hub.private import publishable_file
from tests.compare.fake_results import fake_results
from tests.helpers import build_sae
from tests.hub.saes import comparison
from tests.hub.server import Hub

REPO = "me/saes"
RANDOM = "AbCdEfGhIjKlMnOpQrStUvWxYzAbCdEfGh"
JWT = "eyJhbGciOiJFZERTQSJ9.eyJyZWFkIjp0cnVlfQ.x-9_Zq3"


def sae_with(folder: Path, **metadata: Any) -> Path:
    """An SAE whose metadata is as SAELens writes a run's fields into it."""
    build_sae("auxk-topk").save_inference_model(folder)
    cfg = json.loads((folder / "cfg.json").read_text())
    cfg["metadata"] |= metadata
    (folder / "cfg.json").write_text(json.dumps(cfg))
    (folder / "runner_cfg.json").write_text(json.dumps(metadata))
    return folder


@pytest.mark.parametrize(
    "value",
    [
        f"hf_{RANDOM}",
        f"hf_oauth_{JWT}",
        f"hf_jwt_{JWT}",
        f"api_org_{RANDOM}",
        f"glued_tohf_{RANDOM}",
        f"https://x.org/{RANDOM}?token=hf_{RANDOM}",
        {"token": "short"},
        {"use_auth_token": "short"},
        {"password": "correct horse"},
        {"db_password": 1234},
        {"headers": {"Authorization": "Basic YTpi"}},
        {"proxies": {"https": "http://anna:pass@proxy:8080"}},
        '{"password": "in a string"}',
    ],
    ids=str,
)
def test_tokens_and_passwords_are_refused(value: Any, client: Hub, tmp_path: Path) -> None:
    folder = sae_with(tmp_path / "sae", model_from_pretrained_kwargs=value)
    with pytest.raises(HubError, match=r"cfg\.json holds .*: remove") as error:
        upload_sae(folder, REPO)
    for secret in (RANDOM, JWT, "short", "correct horse", "1234", "YTpi", "pass@", "in a string"):
        assert secret not in str(error.value)
    assert client.writes() == []


@pytest.mark.parametrize(
    "value",
    [
        "hf_internal/model",
        "hf_internal_testing/tiny_random_LlamaForCausalLM2",
        "hf_internaltestingmodelname/x",
        "hf_oauth_callback_settings_of_the_app.json",
        "api_org_documentation",
        {"token": True, "use_auth_token": None, "password": "", "trust_remote_code": True},
        {"pad_token": "<pad>", "eos_token": "x", "tokenizer_name": "gpt2", "tokens": "a"},
        {"hook": "blocks.0.hook_attn_out", "author": "Anna", "secretary": "B"},
        "https://user@x.org/a:b@c",
        "hf://datasets/someone/home/anna",
    ],
    ids=str,
)
def test_what_only_looks_like_them_passes(value: Any, client: Hub, tmp_path: Path) -> None:
    folder = sae_with(tmp_path / "sae", model_name="m", model_from_pretrained_kwargs=value)
    upload_sae(folder, REPO)
    for name in ("cfg.json", "runner_cfg.json"):
        assert client.files(REPO)[f"sae/{name}"] == (folder / name).read_bytes()


@pytest.mark.parametrize("name", ["report.html", "report.md", "results.json"])
def test_reports_are_looked_at(name: str, client: Hub, tmp_path: Path) -> None:
    made = comparison(tmp_path / "three", n_seeds=1)
    if name == "results.json":
        results = json.loads((made / name).read_text())
        results["command"] = f"compare --language_model hf_{RANDOM}"
        (made / name).write_text(json.dumps(results))
    else:
        (made / name).write_text(f"trained with hf_{RANDOM}")
    with pytest.raises(HubError, match=f"{re.escape(name)} holds what looks like a Hub token"):
        upload_sae(made, REPO)
    whole = comparison(tmp_path / "whole", n_seeds=1) / "results.json"
    (made / "results.json").write_bytes(whole.read_bytes())
    for report in ("report.html", "report.md"):
        (made / report).write_text("<td>{&quot;password&quot;: &#x27;a&#x27;}</td>")
    with pytest.raises(HubError, match=r"report\.html .* secret: remove the value of 'password'"):
        upload_sae(made, REPO)
    assert client.writes() == []


def test_the_users_name_in_local_paths_stays_here(client: Hub, tmp_path: Path) -> None:
    me = getpass.getuser()
    paths = {
        "model_name": "/home/anna/models/m",
        "dataset_path": f"/scratch/{me}/texts",
        "cached_activations_path": r"C:\Users\anna\cache",
        "output_path": "file:///gpfs/home/anna/out",
        "checkpoint_path": "/Users/anna",
        "exotic": "/home/änna/x",
        "tokenizer_name": "https://x.org/home/page",
        "relative": f"runs/home/kept/{me}",
    }
    folder = sae_with(tmp_path / "sae", **paths)
    upload_sae(folder, REPO)
    files = client.files(REPO)
    for name in ("sae/cfg.json", "sae/runner_cfg.json", "README.md"):
        assert b"anna" not in files[name]
    assert json.loads(files["sae/runner_cfg.json"]) == {
        "model_name": "/home/USER/models/m",
        "dataset_path": "/scratch/USER/texts",
        "cached_activations_path": r"C:\Users\USER\cache",
        "output_path": "file:///gpfs/home/USER/out",
        "checkpoint_path": "/Users/USER",
        "exotic": "/home/USER/x",
        "tokenizer_name": paths["tokenizer_name"],
        "relative": paths["relative"],
    }
    card = files["README.md"].decode()
    assert "| model | `PATH/TO/m` |" in card
    assert "| dataset | `PATH/TO/texts` |" in card
    # What is here stays as it is, and is the same SAE as what is there.
    assert "/home/anna" in (folder / "cfg.json").read_text()
    assert upload_sae(folder, REPO).unchanged == ["sae"]
    assert SAE.load_from_disk(folder).cfg.metadata.model_name == "/home/anna/models/m"


def test_the_users_name_in_a_report(
    client: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = comparison(tmp_path / "three", n_seeds=1)
    results = json.loads((made / "results.json").read_text())
    results["command"] = "sae-lens-auxk compare --dataset_path=/home/anna/texts"
    results["data"]["description"] = "texts in /home/anna_b/x and /data/a_me/y"
    monkeypatch.setattr(getpass, "getuser", lambda: "a_me")
    (made / "results.json").write_text(json.dumps(results))
    (made / "report.html").write_text("<td>/home/anna/texts</td></home/>")
    upload_sae(made, REPO)
    files = client.files(REPO)
    assert files["report.html"] == b"<td>/home/USER/texts</td></home/>"
    assert b"--dataset_path=/home/USER/texts" in files["results.json"]
    assert b"--dataset_path=PATH/TO/texts" in files["README.md"]
    assert b"texts in /home/USER/x and /data/USER/y" in files["README.md"]
    assert not any(b"anna" in content for content in files.values())


@pytest.mark.parametrize(
    "name", ["figures/x.png", "report.md", "figures", "runs/seed-0", "runs/seed-0/auxk-k3/cfg.json"]
)
def test_a_link_out_of_the_folder_is_not_followed(name: str, client: Hub, tmp_path: Path) -> None:
    made = comparison(tmp_path / "three", n_seeds=1)
    path, outside = made / name, tmp_path / "outside"
    if path.exists():
        path.rename(outside)
    else:
        outside.write_text("private")
    path.symlink_to(outside)
    with pytest.raises(HubError, match=r"leads out of .*three, to .*outside.* by a symbolic link"):
        upload_sae(made, REPO)
    assert client.writes() == []


def test_a_link_within_the_folder_is(client: Hub, tmp_path: Path) -> None:
    made = comparison(tmp_path / "three", n_seeds=1)
    (made / "figures" / "again.png").symlink_to("pareto.png")
    (tmp_path / "link").symlink_to(made)
    upload_sae(tmp_path / "link", REPO)
    assert "figures/again.png" in client.files(REPO)


def test_an_sae_with_a_link_out_of_its_folder(client: Hub, tmp_path: Path) -> None:
    folder = sae_with(tmp_path / "sae")
    (tmp_path / "private.json").write_text("{}")
    (folder / "runner_cfg.json").unlink()
    (folder / "runner_cfg.json").symlink_to(tmp_path / "private.json")
    with pytest.raises(HubError, match=r"runner_cfg\.json leads out of"):
        upload_sae(folder, REPO)
    assert client.writes() == []


def test_a_real_report_may_go(tmp_path: Path) -> None:
    write_report(fake_results(), tmp_path)
    assert publishable_file(tmp_path / "report.html", tmp_path) == tmp_path / "report.html"
    page = (tmp_path / "report.html").read_text()
    (tmp_path / "report.html").write_text(
        page.replace("<h1>", '<p>{"password": "hunter22"}</p><h1>')
    )
    with pytest.raises(HubError, match="secret: remove the value of 'password'"):
        publishable_file(tmp_path / "report.html", tmp_path)
