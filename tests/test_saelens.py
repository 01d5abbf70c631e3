"""The names of SAELens that the package needs: ``sae_lens_auxk/saelens.py`` lists them."""

import ast
import importlib
import inspect
import re
from pathlib import Path
from typing import Any

import pytest
import sae_lens

import sae_lens_auxk
from sae_lens_auxk import saelens
from sae_lens_auxk.architectures import ARCHITECTURES
from sae_lens_auxk.saelens import whitening_of

PACKAGE = Path(sae_lens_auxk.__file__).parent
FILES_BY_NAME: dict[str, list[str]] = {
    name: files.split()
    for name, files in re.findall(r"^    (sae_lens\.\S+)\s+(\S.*)$", saelens.__doc__ or "", re.M)
}
pytestmark = pytest.mark.oldest


def look_up(name: str) -> None:
    """An AssertionError with the name unless the installed SAELens has it."""
    parts = name.split(".")
    n = next(n for n in range(len(parts), 0, -1) if is_module(".".join(parts[:n])))
    found: Any = importlib.import_module(".".join(parts[:n]))
    for part in parts[n:]:
        in_instances = inspect.isclass(found) and sets_on_itself(found, part)
        assert in_instances or hasattr(found, part), f"SAELens {sae_lens.__version__} has no {name}"
        found = getattr(found, part, None)


def is_module(name: str) -> bool:
    try:
        importlib.import_module(name)
    except ModuleNotFoundError:
        return False
    return True


def sets_on_itself(cls: type, attribute: str) -> bool:
    """Whether a class of SAELens or one of its bases annotates or assigns an attribute."""
    pattern = re.compile(rf"^\s+(self\.)?{attribute}\b(: .*| = .*)$", re.M)
    bases = [base for base in cls.__mro__ if base.__module__.startswith("sae_lens.")]
    return any(pattern.search(inspect.getsource(base)) for base in bases)


@pytest.mark.parametrize("name", FILES_BY_NAME)
def test_saelens_has_it(name: str) -> None:
    look_up(name)


@pytest.mark.parametrize("name", FILES_BY_NAME)
def test_it_is_used_where_the_list_says(name: str) -> None:
    word = re.compile(rf"\b{name.rpartition('.')[2]}\b")
    for file in FILES_BY_NAME[name]:
        assert word.search((PACKAGE / file).read_text(encoding="utf-8")), file


@pytest.mark.parametrize("name", ["sae_lens.gone", "sae_lens.gone.Gone", "sae_lens.SAE.gone"])
def test_what_is_gone_is_named(name: str) -> None:
    with pytest.raises(AssertionError, match="has no sae_lens"):
        look_up(name)


def test_every_import_is_exported_by_saelens_or_listed() -> None:
    has_abstopk = "auxk-abstopk" in ARCHITECTURES  # abstopk.py is not imported elsewhere
    trees = [
        ast.parse(path.read_text(encoding="utf-8"))
        for path in PACKAGE.rglob("*.py")
        if has_abstopk or path.name != "abstopk.py"
    ]
    imported = {
        f"{node.module}.{alias.name}"
        for tree in trees
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "sae_lens"
        for alias in node.names
    } - {"sae_lens.training.activation_scaler.ActivationWhitening"}  # for the types only
    exported = set(sae_lens.__all__)
    missing = {name for name in imported if name.rpartition(".")[2] not in exported}
    assert missing <= FILES_BY_NAME.keys(), sorted(missing - FILES_BY_NAME.keys())


def test_every_private_method_of_saelens_that_is_called_is_listed() -> None:
    ours = "".join(path.read_text(encoding="utf-8") for path in PACKAGE.rglob("*.py"))
    theirs = "".join(
        path.read_text(encoding="utf-8") for path in Path(sae_lens.__file__).parent.rglob("*.py")
    )
    called = set(re.findall(r"\.(_[a-z]\w+)\(", ours)) - set(re.findall(r"def (_[a-z]\w+)", ours))
    listed = {name.rpartition(".")[2] for name in FILES_BY_NAME}
    assert called & set(re.findall(r"def (_[a-z]\w+)", theirs)) <= listed


def test_a_scaler_without_whitening_has_none() -> None:
    assert whitening_of(object()) is None  # type: ignore[arg-type]
