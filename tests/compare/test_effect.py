"""Effects of single latents, against one latent and one token at a time."""

import html
import json
import math
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from time import sleep
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sae_lens import SAE
from sae_lens.load_model import HookedProxyLM
from sae_lens.saes.standard_sae import StandardSAE, StandardSAEConfig
from safetensors.torch import save_file
from torch.nn.functional import cross_entropy
from transformers import GPT2Config, GPT2LMHeadModel

from sae_lens_auxk.compare import effect, prompts, run, sources
from sae_lens_auxk.compare.checks import resolve
from sae_lens_auxk.compare.config import Comparison, Resolved
from sae_lens_auxk.compare.effect import effects_of, habits, matched_pairs, rises
from sae_lens_auxk.compare.files import EFFECTS_FILENAME, LIVES_FILENAME, read_results
from sae_lens_auxk.compare.locks import claim_if_free
from sae_lens_auxk.compare.norms import RowFilter
from sae_lens_auxk.compare.prompts import Prompts
from sae_lens_auxk.compare.report import write_report
from sae_lens_auxk.compare.report.tables import effect_table
from sae_lens_auxk.compare.run import plan_comparison, run_comparison
from sae_lens_auxk.compare.schema import EFFECT
from sae_lens_auxk.compare.seeds import groups_of
from studies.peeking.planted import planted
from tests.compare.conftest import tiny
from tests.compare.fake_results import fake_results
from tests.compare.test_run import fail_to_build
from tests.helpers import ARCHITECTURES, build_config, build_sae
from tests.tiny_model import CONTEXT_SIZE, D_MODEL, gpt2, tokens


@pytest.fixture(autouse=True)
def _no_report(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "write_report", lambda _, folder: folder)


def small_prompts(
    model: Any, hook_name: str = "blocks.1.hook_resid_pre", n: int = 7, **fields: Any
) -> tuple[Prompts, torch.Tensor]:
    text = torch.tensor(tokens(n)["tokens"])
    is_measured = torch.ones_like(text, dtype=torch.bool)
    is_measured[:, 0] = False
    return Prompts(model, hook_name, text, is_measured, **fields), text


def inference(architecture: str, folder: Path, **fields: Any) -> Any:
    build_sae(architecture, d_in=D_MODEL, d_sae=24, **fields).save_inference_model(folder)
    return SAE.load_from_disk(folder)


@torch.no_grad()
def one_by_one(
    sae: Any, model: Any, hook_name: str, text: torch.Tensor, latent: int, most: int
) -> tuple[float, float]:
    """The mean rise of the squared error and of the CE, one prompt and one token at a time."""
    mse: list[float] = []
    ce: list[float] = []
    for row in text[:, None]:
        before, cache = model.run_with_cache(row, names_filter=[hook_name])
        x = cache[hook_name].flatten(2)[0]
        without_all = x.clone()
        fired: list[int] = []
        for position in range(1, text.shape[1] - 1):
            acts = sae.encode(x[None, position])
            if acts[0, latent] == 0 or len(mse) == most:
                continue
            reconstructed = sae.decode(acts.clone())
            only_others = sae.encode(x[None, position])
            only_others[0, latent] = 0
            without = sae.decode(only_others)
            mse.append(
                ((x[position] - without) ** 2).sum().item()
                - ((x[position] - reconstructed) ** 2).sum().item()
            )
            without_all[position] -= (reconstructed - without)[0]
            fired.append(position)
        # The change at a token is seen at those after it, not at those before it.
        for position in fired:
            changed = x.clone()
            changed[: position + 1] = without_all[: position + 1]
            instead = changed.view(cache[hook_name].shape)
            after = model.run_with_hooks(
                row, fwd_hooks=[(hook_name, lambda _, hook, instead=instead: instead)]
            )
            losses = [
                cross_entropy(logits[0, position], row[0, position + 1]).item()
                for logits in (before, after)
            ]
            ce.append(losses[1] - losses[0])
    return sum(mse) / len(mse), sum(ce) / len(ce)


HOOKS = ("blocks.1.hook_resid_pre", "blocks.0.hook_resid_post", "blocks.1.attn.hook_z",
         "blocks.1.hook_mlp_out", "blocks.0.hook_resid_pre")  # fmt: skip


@pytest.mark.parametrize("hook_name", HOOKS)
@pytest.mark.parametrize("max_firings", [3, 200])
def test_the_rises_are_those_of_one_latent_and_token_at_a_time(
    hook_name: str, max_firings: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(effect, "MAX_FIRINGS", max_firings)
    monkeypatch.setattr(effect, "LATENTS_AT_ONCE", 3)
    monkeypatch.setattr(effect, "ROWS_PER_CHUNK", 10)
    monkeypatch.setattr(prompts, "TOKENS_AT_ONCE", 5 * CONTEXT_SIZE)
    model = gpt2(init_weights=True)
    sae = inference("auxk-topk", tmp_path)
    text_prompts, text = small_prompts(model, hook_name, n=4)
    rate, _ = habits(sae, text_prompts.rows)
    latents = (rate > 0).nonzero().flatten()
    measured = rises(sae, text_prompts.rows, latents, text_prompts)
    assert len(latents) >= 8
    for i, latent in enumerate(latents.tolist()):
        expected = one_by_one(sae, model, hook_name, text, latent, max_firings)
        found = (measured["mse_rise"][i].item(), measured["ce_rise"][i].item())
        assert found == pytest.approx(expected, rel=1e-3, abs=1e-5)
    assert measured["ce_rise"].abs().max() > 1e-3


def test_a_model_of_transformers(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=50, n_positions=CONTEXT_SIZE, n_embd=D_MODEL, n_layer=2, n_head=2,
        initializer_range=0.5,
    )  # fmt: skip
    model = HookedProxyLM(GPT2LMHeadModel(config).eval(), None)  # type: ignore[arg-type]
    sae = inference("auxk-topk", tmp_path)
    hook_name = "transformer.h.0"
    text_prompts, text = small_prompts(model, hook_name, n=3)
    rate, _ = habits(sae, text_prompts.rows)
    latent = int(rate.argmax())
    measured = rises(sae, text_prompts.rows, torch.tensor([latent]), text_prompts)
    mse, ce = one_by_one(sae, model, hook_name, text, latent, 200)
    assert measured["mse_rise"].item() == pytest.approx(mse, rel=1e-3, abs=1e-4)
    assert measured["ce_rise"].item() == pytest.approx(ce, rel=1e-3, abs=1e-5)
    assert abs(ce) > 1e-4


@pytest.mark.parametrize("normalize", ["none", "layer_norm", "constant_norm_rescale"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_architecture_in_the_units_of_the_data(
    architecture: str, normalize: str, tmp_path: Path
) -> None:
    if normalize in build_config(architecture).unsupported_normalizations:
        pytest.skip("SAELens cannot train it")
    model = gpt2()
    sae = inference(architecture, tmp_path, normalize_activations=normalize)
    text_prompts, text = small_prompts(model, n=3)
    rate, _ = habits(sae, text_prompts.rows)
    latent = int(rate.argmax())
    measured = rises(sae, text_prompts.rows, torch.tensor([latent]), text_prompts)
    mse, ce = one_by_one(sae, model, "blocks.1.hook_resid_pre", text, latent, 200)
    assert measured["mse_rise"].item() == pytest.approx(mse, rel=1e-3, abs=1e-4)
    assert measured["ce_rise"].item() == pytest.approx(ce, rel=1e-3, abs=1e-5)


def test_a_forward_pass_begins_at_the_hooks_block(monkeypatch: pytest.MonkeyPatch) -> None:
    model = gpt2()
    text_prompts, _ = small_prompts(model)
    ran = []
    model.blocks[0].hook_resid_pre.add_hook(lambda x, hook: ran.append(x) or x)
    at, change = torch.tensor([0, 3]), torch.ones(2, D_MODEL)
    from_block = text_prompts.rise(at, change, together=at)
    assert not ran
    model.reset_hooks()
    monkeypatch.setattr(prompts, "_block_of", lambda *_: None)
    whole, _ = small_prompts(model)
    torch.testing.assert_close(whole.rise(at, change, together=at), from_block)


def test_prompts_measure_tokens_that_have_a_next_one_and_stay() -> None:
    model = gpt2()
    everything, text = small_prompts(model)
    assert everything.rows.shape == (7 * (CONTEXT_SIZE - 2), D_MODEL)
    norms = everything.rows.norm(dim=1)
    row_filter = RowFilter(everything.rows, 1.01)
    few, _ = small_prompts(model, row_filter=row_filter)
    assert torch.equal(few.rows, everything.rows[norms <= 1.01 * norms.median()])
    assert 0 < len(few.rows) < len(everything.rows)
    assert text.shape == (7, CONTEXT_SIZE)


def test_a_forward_pass_ends_with_the_last_token_that_is_asked_for() -> None:
    model = gpt2()
    text_prompts, _ = small_prompts(model)
    lengths: list[int] = []
    model.blocks[1].hook_resid_post.add_hook(lambda x, hook: lengths.append(x.shape[1]))
    at = torch.tensor([0, 14 + 2])  # the tokens 1 and 3 of the first two prompts
    text_prompts.rise(at, torch.ones(2, D_MODEL), together=at)
    assert lengths == [4]


def test_nothing_taken_out_changes_nothing() -> None:
    text_prompts, _ = small_prompts(gpt2())
    at = torch.arange(len(text_prompts.rows))
    risen = text_prompts.rise(at, torch.zeros(len(at), D_MODEL), together=at % 3)
    assert risen.abs().max() < 1e-5


@torch.no_grad()
def test_a_latent_that_the_next_token_depends_on_raises_the_ce() -> None:
    """A model that says token 3 where the stream points along axis 0; latent 0 is that axis, and
    latent 1 is one that the model does not read."""
    model = gpt2(normalization_type=None)
    for parameter in model.parameters():
        parameter.zero_()
    model.W_U[0, 3] = 1.0
    text = torch.full((4, CONTEXT_SIZE), 3)
    model.W_E[3, 0], model.W_E[3, 1] = 5.0, 5.0
    sae = StandardSAE(StandardSAEConfig(d_in=D_MODEL, d_sae=2))
    sae.W_enc.copy_(torch.eye(D_MODEL)[:, :2])
    sae.W_dec.copy_(torch.eye(D_MODEL)[:2])
    text_prompts = Prompts(
        model, "blocks.1.hook_resid_pre", text, torch.ones_like(text, dtype=torch.bool)
    )
    measured = rises(sae, text_prompts.rows, torch.tensor([0, 1]), text_prompts)
    # From logit 5 to logit 0, beside 49 others at 0.
    expected = math.log(50) - (math.log(math.exp(5) + 49) - 5)
    assert measured["ce_rise"].tolist() == pytest.approx([expected, 0], abs=1e-5)
    assert measured["mse_rise"].tolist() == pytest.approx([25, 25], rel=1e-5)


# --- pairs -----------------------------------------------------------------------------------


def test_pairs_are_alike_one_to_one_and_the_same_every_time() -> None:
    generator = torch.Generator().manual_seed(1)
    rate = (0.3 * torch.randn(300, generator=generator)).exp() / 100
    size = (0.3 * torch.randn(300, generator=generator)).exp()
    rate[:5] = 0
    a, b = torch.arange(100), torch.arange(100, 300)
    pairs = matched_pairs(a, b, rate, size)
    assert torch.equal(pairs, matched_pairs(a, b, rate, size))
    assert 80 < len(pairs) <= 95
    assert torch.isin(pairs[:, 0], a[5:]).all()
    assert torch.isin(pairs[:, 1], b).all()
    for side in pairs.T:
        assert side.unique().numel() == len(pairs)
    for values in (rate, size):
        ratio = values[pairs[:, 0]] / values[pairs[:, 1]]
        assert ratio.max() <= 1.25 + 1e-5
        assert ratio.min() >= 0.8 - 1e-5
    # Most pairs are closer than the factor asks for.
    assert (rate[pairs[:, 0]] / rate[pairs[:, 1]]).log().abs().mean() < 0.08


def test_the_factor_itself_is_alike_and_more_is_not() -> None:
    one = torch.ones(4)
    rate = torch.tensor([0.04, 0.04, 0.05, 0.0501])
    a, b = torch.tensor([0, 1]), torch.tensor([2, 3])
    assert matched_pairs(a[:1], b, rate, one).tolist() == [[0, 2]]
    assert matched_pairs(a, b, rate, one).shape == (1, 2)
    assert matched_pairs(a[:1], b[1:], rate, one).shape == (0, 2)
    assert matched_pairs(a[:1], b[1:], one, rate).shape == (0, 2)
    assert matched_pairs(a[:1], b[:1], one, rate).tolist() == [[0, 2]]


def test_as_many_pairs_as_possible_come_before_near_ones() -> None:
    """Latent 0 is nearest to 2, but then 1 has nobody."""
    rate = torch.tensor([1.0, 0.85, 1.01, 1.2]) / 10
    pairs = matched_pairs(torch.tensor([0, 1]), torch.tensor([2, 3]), rate, torch.ones(4))
    assert sorted(pairs.tolist()) == [[0, 3], [1, 2]]


def test_no_more_pairs_than_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    rate = torch.full((60,), 0.1)
    monkeypatch.setattr(effect, "MAX_PAIRS", 7)
    pairs = matched_pairs(torch.arange(30), torch.arange(30, 60), rate, rate)
    assert pairs.shape == (7, 2)
    monkeypatch.setattr(effect, "MATCHED", 4)
    assert matched_pairs(torch.arange(30), torch.arange(30, 60), rate, rate).shape == (4, 2)
    assert matched_pairs(torch.arange(0), torch.arange(30, 60), rate, rate).shape == (0, 2)


# --- groups ----------------------------------------------------------------------------------


def axes(n: int) -> tuple[Any, torch.Tensor]:
    """An SAE whose latents are the axes, and rows on which one of them is 2 and 1.5 is decoded."""
    sae = StandardSAE(StandardSAEConfig(d_in=n, d_sae=n))
    sae.W_enc.data, sae.W_dec.data = torch.eye(n), 0.75 * torch.eye(n)
    return sae, 2 * torch.eye(n).repeat(4, 1)


@pytest.mark.parametrize(("n", "n_pairs"), [(198, 99), (200, 100)])
def test_fewer_than_a_hundred_pairs_are_not_compared(n: int, n_pairs: int, tmp_path: Path) -> None:
    sae, x = axes(n)
    groups = {"revived": torch.arange(n // 2), "never_died": torch.arange(n // 2, n)}
    effects = effects_of(sae, x, groups, None, tmp_path / "effects.safetensors")
    assert set(effects) == {"revived", "never_died"}
    for numbers in effects.values():
        assert set(numbers) == set(EFFECT)
        assert numbers["n_pairs"] == n_pairs
        known = {name for name, value in numbers.items() if value is not None}
        if n_pairs < 100:
            assert known == {"n_pairs"}
            continue
        assert known == {"n_pairs", "firing_rate", "mean_activation", "mse_rise"}
        assert numbers["firing_rate"] == pytest.approx(1 / n)
        assert numbers["mean_activation"] == pytest.approx(1.5)
        # From an error of 0.5 to one of 2, of rows whose variance is 4 (1 - 1 / n).
        assert numbers["mse_rise"] == pytest.approx(3.75 / (4 - 4 / n), rel=1e-5)


def test_the_groups_by_hand(tmp_path: Path) -> None:
    """Latent i is axis i. Latent 5 is dead; the other seed has latents 0 and 2, and 5."""
    sae, _ = axes(8)
    runs: list[Any] = []
    for seed, rows in ((0, [0, 1, 2, 3, 4, 5, 6, 7]), (1, [0, 2, 2, 5, 0, 0, 0, 0])):
        path = tmp_path / str(seed)
        sae.W_dec.data = torch.eye(8)[rows]
        sae.save_model(path)
        lives = {
            "dead": torch.arange(8) == 5,
            "ever_dead": torch.isin(torch.arange(8), torch.tensor([0, 1, 5])),
            "alive_since": torch.zeros(8, dtype=torch.int64),
        }
        save_file(lives, path / LIVES_FILENAME)
        runs.append({"case": "", "architecture": "topk", "k": 1, "seed": seed, "folder": str(seed),
                     "status": "finished", "training_samples": 10})  # fmt: skip
    sae.W_dec.data = torch.eye(8)
    data: Any = SimpleNamespace(true_features=torch.eye(8)[:3])
    groups = effect._groups(sae, runs[0], runs, data, tmp_path)
    assert {name: latents.tolist() for name, latents in groups.items()} == {
        "revived": [0, 1],
        "never_died": [2, 3, 4, 6, 7],
        "found": [0, 2],
        "not_found": [1, 3, 4, 6, 7],
        "feature": [0, 1, 2],
        "junk": [3, 4, 6, 7],
    }
    data.true_features = None
    alone = effect._groups(sae, runs[0], runs[:1], data, tmp_path)
    assert set(alone) == {"revived", "never_died"}


def test_what_is_known_is_not_measured_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(effect, "MIN_PAIRS", 1)
    sae, x = axes(12)
    path = tmp_path / "effects.safetensors"
    measured: list[list[int]] = []
    measure = effect.rises

    def counted(sae: Any, x: torch.Tensor, latents: torch.Tensor, of: Any) -> Any:
        measured.append(latents.tolist())
        return measure(sae, x, latents, of)

    monkeypatch.setattr(effect, "rises", counted)
    first = {"found": torch.arange(2, 4), "not_found": torch.arange(8, 10)}
    more = {"found": torch.arange(0, 4), "not_found": torch.arange(8, 12)}
    before = effects_of(sae, x, first, None, path)
    assert effects_of(sae, x, first, None, path) == before
    effects_of(sae, x, more, None, path)
    assert measured == [[2, 3, 8, 9], [0, 1, 10, 11]]
    assert [file.name for file in tmp_path.iterdir()] == ["effects.safetensors"]


PLACES = torch.tensor([2, 3, 8, 9])
RISES = {"latents": PLACES, "mse_rise": torch.zeros(4)}


@pytest.mark.parametrize(
    "damaged",
    [
        None,
        {"latents": PLACES},
        {"mse_rise": torch.zeros(4)},
        RISES | {"ce_rise": torch.zeros(4)},
        RISES | {"mse_rise": torch.zeros(3)},
        RISES | {"latents": PLACES.flip(0)},
        RISES | {"latents": PLACES.float()},
        RISES | {"latents": PLACES + 10},
        {name: values.view(2, 2) for name, values in RISES.items()},
    ],
    ids=str,
)
def test_what_is_damaged_is_measured_again(
    damaged: dict[str, torch.Tensor] | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(effect, "MIN_PAIRS", 1)
    sae, x = axes(12)
    groups = {"found": torch.arange(2, 4), "not_found": torch.arange(8, 10)}
    path = tmp_path / "effects.safetensors"
    expected = effects_of(sae, x, groups, None, path)
    whole = path.read_bytes()
    if damaged is None:
        path.write_bytes(whole[:-9])
    else:
        save_file(damaged, path)
    assert effects_of(sae, x, groups, None, path) == expected
    assert path.read_bytes() == whole


def test_the_mse_does_not_tell_a_feature_from_a_corrector(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With the decoder that reconstructs best, a removal costs the mean square of what the latent
    contributes, be it a feature, or noise that matches none."""
    monkeypatch.setattr(effect, "MAX_FIRINGS", 10**9)
    worlds = planted("jumprelu", "rotation", 0)
    for kind in ("feature", "mean error", "random"):
        world = worlds[kind]
        sae, latents = world.sae, world.in_question.nonzero().flatten()
        acts = sae.encode(world.x).detach()
        sae.W_dec.data = torch.linalg.lstsq(acts, world.x - sae.b_dec.detach()).solution
        mse = rises(sae, world.x, latents, None)["mse_rise"]
        contribution = acts[:, latents] * sae.W_dec[latents].norm(dim=1).detach()
        square = (contribution**2).sum(dim=0) / (contribution != 0).sum(dim=0)
        torch.testing.assert_close(mse, square, rtol=1e-2, atol=1e-3, msg=kind)


# --- whole comparisons -----------------------------------------------------------------------


@pytest.fixture
def on_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Resolved:
    monkeypatch.setattr(sources, "load_model", lambda *_, **__: gpt2())
    tokens().to_parquet(tmp_path / "text" / "train.parquet")
    return resolve(
        Comparison(
            aux_variant=["auxk"], preset=["saelens"], k=[4], seeds=[0, 1], d_sae=48,
            training_samples=1280, batch_size=64, lr=1e-2, dead_after=128, eval_samples=200,
            effect=True, model_name="tiny", dataset_path=str(tmp_path / "text"),
            context_size=CONTEXT_SIZE,
            language_model={"streaming": False, "prepend_bos": False, "n_eval_batches": 2,
                            "store_batch_size_prompts": 4, "n_batches_in_buffer": 4},
        )
    )  # fmt: skip


def test_a_comparison_on_a_language_model(
    on_text: Resolved, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(effect, "MIN_PAIRS", 1)
    monkeypatch.setattr(effect, "ALIKE", 3)
    run_comparison(replace(on_text, effect=False), tmp_path / "out")
    assert not any("effect" in entry for entry in read_results(tmp_path / "out")["runs"])
    # Asked for later, with a seed more.
    run_comparison(replace(on_text, seeds=[0, 1, 2]), tmp_path / "out")
    results = read_results(tmp_path / "out")
    for entry in results["runs"]:
        numbers = entry["effect"]
        assert {"revived", "never_died", "found", "not_found"} == set(numbers)
        for one, other in (("revived", "never_died"), ("found", "not_found")):
            assert numbers[one]["n_pairs"] == numbers[other]["n_pairs"]
        known = [group for group in numbers.values() if group["n_pairs"]]
        assert known
        for group in known:
            assert group["ce_per_mse"] == pytest.approx(group["ce_rise"] / group["mse_rise"])
        assert (tmp_path / "out" / entry["folder"] / EFFECTS_FILENAME).is_file()
    for group in results["groups"]:
        assert group["effect"]["found"]["mean"]["mse_rise"] is not None
        assert "ce_rise" in group["effect"]["revived"]["std"]


def test_it_waits_for_all_seeds(
    on_text: Resolved, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_comparison(replace(on_text, seeds=[0], effect=False), tmp_path / "out")
    asked: list[Any] = []
    monkeypatch.setattr(run, "effects_of_pass", lambda *given: asked.append(given) or {})
    monkeypatch.setattr(run, "_train_missing", lambda *_: {})
    run_comparison(on_text, tmp_path / "out")
    assert asked == []
    run_comparison(replace(on_text, seeds=[0]), tmp_path / "out")
    assert len(asked) == 1


def test_two_processes_share_the_passes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The one that is held comes last, when it is free."""
    run_comparison(tiny(seeds=[0, 1]), tmp_path)
    asked: list[int] = []

    def ask(runs: Any, *_: Any) -> Any:
        asked.append(runs[0]["seed"])
        return {}

    monkeypatch.setattr(run, "effects_of_pass", ask)
    with ThreadPoolExecutor() as pool:
        with claim_if_free(run._lock_of(tmp_path, 0)) as is_own:
            assert is_own
            other = pool.submit(run_comparison, tiny(seeds=[0, 1], effect=True), tmp_path)
            while not asked:
                assert not other.done()
                sleep(0.05)
            sleep(0.3)
            assert asked == [1]
        other.result(timeout=60)
    assert asked == [1, 0]


def test_a_comparison_on_a_synthetic_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(effect, "MIN_PAIRS", 1)
    own_models = {"synthetic_model": {"seed": None}, "seeds": [0, 1]}
    run_comparison(tiny(effect=True, aux_variant=["auxk"], **own_models), tmp_path / "own")
    for entry in read_results(tmp_path / "own")["runs"]:
        # Each seed has features of its own, so that none can be found again.
        assert set(entry["effect"]) == {"revived", "never_died", "feature", "junk"}
        assert all(group.get("ce_rise") is None for group in entry["effect"].values())
    one_model = {"synthetic_model": {"seed": 0}, "seeds": [0, 1]}
    run_comparison(tiny(effect=True, aux_variant=["auxk"], **one_model), tmp_path / "one")
    results = read_results(tmp_path / "one")
    for entry in results["runs"]:
        assert {"found", "not_found"} < set(entry["effect"])
    # A call that does not ask for them loses nothing.
    comparison = tiny(aux_variant=["auxk"], **one_model)
    assert "effect   of single latents" in plan_comparison(comparison, tmp_path / "one")
    run_comparison(comparison, tmp_path / "one")
    assert read_results(tmp_path / "one") == results
    config = tmp_path / "one" / results["runs"][0]["folder"] / "cfg.json"
    whole = json.loads(config.read_text())
    for damaged in ("{", *(json.dumps(whole | change) for change in ({"k": [2]}, {"d_in": 5}))):
        config.write_text(damaged)
        with pytest.raises(ValueError, match=f"the SAE in {config.parent} cannot be read: .*away"):
            run_comparison(comparison, tmp_path / "one")


def test_a_case_that_cannot_be_built_does_not_cost_the_effects_of_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fail_to_build(monkeypatch, "none")
    run_comparison(tiny(effect=True), tmp_path)
    failed, finished = read_results(tmp_path)["runs"]
    assert failed["status"] == "failed"
    assert "revived" in finished["effect"]


def test_the_report_has_the_numbers_and_defines_them(tmp_path: Path) -> None:
    results = fake_results(cases=("auxk",), ks=(16,), seeds=(0, 1))
    assert effect_table(results).rows == []
    for entry, ce in zip(results["runs"], (0.01, 0.03), strict=True):
        entry["effect"] = {
            "revived": {"n_pairs": 480, "ce_rise": ce, "mse_rise": 0.004, "ce_per_mse": ce / 0.004},
            "never_died": {"n_pairs": 480, "ce_rise": 2 * ce, "mse_rise": 0.004,
                           "ce_per_mse": ce / 0.002},
            "found": {"n_pairs": 7, "ce_rise": None, "mse_rise": None, "ce_per_mse": None},
        }  # fmt: skip
    results["groups"] = list(groups_of(results["runs"]))
    table = effect_table(results)
    assert table.columns == ["case", "group", "seeds", "pairs", "CE rise", "MSE rise", "CE / MSE"]
    assert [[cell.text for cell in row[1:]] for row in table.rows] == [
        ["revived", "2", "480 ± 0", "0.0200 ± 0.0141", "0.40 ± 0.00%", "5.000 ± 3.536"],
        ["never died", "2", "480 ± 0", "0.0400 ± 0.0283", "0.40 ± 0.00%", "10.000 ± 7.071"],
        ["found", "0", "7 ± 0", "–", "–", "–"],
    ]
    page = write_report(results, tmp_path).read_text()
    for text in (page, (tmp_path / "report.md").read_text()):
        assert "480" in text
    for metric in table.metrics:
        assert html.escape(metric.definition) in page


def rows_of(seeds: list[tuple[int, float | None, float | None]]) -> list[list[str]]:
    """The rows of revived and never-dead latents with these pairs and MSE rises by seed."""
    results = fake_results(cases=("auxk",), ks=(16,), seeds=range(len(seeds)))
    for entry, (n_pairs, *both) in zip(results["runs"], seeds, strict=True):
        entry["effect"] = {
            name: {"n_pairs": n_pairs, "mse_rise": rise}
            for name, rise in zip(("revived", "never_died"), both, strict=True)
        }
    results["groups"] = list(groups_of(results["runs"]))
    return [[cell.text for cell in row[1:]] for row in effect_table(results).rows]


def test_seeds_with_too_few_pairs_are_not_in_the_means() -> None:
    few = (None, None)
    assert rows_of([(120, 0.01, 0.02), (60, *few), (90, *few)]) == [
        ["revived", "1", "120", "1.00%"],
        ["never died", "1", "120", "2.00%"],
    ]


def test_differences_of_effects_are_paired_by_seed() -> None:
    """0.01, 0.02 and 0.03, of seeds that are far apart; 4.303 * 0.01 / 3 ** 0.5 is 0.0248."""
    seeds = [(120, 0.11, 0.10), (120, 0.52, 0.50), (120, 0.33, 0.30)]
    assert rows_of([*seeds, (60, None, None)])[2] == [
        "revived less never died", "3", "–", "2.00 points (-0.48 to 4.48 points)",
    ]  # fmt: skip
    assert len(rows_of(seeds[:2])) == 2


def test_what_is_refused() -> None:
    with pytest.raises(ValueError, match="effect='yes'"):
        tiny(effect="yes")
