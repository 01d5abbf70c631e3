"""Files are written in one place, whole or not at all, and never where a link leads."""

import ast
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import sae_lens_auxk
from sae_lens_auxk.files import (
    left_behind,
    make_folder,
    open_no_link,
    read_json,
    replace_file,
    write_json,
    write_tensors,
    write_text,
)

PACKAGE = Path(sae_lens_auxk.__file__).parent
WRITERS = {"write_text", "write_bytes", "save_file", "savefig", "copyfile", "touch", "mkdir"}
WRITERS |= {"makedirs", "fdopen", "symlink_to", "rename"}
ALLOWED = {
    ("compare/locks.py", "mkdir"),  # the folder that the user names
    ("sharded/sae.py", "mkdir"),
    ("compare/run.py", "mkdir"),  # fails if there is anything of that name
    ("compare/run.py", "rename"),  # fails likewise
    ("compare/report/drawing.py", "savefig"),  # into an open file
    ("hub/sae_folder.py", "copyfile"),  # into a temporary folder
}


def writes(call: ast.Call) -> str | None:
    """The name of what writes a file, if this call does."""
    function = call.func
    if isinstance(function, ast.Name):
        name = function.id
        if name == "write_text":  # that of files.py
            return None
    elif isinstance(function, ast.Attribute):
        name = function.attr
        if ast.unparse(function) in ("torch.save", "np.save", "os.open", "os.replace", "json.dump"):
            return ast.unparse(function)
    else:
        return None
    if name == "open":
        values = [*call.args, *(word.value for word in call.keywords)]
        modes = [value.value for value in values if isinstance(value, ast.Constant)]
        return name if any(isinstance(m, str) and {*m} & {*"wax+"} for m in modes) else None
    return name if name in WRITERS else None


def test_nothing_else_in_the_package_writes_files() -> None:
    found: set[tuple[str, str]] = set()
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and (name := writes(node)) is not None:
                found.add((path.relative_to(PACKAGE).as_posix(), name))
    here = {(path, name) for path, name in found if path == "files.py"}
    assert {name for _, name in here} == {"open", "os.open", "os.replace", "fdopen", "mkdir"}
    assert found - here == ALLOWED


@pytest.mark.parametrize("writer", ["json", "text", "tensors"])
def test_a_link_is_replaced_and_what_it_leads_to_stays(writer: str, tmp_path: Path) -> None:
    target, path = tmp_path / "theirs", tmp_path / "folder" / "x"
    target.write_text("theirs")
    path.parent.mkdir()
    path.symlink_to(target)
    if writer == "json":
        write_json(path, [1])
    elif writer == "text":
        write_text(path, "[1]")
    else:
        write_tensors(path, {"x": torch.ones(2)})
    assert target.read_text() == "theirs"
    assert not path.is_symlink()
    assert [*path.parent.iterdir()] == [path]
    if writer == "tensors":
        assert torch.equal(load_file(path)["x"], torch.ones(2))
    else:
        assert path.read_text() == "[1]"


def test_two_writers_of_one_file_do_not_meet(tmp_path: Path) -> None:
    path = tmp_path / "x"
    with replace_file(path) as first, replace_file(path) as second:
        first.write(b"first")
        second.write(b"second")
        first.flush()
        second.flush()
        contents = sorted(beside.read_bytes() for beside in left_behind(path))
        assert contents == [b"first", b"second"]
        assert not path.exists()
    assert path.read_bytes() == b"first"  # the last that ended
    assert [*tmp_path.iterdir()] == [path]


def test_a_new_file_has_the_usual_permissions(tmp_path: Path) -> None:
    (tmp_path / "usual").touch()
    write_text(tmp_path / "x", "")
    assert (tmp_path / "x").stat().st_mode == (tmp_path / "usual").stat().st_mode


def test_a_file_is_opened_as_it_is_and_never_through_a_link(tmp_path: Path) -> None:
    (tmp_path / "x").write_text("theirs")
    open_no_link(tmp_path / "x").close()
    assert (tmp_path / "x").read_text() == "theirs"
    for target in ("x", "nowhere"):
        link = tmp_path / f"to {target}"
        link.symlink_to(tmp_path / target)
        with pytest.raises(ValueError, match=f"to {target} must not be a link: remove it"):
            open_no_link(link)
    assert not (tmp_path / "nowhere").exists()


def test_a_folder_is_neither_a_link_nor_a_file(tmp_path: Path) -> None:
    make_folder(tmp_path / "a")
    make_folder(tmp_path / "a")
    (tmp_path / "link").symlink_to(tmp_path / "a")
    (tmp_path / "nowhere").symlink_to(tmp_path / "b")
    (tmp_path / "file").touch()
    for name in ("link", "nowhere", "file"):
        with pytest.raises(ValueError, match=f"{name} must be a folder and no link"):
            make_folder(tmp_path / name)


def test_what_a_killed_process_left_is_known(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    (tmp_path / ".x.json.mine.partial").touch()
    (tmp_path / ".y.json.0123456789abcdef.partial").touch()
    left = tmp_path / ".x.json.0123456789abcdef.partial"
    left.touch()
    assert left_behind(path) == [left]


def test_no_nan_is_written(tmp_path: Path) -> None:
    write_json(tmp_path / "x.json", {"a": [float("nan"), float("inf"), 1.0, (2,)]})
    assert json.loads((tmp_path / "x.json").read_text()) == {"a": [None, None, 1.0, [2]]}


def test_json_has_a_line_for_each_entry_and_one_for_a_list_without_mappings(tmp_path: Path) -> None:
    content = {
        "runs": [{"name": 'a "[b]" {ü}\n', "history": {"samples": [1, 2.5, None]}}, {}],
        "nested": [[1, 2], (3, [])],
        "words": ["x", "y, [z"],
        "mixed": [1, [{"deep": True}]],
        "empty": {},
        7: 0.1 + 0.2,
    }
    write_json(tmp_path / "x.json", content)
    text = (tmp_path / "x.json").read_text()
    assert (
        text
        == r"""{
 "runs": [
  {
   "name": "a \"[b]\" {\u00fc}\n",
   "history": {
    "samples": [1, 2.5, null]
   }
  },
  {}
 ],
 "nested": [[1, 2], [3, []]],
 "words": ["x", "y, [z"],
 "mixed": [
  1,
  [
   {
    "deep": true
   }
  ]
 ],
 "empty": {},
 "7": 0.30000000000000004
}"""
    )
    assert json.loads(text) == json.loads(json.dumps(content))


def test_a_crash_while_writing_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "report.md"
    path.write_text("old")

    def crash() -> None:
        with replace_file(path) as file:
            file.write(b"half of the n")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        crash()
    assert path.read_text() == "old"
    write_text(path, "new")
    assert path.read_text() == "new"
    assert [file.name for file in tmp_path.iterdir()] == ["report.md"]


@pytest.mark.parametrize("text", ["{", '"\\ud800"', "[" * 33 + "]" * 33, "[" * 100_000])
def test_what_cannot_be_written_again_is_not_read(text: str, tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(ValueError, match="x.json cannot be read: "):
        read_json(tmp_path / "x.json")
