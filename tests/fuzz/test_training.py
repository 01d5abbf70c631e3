"""Kill training runs at random times, and corrupt batches in the middle of them.

A kill: a small training with checkpoints, by SAELens's runner, gets SIGKILL at a random time, and
once or twice more after it has resumed from its newest whole checkpoint. In the end its weights,
counters, firing rates and config must be those of an undisturbed training, bit for bit. SAELens
writes runner_cfg.json last, so a checkpoint with that file, readable, is whole.

A fault: a random architecture, variant, precision and normalisation is trained for 24 steps, and
in three of them the batch has bad rows, or none. A training is lost unless all weights are finite
in the end and the last step has changed them. SAELens's own architecture gets the same batches;
"does not train" are those that fail without a fault, for its auxiliary loss refuses a run-time
normalisation. Those are printed only.
"""

import json
import multiprocessing
import os
import random
import sys
import time
from collections import Counter
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
import torch
from sae_lens import LanguageModelSAETrainingRunner
from sae_lens.saes.sae import TrainingSAE
from safetensors.torch import load_file

from sae_lens_auxk import runner_config
from tests import tiny_model
from tests.fuzz import LENGTH, some_random
from tests.helpers import PAIRS, STOCK, build_config, build_trainer, kill_latents

N_STEPS = 48
N_CHECKPOINTS = 12
END = "end.pt"

# --- kills -----------------------------------------------------------------------------------


def some_training(rng: random.Random) -> tuple[str, dict[str, Any]]:
    """An architecture and fields of a run."""
    architecture, variant = rng.choice(PAIRS)
    fields: dict[str, Any] = {
        "aux_variant": variant,
        "dead_threshold_tokens": rng.choice((64, 200)),
        "dead_criterion": rng.choice((None, "tokens", "steps", "batch")),
        "dead_feature_window": 3,
        "aux_warm_up_steps": rng.choice((0, 7)),
        "aux_batch_fraction": rng.choice((1.0, 0.5)),
        "lr_warm_up_steps": 3,
        "normalize_activations": rng.choice(("none", "none", "expected_average_only_in")),
        "n_batches_for_norm_estimate": 2,
    }
    if rng.random() < 0.5:
        fields |= {"aux_decay_start_step": 12, "aux_decay_steps": 30}
    if "topk" in architecture:
        fields["k"] = 4
    if "matryoshka" in architecture:
        fields["matryoshka_widths"] = [12, 24, 48]
        fields["use_matryoshka_aux_loss"] = variant != "multi_topk" and rng.random() < 0.5
    return architecture, fields


class Training:
    """A SAELens run in its own process, in a folder from which it can resume."""

    model = tiny_model.gpt2()
    tokens = tiny_model.tokens(400)

    def __init__(self, architecture: str, fields: dict[str, Any], folder: Path) -> None:
        self.architecture, self.fields, self.folder = architecture, fields, folder
        folder.mkdir()

    def start(self) -> BaseProcess:
        # Imports take longer than a training.
        fork = multiprocessing.get_context("fork")
        process = fork.Process(target=self._run, args=(self.newest(),))
        process.start()
        return process

    def _run(self, checkpoint: Path | None) -> None:
        said = os.open(self.folder / "said.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(said, 1)
        os.dup2(said, 2)
        cfg = runner_config(
            self.architecture,
            **tiny_model.run_fields(
                **self.fields,
                training_tokens=N_STEPS * 64,
                n_checkpoints=N_CHECKPOINTS,
                checkpoint_path=str(self.folder / "checkpoints"),
                output_path=str(self.folder / "output"),
                resume_from_checkpoint=None if checkpoint is None else str(checkpoint),
            ),
        )
        torch.manual_seed(1)
        sae = TrainingSAE.from_dict(cfg.sae.to_dict())
        kill_latents(sae, 15)
        trained = LanguageModelSAETrainingRunner(cfg, self.tokens, self.model, sae).run()
        torch.save(trained.state_dict(), self.folder / END)
        os._exit(0)

    def checkpoints(self) -> list[Path]:
        found = [*self.folder.glob("checkpoints/*/*")]
        return sorted(found, key=lambda path: int(path.name))

    def newest(self) -> Path | None:
        return next((path for path in reversed(self.checkpoints()) if is_whole(path)), None)

    def end(self) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        """Tensors and config of the finished training."""
        tensors = dict(torch.load(self.folder / END))
        for name in ("sae_weights", "sparsity"):
            for key, value in load_file(self.folder / f"output/{name}.safetensors").items():
                tensors[f"{name}: {key}"] = value
        return tensors, json.loads((self.folder / "output/cfg.json").read_text())


def is_whole(checkpoint: Path) -> bool:
    try:
        return bool(json.loads((checkpoint / "runner_cfg.json").read_text()))
    except (OSError, ValueError):
        return False


@pytest.mark.filterwarnings("ignore")
def test_a_killed_training_ends_as_an_undisturbed_one(tmp_path: Path) -> None:
    rng = some_random()
    what = ("kills", "resumed", "begun again", "half-written checkpoints", "trainings", "equal")
    counts = dict.fromkeys(what, 0)
    used: set[tuple[str, str]] = set()
    while counts["kills"] < 3 * LENGTH:
        architecture, fields = some_training(rng)
        used.add((architecture, fields["aux_variant"]))
        folder = Path(tmp_path, str(counts["trainings"]))
        folder.mkdir()
        whole = Training(architecture, fields, folder / "whole")
        begin = time.perf_counter()
        undisturbed = whole.start()
        undisturbed.join()
        seconds = time.perf_counter() - begin
        assert undisturbed.exitcode == 0, (whole.folder / "said.txt").read_text()
        killed = Training(architecture, fields, folder / "killed")
        for _ in range(rng.choice((1, 2, 3))):
            victim = killed.start()
            victim.join(rng.uniform(0, 1) * seconds)
            victim.kill()
            victim.join()
            if victim.exitcode == 0:
                break
            assert victim.exitcode == -9, (killed.folder / "said.txt").read_text()
            counts["kills"] += 1
            counts["half-written checkpoints"] += sum(
                not is_whole(path) for path in killed.checkpoints()
            )
            counts["resumed" if killed.newest() else "begun again"] += 1
        last = killed.start()
        last.join()
        assert last.exitcode == 0, (killed.folder / "said.txt").read_text()
        counts["trainings"] += 1
        differing = differences(whole.end(), killed.end())
        counts["equal"] += not differing
        if differing:
            print(f"not equal: {architecture} {fields}: {differing}", file=sys.stderr)
    print("\n" + ", ".join(f"{n} {name}" for name, n in counts.items()), f"({len(used)} pairs)")
    assert counts["equal"] == counts["trainings"]
    assert counts["resumed"]


def differences(a: tuple[Any, Any], b: tuple[Any, Any]) -> list[str]:
    names = [name for name in a[0] if not torch.equal(a[0][name], b[0][name])]
    return names + [name for name in a[1] if a[1][name] != b[1][name]]


# --- faults ----------------------------------------------------------------------------------

D_IN, BATCH = 8, 16


def _some_rows(value: float) -> Callable[[torch.Tensor], torch.Tensor]:
    def spoil(x: torch.Tensor) -> torch.Tensor:
        x[torch.rand(len(x)) < 0.3] = value
        x[0, 0] = value
        return x

    return spoil


def _scaled(factor: float) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda x: torch.cat([x[:1] * factor, x[1:]])


def _extremes(dtype: torch.dtype) -> Callable[[torch.Tensor], torch.Tensor]:
    info = torch.finfo(dtype)
    values = torch.tensor([info.max, info.min, info.tiny, -info.tiny, 0.0])
    return lambda x: values[torch.randint(len(values), x.shape)].to(x.dtype)


FAULTS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "nothing": lambda x: x,
    "rows with NaN": _some_rows(float("nan")),
    "rows with infinity": _some_rows(float("inf")),
    "rows of zeros": _some_rows(0.0),
    "constant rows": _some_rows(3.0),
    "a row of norm 1e6": _scaled(1e6),
    "a row of norm 1e12": _scaled(1e12),
    "a row of norm 1e30": _scaled(1e30),
    "a row of norm 1e-30": _scaled(1e-30),
    "a batch of NaN": lambda x: torch.full_like(x, torch.nan),
    "a batch of zeros": torch.zeros_like,
    "a constant batch": torch.ones_like,
    "one row": lambda x: x[:1],
    "no row": lambda x: x[:0],
    "float16's extremes": _extremes(torch.float16),
    "bfloat16's extremes": _extremes(torch.bfloat16),
}


def survives(cfg: Any, spoil: Callable[[torch.Tensor], torch.Tensor], steps: set[int]) -> str:
    """What becomes of a training: "kept", "refused" (and went on) or "lost"."""
    torch.manual_seed(0)
    sae = TrainingSAE.from_dict(cfg.to_dict())
    kill_latents(sae, 8) if hasattr(sae, "tokens_since_fired") else None
    trainer = build_trainer(sae, dead_feature_window=2, train_batch_size_samples=BATCH)
    result = "kept"
    before: list[torch.Tensor] = []
    for step in range(24):
        x = torch.randn(BATCH, D_IN, dtype=sae.dtype)
        before = [parameter.detach().clone() for parameter in sae.parameters()]
        try:
            trainer.step(spoil(x) if step in steps else x)
        except (ValueError, IndexError, RuntimeError):
            if step not in steps:
                return "lost"
            result = "refused"
        trainer.n_training_steps += 1
    after = [*sae.parameters()]
    finite = all(parameter.isfinite().all() for parameter in after)
    moved = any(not torch.equal(a, b) for a, b in zip(before, after, strict=True))
    return result if finite and moved else "lost"


@pytest.mark.filterwarnings("ignore")
def test_no_fault_loses_a_training() -> None:
    rng = some_random()
    ours: dict[str, Counter[str]] = {name: Counter() for name in FAULTS}
    stock: dict[str, Counter[str]] = {name: Counter() for name in FAULTS}
    works: dict[tuple[str, ...], bool] = {}
    for i in range(48 * LENGTH):
        fault = [*FAULTS][i % len(FAULTS)]
        architecture, variant = rng.choice(PAIRS)
        modes = ("none", "layer_norm", "constant_norm_rescale")
        shared: dict[str, Any] = {
            "dtype": rng.choice(("float32", "float32", "float32", "bfloat16")),
            "normalize_activations": rng.choice(modes),
        }
        config_class = type(build_config(architecture))
        if shared["normalize_activations"] in config_class.unsupported_normalizations:
            shared["normalize_activations"] = "none"
        cfg = build_config(
            architecture,
            aux_variant=variant,
            dead_threshold_tokens=32,
            dead_criterion=rng.choice((None, "tokens", "steps", "batch")),
            aux_bias=rng.choice(("decoder", "matched", "none")),
            aux_batch_fraction=rng.choice((1.0, 0.5)),
            **shared,
        )
        steps = {*rng.sample(range(1, 20), 3)}
        result = survives(cfg, FAULTS[fault], steps)
        ours[fault][result] += 1
        if result == "lost":
            print(f"lost: {fault} {architecture} {variant} {cfg.to_dict()}", file=sys.stderr)
        theirs = build_config(STOCK[architecture], **shared)
        key = (theirs.architecture(), *shared.values())
        if key not in works:
            works[key] = survives(theirs, FAULTS["nothing"], set()) == "kept"
        result = survives(theirs, FAULTS[fault], steps) if works[key] else "does not train"
        stock[fault][result] += 1
    outcomes = ("kept", "refused", "lost")
    titles = ("fault", "trainings", *outcomes, "SAELens: kept", *outcomes[1:], "does not train")
    print("\n|", " | ".join(titles), "|")
    print("|---" * len(titles) + "|")
    both = {name: (ours[name], stock[name]) for name in FAULTS}
    both["all"] = sum(ours.values(), Counter()), sum(stock.values(), Counter())
    for name, counters in both.items():
        cells = [counter[what] for counter in counters for what in outcomes]
        cells.append(counters[1]["does not train"])
        print(f"| {name} |", counters[0].total(), "|", " | ".join(map(str, cells)), "|")
    assert not both["all"][0]["lost"]
