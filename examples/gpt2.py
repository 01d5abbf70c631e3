"""GPT-2 small: the losses of `auxk-topk` side by side, the report, and what an upload would send.

    python examples/gpt2.py --dry_run                        # says what it would train
    python examples/gpt2.py                                  # needs a GPU and some hours
    python examples/gpt2.py --training_samples 20000000 --seeds 0

Its flags are those of `sae-lens-auxk compare`. The text is OpenWebText, tokenised for GPT-2 in rows
of 1,024 tokens. SAELens takes the first `context_size` tokens of a row and drops the others, so a
smaller context would throw text away. (The Hub was out of reach when this was written: the test
reads a local folder in this format, with a random model of GPT-2's shape.)
"""

import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from simple_parsing import ArgumentParser

from sae_lens_auxk.cli.upload import listing
from sae_lens_auxk.compare.checks import resolve
from sae_lens_auxk.compare.config import Comparison
from sae_lens_auxk.compare.files import read_results
from sae_lens_auxk.compare.run import plan_comparison, run_comparison
from sae_lens_auxk.hub import upload_sae

GPT2 = Comparison(
    # the model and where its activations are read
    model_name="gpt2",
    hook_name="blocks.6.hook_resid_pre",
    dataset_path="apollo-research/Skylion007-openwebtext-tokenizer-gpt2",
    context_size=1024,
    language_model={
        "store_batch_size_prompts": 8,
        "n_batches_in_buffer": 64,
        # GPT-2 has activations some thirty times as long at the first token of every prompt.
        "seqpos_slice": [1, None],
    },
    # the SAEs: SAELens's own topk, as it is and with unit rows, and four of auxk-topk
    preset=["main"],
    architecture=["auxk-topk"],
    d_sae=24_576,
    k=[32],
    # training
    seeds=[0, 1, 2],
    training_samples=200_000_000,
    batch_size=4096,
    lr=3e-4,
    device="cuda" if torch.cuda.is_available() else "cpu",
    autocast=True,
)


def main(args: Sequence[str] | None = None) -> None:
    parser = ArgumentParser(description="Auxiliary losses side by side on GPT-2 small.")
    parser.add_arguments(Comparison, dest="comparison", default=GPT2)
    parser.add_argument("--output", type=Path, default=Path("gpt2-saes"), help="folder")
    parser.add_argument("--repo", default="me/gpt2-saes", help="where an upload would go")
    parser.add_argument("--dry_run", action="store_true", help="train nothing, say what it would")
    options = parser.parse_args(args)
    # simple-parsing forgets the default of a field that is not a flag.
    comparison = resolve(replace(options.comparison, language_model=GPT2.language_model))
    if options.dry_run:
        print(plan_comparison(comparison, options.output))
        return
    print(f"report  {run_comparison(comparison, options.output, say=print)}")
    runs = read_results(options.output)["runs"]
    if failed := [run["name"] for run in runs if run["status"] == "failed"]:
        sys.exit(f"failed: {'; '.join(failed)}")
    print(listing(options.repo, upload_sae(options.output, options.repo, dry_run=True)))


if __name__ == "__main__":
    main()
