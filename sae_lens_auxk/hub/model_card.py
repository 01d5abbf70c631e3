"""The model card: what was trained, how well, how to load it and how to train it again.

A card belongs to the owner of the repository. This module writes one part of it for each SAE or
comparison, between two marker comments, and changes nothing else.
"""

import json
import pprint
import re
from collections.abc import Sequence
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any
from urllib.parse import quote

import yaml
from huggingface_hub import ModelCard
from sae_lens import LanguageModelSAERunnerConfig

from sae_lens_auxk.compare.schema import ACROSS_SEEDS, METRICS, Group, Numbers, Results
from sae_lens_auxk.config import AuxConfig
from sae_lens_auxk.hub.errors import HubError
from sae_lens_auxk.hub.private import public_command, public_fields, public_name
from sae_lens_auxk.hub.sae_folder import read_json, sae_id_of
from sae_lens_auxk.losses.registry import AUX_LOSSES
from sae_lens_auxk.saelens.evaluation import read_evaluation, shown
from sae_lens_auxk.saelens.names import (
    RUNNER_CFG_FILENAME,
    SAE_CFG_FILENAME,
    SAE_TRAINING_CLASS_REGISTRY,
)

TAGS = ("saelens", "sparse-autoencoder", "mechanistic-interpretability")

# Output paths and logging do not change what was trained.
_NOT_REPRODUCED = {
    *("sae", "logger", "verbose", "n_eval_batches", "eval_batch_size_prompts"),
    *("n_checkpoints", "checkpoint_path", "save_final_checkpoint", "resume_from_checkpoint"),
    *("output_path", "llm_device", "act_store_device", "hook_eval", "metadata"),
    *("sae_lens_version", "sae_lens_training_version"),
}


def with_part(card: str | None, name: str, part: str, repo_id: str) -> str:
    """Replace the card's part of that name by ``part``, or add it at the end.

    The front matter gets ``library_name`` and tags if it lacks them.

    Raises:
        HubError: the card's front matter or its markers cannot be read.
    """
    if card is None:
        card = f"---\nlibrary_name: saelens\n---\n\n# {repo_id.split('/')[1]}\n"
    newline = "\r\n" if "\r\n" in card else "\n"
    start, end = (f"<!-- sae-lens-auxk {which}: {name} -->" for which in ("start", "end"))
    # A value that holds a marker must not end the part.
    inside = part.strip().replace("<!-- sae-lens-auxk", "<!-sae-lens-auxk")
    part = f"{start}\n{inside}\n{end}".replace("\n", newline)
    try:
        model_card = ModelCard(card)
    except (ValueError, yaml.YAMLError) as error:
        raise HubError(f"the front matter of {repo_id}'s README.md is broken: {error}") from error
    except (TypeError, AttributeError, KeyError) as error:
        raise HubError(
            f"the front matter of {repo_id}'s README.md has a field of a wrong type, such as "
            f"tags that are not a list: {error}"
        ) from error
    text = model_card.text
    if start in text and end in text and text.index(start) < text.index(end):
        before, rest = text.split(start, 1)
        text = before + part + rest.split(end, 1)[1]
    elif start in text or end in text:
        raise HubError(f"{repo_id}'s README.md has only one of the markers {start} and {end}.")
    else:
        text = text.rstrip("\r\n") + 2 * newline + part + newline

    data = model_card.data
    before_merge = data.to_dict()
    data["library_name"] = data.get("library_name", "saelens")
    tags: list[str] = data.get("tags") or []
    data["tags"] = [*tags, *(tag for tag in TAGS if tag not in tags)]
    front_matter = card[: len(card) - len(model_card.text)]
    model_card.text = text
    # Front matter that has not changed is kept as text, because dumping it loses YAML comments.
    return front_matter + text if data.to_dict() == before_merge else str(model_card)


def sae_part(repo_id: str, sae_id: str, folder: Path, samples: int | None) -> str:
    """The card's part for one SAE.

    Args:
        repo_id: the repository.
        sae_id: the SAE's name in it.
        folder: the local folder of the SAE as it is published.
        samples: what a checkpoint had been trained on; None for a finished SAE.
    """
    runner_cfg = _optional_json(folder / RUNNER_CFG_FILENAME)
    sections = [
        f"## {sae_id}",
        f"A training checkpoint, after {samples:,} tokens." if samples else "",
        _description(
            folder,
            samples or (runner_cfg or {}).get("training_tokens"),
            shown(read_evaluation(folder), read_json(folder / SAE_CFG_FILENAME)["d_sae"]),
        ),
        "### How to load it",
        _load(repo_id, sae_id, folder),
        "### How to train it again",
        _reproduce(runner_cfg),
    ]
    return "\n\n".join(section for section in sections if section)


def comparison_part(
    repo_id: str,
    saes: dict[str, Path],
    results: Results,
    prefix: str,
    reports: Sequence[str],
) -> str:
    """The card's part for a comparison: its groups, its figures, and a section for each SAE.

    Args:
        repo_id: the repository.
        saes: the local folders of the SAEs as they are published, by SAE id.
        results: the content of results.json.
        prefix: what each SAE id begins with.
        reports: paths of the comparison's report in the repository.
    """
    runs = results["runs"]
    n_finished = sum(run["status"] == "finished" for run in runs)
    data, groups = results.get("data", {}), results.get("groups", [])
    first = next(iter(saes))
    sections = [
        f"## {_text(results['name'])}",
        f"{n_finished} of {len(runs)} runs, trained side by side on "
        f"{_text(_data(data))}. "
        f"Mean ± sample standard deviation over the seeds of each group{_over_pairs(groups)}.",
        _groups_table(groups),
        _definitions(groups),
        *(
            f"![{_text(Path(path).stem.replace('_', ' '))}]({quote(path)})"
            for path in reports
            if path.endswith(".png")
        ),
        "More: "
        + ", ".join(
            f"[{_text(path)}]({quote(path)})" for path in reports if not path.endswith(".png")
        )
        + ".",
        "### How to load one",
        _load(repo_id, first, saes[first]),
        "### How to train them again",
        _fenced("bash", public_command(results["command"])) if results["command"] else "",
        _folded(
            "The whole configuration",
            _fenced("yaml", yaml.safe_dump(public_fields(results["comparison"]), sort_keys=False)),
        ),
        f"Trained on {_text(results['machine'])}." if results.get("machine") else "",
        "### The SAEs",
    ]
    finished = {prefix + sae_id_of(run): run for run in runs if run["status"] == "finished"}
    for sae_id, folder in saes.items():
        run = finished[sae_id]
        sections += [
            f"#### {sae_id}",
            f"{_text(run['name'])}: {_figures(run['metrics'])}",
            _folded("What it is", _description(folder, run["training_samples"], {})),
        ]
    return "\n\n".join(section for section in sections if section)


def _data(data: dict[str, Any]) -> str:
    text = str(data.get("description") or data.get("kind", "the same activations"))
    for name in ("model_name", "dataset_path"):
        if isinstance(path := data.get(name), str) and path:
            text = text.replace(path, public_name(path))
    return text


def _description(folder: Path, samples: int | None, measured: dict[str, str]) -> str:
    cfg = read_json(folder / SAE_CFG_FILENAME)
    metadata = public_fields(cfg.get("metadata", {}))
    details: dict[str, Any] = dict(metadata.get("training_architecture_details") or {})
    trained_as = metadata.get("training_architecture")
    hook_name = metadata.get("hook_name")
    facts = {
        "inference architecture": cfg["architecture"],
        "trained as": trained_as,
        "model": metadata.get("model_name"),
        "hook point": hook_name,
        "dataset": metadata.get("dataset_path"),
        "tokens" if hook_name else "samples": f"{samples:,}" if samples else None,
        "context size": metadata.get("context_size"),
        "d_in": cfg["d_in"],
        "d_sae": cfg["d_sae"],
        "k": cfg.get("k", details.pop("k", None)),
        "dtype": cfg.get("dtype"),
        "normalize_activations": cfg.get("normalize_activations"),
        "trained with SAELens": metadata.get("sae_lens_training_version"),
    }
    rows = [(name, _code(value)) for name, value in facts.items() if value is not None]
    rows += measured.items()
    sections = [_table(("", ""), rows)]
    aux = {f.name: details.pop(f.name) for f in fields(AuxConfig) if f.name in details}
    if aux:
        fitted: dict[str, Any] = metadata.get("fitted") or {}
        rows = [(name, _code(value) + _resolved(name, aux, fitted)) for name, value in aux.items()]
        sections += ["Its auxiliary loss against dead latents:", _table(("field", "value"), rows)]
    if details:
        rows = [(name, _code(value)) for name, value in details.items()]
        sections.append(_folded("Other fields of its training", _table(("field", "value"), rows)))
    return "\n\n".join(sections)


def _resolved(name: str, aux: dict[str, Any], fitted: dict[str, Any]) -> str:
    """The meaning of a field with the value None."""
    loss = AUX_LOSSES.get(aux.get("aux_variant", ""))
    if aux[name] is not None or loss is None:
        return ""
    if name in fitted:
        return f", fitted to the run: {_code(fitted[name])}"
    if name == "aux_loss_coefficient":
        return f", the variant's own: {_code(loss.default_coefficient)}"
    if name == "dead_criterion":
        return f", the variant's own: {_code(loss.default_dead_criterion)}"
    return ""


def _load(repo_id: str, sae_id: str, folder: Path) -> str:
    dtype = read_json(folder / SAE_CFG_FILENAME).get("dtype", "float32")
    arguments = f'"{repo_id}", "{sae_id}"'
    # Without a dtype, from_pretrained converts to float32.
    if dtype.removeprefix("torch.") != "float32":
        arguments += f', dtype="{dtype.removeprefix("torch.")}"'
    return (
        "With [SAELens](https://github.com/decoderesearch/SAELens) (`pip install sae-lens`), no "
        "plugin needed:\n\n"
        f"```python\nfrom sae_lens import SAE\n\nsae = SAE.from_pretrained({arguments})\n```"
    )


def _reproduce(runner_cfg: dict[str, Any] | None) -> str:
    if runner_cfg is None:
        return f"The configuration of the run was not kept ({RUNNER_CFG_FILENAME})."
    sae = runner_cfg.get("sae")
    if not isinstance(sae, dict) or sae.get("architecture") not in SAE_TRAINING_CLASS_REGISTRY:
        return f"The configuration of the run is in {RUNNER_CFG_FILENAME} beside the weights."
    sae_class = SAE_TRAINING_CLASS_REGISTRY[sae["architecture"]][1]
    keywords = {
        "architecture": sae["architecture"],
        **public_fields(_changed(LanguageModelSAERunnerConfig, runner_cfg)),
        **_changed(sae_class, sae),
    }
    arguments = "".join(
        f"    {name}={pprint.pformat(value, width=90, compact=True)},\n"
        for name, value in keywords.items()
    )
    return (
        "With sae-lens-auxk. Everything that differs from the defaults is here; all of it is in "
        f"{RUNNER_CFG_FILENAME} beside the weights.\n\n"
        + _fenced(
            "python",
            "import torch\n"
            "from sae_lens import LanguageModelSAETrainingRunner\n"
            "from sae_lens_auxk import runner_config\n\n"
            f"cfg = runner_config(\n{arguments}    log_to_wandb=False,\n)\n"
            "torch.manual_seed(cfg.seed)  # as `sae-lens-auxk train` does\n"
            "sae = LanguageModelSAETrainingRunner(cfg).run()",
        )
    )


def _changed(config_class: type, values: dict[str, Any]) -> dict[str, Any]:
    changed: dict[str, Any] = {}
    for f in fields(config_class):
        default = f.default_factory() if f.default_factory is not MISSING else f.default
        as_json = json.loads(json.dumps(default, default=str))
        if f.init and f.name not in _NOT_REPRODUCED and values.get(f.name, as_json) != as_json:
            changed[f.name] = values[f.name]
    return changed


def _groups_table(groups: list[Group]) -> str:
    metrics = _present(groups)
    rows = [
        (
            *(_text(group.get(key)) for key in ("case", "architecture", "k", "n_seeds")),
            *(METRICS[m].show(group["mean"].get(m), group["std"].get(m)) for m in metrics),
        )
        for group in groups
    ]
    return _table(
        ("case", "architecture", "k", "seeds", *(METRICS[m].label for m in metrics)), rows
    )


def _definitions(groups: list[Group]) -> str:
    lines = [f"- {METRICS[m].label}: {METRICS[m].definition}" for m in _present(groups)]
    return _folded("What the columns mean", "\n".join(lines)) if lines else ""


def _over_pairs(groups: list[Group]) -> str:
    across = [METRICS[m].label for m in _present(groups) if m in ACROSS_SEEDS]
    return f" (of {', '.join(across)}: over pairs of seeds)" if across else ""


def _present(groups: list[Group]) -> list[str]:
    return [m for m in METRICS if any(group["mean"].get(m) is not None for group in groups)]


def _figures(metrics: Numbers) -> str:
    """``EV 0.912, L0 32.0``, and so on."""
    shown = [
        f"{metric.label} {metric.show(metrics[name])}"
        for name, metric in METRICS.items()
        if metrics.get(name) is not None
    ]
    return ", ".join(shown)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _folded(summary: str, text: str) -> str:
    return f"<details><summary>{summary}</summary>\n\n{text}\n\n</details>"


def _fenced(language: str, text: str) -> str:
    longest = max((len(run) for run in re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{text.rstrip()}\n{fence}"


def _text(value: Any) -> str:
    """Markdown that shows the value on one line; a dash for None."""
    if value is None:
        return "–"
    return re.sub(r"([\\`*_<>\[\]|&])", r"\\\1", " ".join(str(value).split()))


def _code(value: Any) -> str:
    text = " ".join(str(value).replace("`", "'").split())
    return "`" + text.replace("|", "\\|") + "`"


def _optional_json(path: Path) -> dict[str, Any] | None:
    return read_json(path) if path.is_file() else None
