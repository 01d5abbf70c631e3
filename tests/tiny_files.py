"""A tiny language model, its tokenizer and a data set as folders, for the command line."""

from pathlib import Path

import torch
from datasets import Dataset
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

CONTEXT_SIZE = 16
N_WORDS = 50


def write(folder: Path, n_rows: int = 200) -> list[str]:
    """Write model and data set; the flags of ``sae-lens-auxk train`` that use them."""
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=N_WORDS,
        n_positions=CONTEXT_SIZE,
        n_embd=16,
        n_layer=2,
        n_head=2,
        bos_token_id=0,
        eos_token_id=0,
    )
    GPT2LMHeadModel(config).save_pretrained(folder / "model")
    words = {"<eos>": 0} | {f"w{i}": i for i in range(1, N_WORDS)}
    words_only = Tokenizer(WordLevel(words, unk_token="<eos>"))
    words_only.pre_tokenizer = Whitespace()  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words_only,
        bos_token="<eos>",
        eos_token="<eos>",
    )
    tokenizer.save_pretrained(folder / "model")
    rows = torch.randint(1, N_WORDS, (n_rows, CONTEXT_SIZE))
    (folder / "data").mkdir()
    data = Dataset.from_list([{"text": " ".join(f"w{i}" for i in row)} for row in rows.tolist()])
    data.to_parquet(folder / "data" / "train.parquet")
    flags = {
        "architecture": "auxk-topk",
        "k": 4,
        "dead_threshold_tokens": 200,
        "model_name": folder / "model",
        "model_class_name": "AutoModelForCausalLM",
        "hook_name": "transformer.h.0",
        "d_in": 16,
        "d_sae": 48,
        "dataset_path": folder / "data",
        "streaming": "false",
        "is_dataset_tokenized": "false",
        "disable_concat_sequences": "true",
        "context_size": CONTEXT_SIZE,
        "prepend_bos": "false",
        "training_tokens": 40 * 64,
        "train_batch_size_tokens": 64,
        "store_batch_size_prompts": 2,
        "n_batches_in_buffer": 2,
        "activations_mixing_fraction": 0,
        "lr": 1e-2,
        "log_to_wandb": "false",
    }
    return [str(part) for name, value in flags.items() for part in (f"--{name}", value)]
