"""The model card: what it says is true, and what people wrote stays."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard
from sae_lens import LanguageModelSAERunnerConfig

from sae_lens_auxk import runner_config
from sae_lens_auxk.hub import HubError, upload_sae
from sae_lens_auxk.hub.model_card import TAGS, comparison_part, sae_part, with_part
from sae_lens_auxk.saelens.evaluation import Evaluation, write_evaluation
from tests import tiny_model
from tests.compare.fake_results import fake_results
from tests.helpers import ARCHITECTURES, build_sae
from tests.hub.saes import PNG, comparison

REPO = "me/saes"


def save(folder: Path, architecture: str = "auxk-topk", **fields: Any) -> Path:
    build_sae(architecture, **fields).save_inference_model(folder)
    return folder


def row(part: str, name: str) -> str:
    (value,) = re.findall(rf"^\| {re.escape(name)} \| (.*) \|$", part, re.MULTILINE)
    return value


def test_what_it_says_about_an_sae(tmp_path: Path) -> None:
    fields = {"aux_variant": "reanimation", "k_aux": None, "aux_warm_up_steps": 7}
    part = sae_part(REPO, "l6/a", save(tmp_path / "a", "auxk-batchtopk", **fields), None)
    assert row(part, "inference architecture") == "`jumprelu`"
    assert row(part, "trained as") == "`auxk-batchtopk`"
    assert (row(part, "d_in"), row(part, "d_sae"), row(part, "k")) == ("`8`", "`24`", "`3`")
    assert row(part, "aux_variant") == "`reanimation`"
    assert row(part, "aux_loss_coefficient") == "`None`, the variant's own: `0.001`"
    assert row(part, "dead_criterion") == "`None`, the variant's own: `batch`"
    assert row(part, "k_aux") == "`None`"
    assert row(part, "aux_warm_up_steps") == "`7`"
    assert 'SAE.from_pretrained("me/saes", "l6/a")' in part


def test_it_says_what_was_fitted_to_the_run(tmp_path: Path) -> None:
    folder = save(tmp_path / "a", resample_every_steps=10)
    cfg = json.loads((folder / "cfg.json").read_text())
    cfg["metadata"]["fitted"] = {"dead_threshold_tokens": 1280, "resample_stop_step": 70}
    (folder / "cfg.json").write_text(json.dumps(cfg))
    part = sae_part(REPO, "a", folder, None)
    assert row(part, "dead_threshold_tokens") == "`None`, fitted to the run: `1280`"
    assert row(part, "resample_stop_step") == "`None`, fitted to the run: `70`"
    assert row(part, "resample_every_steps") == "`10`"


def test_it_says_what_train_measured_of_these_weights(tmp_path: Path) -> None:
    folder = save(tmp_path / "a")
    names = ("explained variance", "CE loss score", "CE loss", "L0", "silent latents")
    part = sae_part(REPO, "a", folder, None)
    assert [row(part, name) for name in names] == ["not measured"] * 5
    found: Evaluation = {
        "explained_variance": 0.8125,
        "l0": 3.0,
        "silent_latents": 5,
        "tokens": 4096,
        "ce_loss": 3.5,
        "ce_loss_with_sae": 3.75,
        "ce_loss_score": 0.9,
        "ce_tokens": 2048,
    }
    write_evaluation(folder, found)
    part = sae_part(REPO, "a", folder, None)
    losses = "3.750, and 3.500 without the SAE, in 2,048 tokens"
    values = ["0.812", "0.900", losses, "3.0", "5 of 24 in 4,096 tokens"]
    assert [row(part, name) for name in names] == values
    assert part.count("silent") == 1
    assert "a/evaluation.json" in upload_sae(folder, REPO, dry_run=True).sizes
    save(folder)  # other weights
    assert row(sae_part(REPO, "a", folder, None), "L0") == "not measured"
    (folder / "evaluation.json").write_text('{"l0": "x"}')
    with pytest.raises(HubError, match="evaluation.json has no explained_variance"):
        upload_sae(folder, REPO, dry_run=True)


def test_local_paths_are_not_in_it(tmp_path: Path) -> None:
    made = comparison(tmp_path / "made", n_seeds=1)
    texts = tmp_path / "secret" / "texts"
    texts.mkdir(parents=True)
    results: Any = json.loads((made / "results.json").read_text())
    results["command"] = f"sae-lens-auxk compare --dataset_path {texts} --output={tmp_path}/out"
    results["comparison"] |= {"model_name": "../secret/gpt", "dataset_path": str(texts)}
    results["comparison"]["language_model"] = {
        "cached_activations_path": "/secret/a",
        "model_from_pretrained_kwargs": {"cache_dir": "/secret/b", "dirs": ["C:\\secret\\c"]},
    }
    results["data"] |= {"model_name": "../secret/gpt", "dataset_path": str(texts)}
    results["data"]["description"] = f"../secret/gpt, blocks.1.hook_resid_pre, text {texts}"
    (made / "results.json").write_text(json.dumps(results))
    folder = made / "runs/seed-0/auxk-k3"
    cfg = json.loads((folder / "cfg.json").read_text())
    cfg["metadata"] |= {"model_name": "openai-community/gpt2", "dataset_path": str(texts)}
    (folder / "cfg.json").write_text(json.dumps(cfg))
    fields = tiny_model.run_fields(model_name=str(texts), dataset_path=str(texts))
    (folder / "runner_cfg.json").write_text(json.dumps(runner_config("topk", **fields).to_dict()))
    for card in (
        upload_sae(made, REPO, dry_run=True).card,
        upload_sae(folder, REPO, dry_run=True).card,
    ):
        assert "secret" not in card
        assert row(card, "dataset") == "`PATH/TO/texts`"
        assert row(card, "model") == "`openai-community/gpt2`"
    assert (
        "compare --dataset_path PATH/TO/texts --output=PATH/TO/out\n"
        in upload_sae(made, REPO, dry_run=True).card
    )
    assert "    dataset_path='PATH/TO/texts',\n" in card


def test_what_the_spreads_are_of(tmp_path: Path) -> None:
    results: Any = fake_results(cases=("auxk",), ks=(25,), seeds=(0, 1, 2))
    saes = {"auxk": save(tmp_path / "auxk")}
    for run in results["runs"]:
        run["status"] = "unfinished"
    results["runs"][0] |= {"status": "finished", "folder": "auxk"}
    part = comparison_part(REPO, saes, results, "", [])
    assert (
        "Mean ± sample standard deviation over the seeds of each group (of found again, best "
        "cosine, matched cosine: over pairs of seeds)." in part
    )
    for group in results["groups"]:
        group["mean"] = {"l0": 25.0}
    assert "of each group.\n" in comparison_part(REPO, saes, results, "", [])


def test_another_dtype_is_part_of_how_to_load_it(tmp_path: Path) -> None:
    part = sae_part(REPO, "a", save(tmp_path / "a", dtype="bfloat16"), None)
    assert 'SAE.from_pretrained("me/saes", "a", dtype="bfloat16")' in part


@pytest.mark.parametrize("architecture", [*ARCHITECTURES, "topk", "gated"])
def test_its_code_gives_the_configuration_again(architecture: str, tmp_path: Path) -> None:
    sae_fields: dict[str, Any] = {} if architecture[:4] != "auxk" else {"aux_bias": "none"}
    if "topk" in architecture:
        sae_fields["k"] = 5
    if "matryoshka" in architecture:
        sae_fields["matryoshka_widths"] = [12, 48]
    cfg = runner_config(
        architecture,
        **tiny_model.run_fields(
            **sae_fields, exclude_special_tokens=[0, 3], seqpos_slice=(1, None), seed=7, lr_end=1e-5
        ),
    )
    folder = save(tmp_path / "a")
    (folder / "runner_cfg.json").write_text(json.dumps(cfg.to_dict()))
    part = sae_part(REPO, "a", folder, None)
    (code,) = re.findall(r"```python\nimport torch\n(.*?)torch.manual_seed", part, re.DOTALL)
    names: dict[str, Any] = {}
    exec(code, names)
    again = names["cfg"]
    assert isinstance(again, LanguageModelSAERunnerConfig)
    # Where it writes to and how it is watched is up to who runs it.
    for name in ("checkpoint_path", "output_path", "verbose", "n_eval_batches", "logger"):
        setattr(again, name, getattr(cfg, name))
    assert json.loads(json.dumps(again.to_dict())) == json.loads(json.dumps(cfg.to_dict()))
    assert code.count("\n") < 40


def test_values_do_not_break_the_table(tmp_path: Path) -> None:
    folder = save(tmp_path / "a")
    cfg = json.loads((folder / "cfg.json").read_text())
    cfg["metadata"]["dataset_path"] = "a|b`c\nd"
    (folder / "cfg.json").write_text(json.dumps(cfg))
    assert row(sae_part(REPO, "a", folder, None), "dataset") == "`a\\|b'c d`"


def test_a_new_card_and_a_second_part() -> None:
    first = with_part(None, "SAE a", "## a\n\nfirst", REPO)
    assert first.startswith("---\nlibrary_name: saelens\ntags:\n- saelens\n")
    assert "# saes\n\n<!-- sae-lens-auxk start: SAE a -->\n## a\n" in first
    second = with_part(first, "SAE b", "## b", REPO)
    assert second.startswith(first)
    assert with_part(second, "SAE b", "## b", REPO) == second
    changed = with_part(second, "SAE a", r"## a \1 changed", REPO)
    assert changed == second.replace("## a\n\nfirst", r"## a \1 changed")


def test_what_people_wrote_stays() -> None:
    people = (
        "---\n# a comment\nlicense: mit\nlibrary_name: other\ntags: [mine]\n---\n"
        "Their *intro*.  \n\n{before}\n\n\nTheir end, without a newline"
    )
    added = with_part(people, "SAE a", "ours", REPO)
    data = ModelCard(added).data
    assert data.license == "mit"
    assert data.library_name == "other"
    assert data.tags == ["mine", *TAGS]
    assert people.split("---\n", 2)[2] in added

    # With nothing to add to the front matter, it stays as it is written, comments too.
    with_tags = people.replace("[mine]", f"[mine, {', '.join(TAGS)}]")
    part = "<!-- sae-lens-auxk start: SAE a -->\n{}\n<!-- sae-lens-auxk end: SAE a -->"
    ours = with_tags.replace("{before}", part.format("old"))
    assert with_part(ours, "SAE a", "new", REPO) == with_tags.replace(
        "{before}", part.format("new")
    )


def test_line_ends_stay_as_they_are() -> None:
    card = f"---\r\nlibrary_name: saelens\r\ntags: [{', '.join(TAGS)}]\r\n---\r\n\r\nTheirs.\r\n"
    added = with_part(card, "SAE a", "one\ntwo", REPO)
    assert added.startswith(card)
    assert "\n" not in added.replace("\r\n", "")


@pytest.mark.parametrize(
    ("card", "message"),
    [
        ("---\na: [\n---\nText", "front matter of me/saes's README.md is broken"),
        (
            "---\ntags: 5\n---\nText",
            "README.md has a field of a wrong type, such as tags that",
        ),
        ("---\n- a\n---\nText", "front matter of me/saes's README.md is broken"),
        ("<!-- sae-lens-auxk start: SAE a -->", "only one of the markers"),
        ("<!-- sae-lens-auxk end: SAE a -->", "only one of the markers"),
    ],
)
def test_a_card_that_cannot_be_extended_is_refused(card: str, message: str) -> None:
    with pytest.raises(HubError, match=message):
        with_part(card, "SAE a", "ours", REPO)


def test_tags_that_are_no_list() -> None:
    data = ModelCard(with_part("---\ntags: mine\n---\n", "SAE a", "ours", REPO)).data
    assert data.tags == ["mine", *TAGS]
    assert ModelCard(with_part("---\ntags:\n---\n", "SAE a", "ours", REPO)).data.tags == [*TAGS]


NASTY = (
    "<script>alert(1)</script> <!-- sae-lens-auxk end: comparison --> [x](javascript:a) "
    "*b* `c` &lt;img&gt; | ```\n# not a heading\n```\n<img src=x onerror=a>"
)


def test_names_cannot_say_anything_but_themselves(tmp_path: Path) -> None:
    """As text of the card, a name is escaped; in code, it cannot end the code."""
    made = comparison(tmp_path / "made", n_seeds=1)
    (made / "figures" / "a](x) <b>.png").write_bytes(PNG)
    results: Any = json.loads((made / "results.json").read_text())
    results |= {"name": NASTY, "machine": NASTY, "command": NASTY, "comparison": {"a": NASTY}}
    results["data"]["description"] = results["runs"][0]["name"] = NASTY
    results["runs"][0]["case"] = NASTY
    (made / "results.json").write_text(json.dumps(results))
    folder = made / "runs/seed-0/auxk-k3"
    cfg = json.loads((folder / "cfg.json").read_text())
    cfg["metadata"] |= {"model_name": NASTY, "hook_name": NASTY, "training_architecture": NASTY}
    (folder / "cfg.json").write_text(json.dumps(cfg))
    card = upload_sae(made, REPO, dry_run=True).card
    code = re.compile(r"^(`{3,})\w*\n.*?^\1$|(?<!\\)`[^`\n]*`", re.DOTALL | re.MULTILINE)
    outside = code.sub("", card)
    for character in "<[*`":
        tags = r"</?details>|</?summary>|<!-- sae-lens-auxk \w+: comparison -->"
        links = r"!?\[[^]\n]*\]\((?:figures/)?[\w.%-]+\)|\[SAELens\]\(\S+\)"
        left = re.sub(f"{tags}|{links}", "", outside.replace("\\[", "").replace("\\]", ""))
        assert not re.search(rf"(?<!\\){re.escape(character)}", left), left
    assert not re.search("^# not", outside, re.MULTILINE)
    assert "figures/a%5D%28x%29%20%3Cb%3E.png" in card
    # The next upload finds the part's own end.
    assert card.count("<!-- sae-lens-auxk end: comparison -->") == 1
    assert "ours" in (again := with_part(card, "comparison", "ours", REPO))
    assert "script" not in again
