"""The cases of a comparison, each a named SAE config."""

import hashlib
import itertools
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from sae_lens import TrainingSAEConfig

from sae_lens_auxk.architectures import ARCHITECTURES
from sae_lens_auxk.checks import reject, require_choice, require_known, require_number
from sae_lens_auxk.compare.config import Resolved
from sae_lens_auxk.config import AuxConfig
from sae_lens_auxk.losses import BUILT_IN
from sae_lens_auxk.losses.registry import AUX_LOSSES
from sae_lens_auxk.saelens.names import get_sae_training_class
from sae_lens_auxk.saelens.pretrained import stock_architecture

STOCK = {name: stock_architecture(config) for name, (_, config) in ARCHITECTURES.items()}
"""SAELens's own architecture that each of this package's extends."""

PRESETS = ("main", "saelens", "variants", "biases")
"""The names of sets of cases; :func:`_rows_of` has the cases."""

MAX_SLUG = 200
"""File systems allow names of 255 bytes, and ``folders_of`` may add a few to a slug."""


@dataclass(frozen=True)
class Case:
    """One thing that is compared: a label, an architecture and fields of its config.

    ``lr`` is its own learning rate, or None for that of the comparison.
    """

    name: str
    architecture: str
    fields: dict[str, Any]
    lr: float | None = None

    @property
    def k(self) -> float | None:
        """Active latents per sample, if the architecture has ``k``."""
        return self.fields.get("k")

    @property
    def title(self) -> str:
        """A name with everything that distinguishes the case from the others."""
        parts = (self.name, self.architecture, *([] if self.k is None else [f"k {self.k:g}"]))
        return ", ".join(parts)

    @property
    def slug(self) -> str:
        """``title`` as a folder name; :func:`folders_of` resolves equal ones."""
        return re.sub(r"[^a-z0-9.]+", "-", self.title.lower()).strip("-")

    def sae_config(self, comparison: Resolved, d_in: int) -> TrainingSAEConfig:
        """The config to train with; a ValueError names the case and what is wrong with it."""
        config_class = get_sae_training_class(self.architecture)[1]
        known = {f.name for f in fields(config_class)}
        d_sae = comparison.d_sae
        shared = {
            "d_sae": d_sae,
            "device": comparison.device,
            "dead_threshold_tokens": comparison.dead_after,
            "matryoshka_widths": sorted({max(1, d_sae // part) for part in (32, 8, 2)} | {d_sae}),
        }
        values: dict[str, Any] = {"d_in": d_in}
        for given in (shared, comparison.sae):
            values |= {name: value for name, value in given.items() if name in known}
        values |= self.fields
        try:
            return config_class(**values)
        except (TypeError, ValueError) as error:
            raise ValueError(f"case {self.title!r}: {error}") from error


def cases_of(comparison: Resolved) -> list[Case]:
    """All cases of a resolved comparison, each once, in the order in which they are shown."""
    cases: dict[tuple[str, str, Any], Case] = {}

    def add(name: str | None, architecture: str, given: dict[str, Any]) -> None:
        _, config_class = get_sae_training_class(architecture)
        known = {f.name for f in fields(config_class)}
        allowed_fields = known - {"d_in", "d_sae", "device"} | {"lr"}
        require_known(given, allowed_fields, f"a case of {architecture}")
        if "k" in given:
            require_number("k", given["k"], "a finite number > 0", lambda k: k > 0)
        name = name or _label(architecture, given)
        lr = given.pop("lr", None)
        if lr is not None:
            require_number("lr", lr, "a finite number > 0", lambda lr: lr > 0)
        ks = [given["k"]] if "k" in given else comparison.k if "k" in known else [None]
        for k in ks:
            case = Case(name, architecture, given if k is None else {**given, "k": k}, lr)
            if len(case.slug) > MAX_SLUG:
                allowed = "shorter, since it names a folder; give the case a name"
                raise reject("name", name, allowed)
            same = cases.setdefault((name, architecture, k), case)
            if same != case:
                raise ValueError(f"cases: two different cases are both {case.title!r}; name them.")

    variants = [
        {"aux_variant": variant} | ({} if alpha is None else {"aux_loss_coefficient": alpha})
        for variant in comparison.aux_variant or []
        for alpha in comparison.aux_loss_coefficient or [None]
    ]
    rows = itertools.chain(*(_rows_of(name) for name in comparison.preset), variants)
    for architecture, row in itertools.product(comparison.architecture, rows):
        given = dict(row)
        name = given.pop("name", None)
        if "aux_variant" not in given:
            stock = STOCK[architecture]
            # Not all of SAELens's architectures have a loss that can be turned off.
            known = {f.name for f in fields(get_sae_training_class(stock)[1])}
            given = {field: value for field, value in given.items() if field in known}
            add(name and f"SAELens {stock}, {name}", stock, given)
        elif not AUX_LOSSES[given["aux_variant"]].topk_only or "topk" in architecture:
            add(name, architecture, given)
    for explicit in comparison.cases:
        given = dict(explicit)
        architecture = given.pop("architecture", comparison.architecture[0])
        require_choice("architecture", architecture, [*ARCHITECTURES, *STOCK.values()])
        name = given.pop("name", None)
        if name is not None and (not isinstance(name, str) or not name):
            raise reject("name", name, "a string (put quotes around a number)")
        if name is not None and not name.isprintable():
            raise reject("name", name, "a string without control characters")
        add(name, architecture, given)
    return list(cases.values())


def _rows_of(preset: str) -> list[dict[str, Any]]:
    """The fields, and a name if need be, of a preset's cases.

    A row without ``aux_variant`` is of SAELens's own architecture.
    """
    if preset == "saelens":
        return [{}]
    if preset == "variants":
        return [{"aux_variant": variant} for variant in BUILT_IN]
    if preset == "biases":
        own = {"aux_variant": "auxk"}  # whose bias is "decoder"
        return [own, *({**own, "aux_bias": bias} for bias in ("matched", "none"))]
    return [
        {},
        {"name": "unit rows, no loss", "decoder_init_norm": 1.0, "aux_loss_coefficient": 0.0},
        {
            "name": "unit rows, mean, no loss",
            "aux_variant": "none",
            "decoder_init_norm": 1.0,
            "b_dec_init": "mean",
        },
        {"aux_variant": "auxk"},
        {"aux_variant": "pursuit"},
        {"name": "pursuit, mean", "aux_variant": "pursuit", "b_dec_init": "mean"},
    ]


def folders_of(cases: Sequence[Case]) -> dict[str, Case]:
    """The cases by the names of their folders.

    That is a case's slug, unless several have the same one: ``A+`` and ``a-``, or two names in
    Chinese. A hash of the case then tells them apart. A slug has no two hyphens in a row, so the
    name cannot be that of another case.
    """
    n_with = Counter(case.slug for case in cases)

    def hashed(case: Case) -> str:
        # k in full: a title rounds it.
        identity = repr((case.name, case.architecture, case.k))
        return f"{case.slug}--{hashlib.sha256(identity.encode()).hexdigest()[:8]}"

    return {case.slug if n_with[case.slug] == 1 else hashed(case): case for case in cases}


def _label(architecture: str, given: Mapping[str, Any]) -> str:
    """A short name that says what differs from the defaults."""
    short = {
        "aux_bias": "bias",
        "aux_loss_coefficient": "alpha",
        "resample_every_steps": "resample every",
        "resample_stop_step": "resample until",
    }
    ours = architecture in ARCHITECTURES
    defaults = {f.name: f.default for f in fields(AuxConfig)} if ours else {}
    aux_variant = given.get("aux_variant", AuxConfig.aux_variant)
    parts = [str(aux_variant) if ours else f"SAELens {architecture}"]
    for name, value in given.items():
        if name not in ("aux_variant", "k") and not (name in defaults and value == defaults[name]):
            shown = f"{value:g}" if isinstance(value, float) else str(value)
            parts.append(f"{short.get(name, name)} {shown}")
    return ", ".join(parts)
