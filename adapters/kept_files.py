"""Which files make an adapter, by name; and which names are safe at all.

Owns the list of what is kept, what is passed over and what is refused. Never opens a file. Used by
the intake of uploads (`archive.py`, `intake.py`) and by whoever packs a folder to send it.
"""

from __future__ import annotations

import re
from fnmatch import fnmatchcase
from typing import Literal

from adapters.errors import UploadRefused

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
REQUIRED = (CONFIG_FILE, WEIGHTS_FILE)
KEPT = frozenset(
    {
        *REQUIRED,
        "added_tokens.json",
        "chat_template.jinja",
        "chat_template.json",
        "merges.txt",
        "special_tokens_map.json",
        "spiece.model",
        "tokenizer.json",
        "tokenizer.model",
        "tokenizer_config.json",
        "vocab.json",
        "vocab.txt",
    }
)
# What PEFT, Trainer, TRL, git and macOS leave beside an adapter. No engine reads it; the pickles
# among it are known by name and never opened.
PASSED_OVER = (
    "._*",
    ".DS_Store",
    ".gitattributes",
    ".gitignore",
    "LICENSE",
    "LICENSE.*",
    "NOTICE",
    "README.md",
    "all_results.json",
    "config.json",
    "eval_results.json",
    "generation_config.json",
    "optimizer.bin",
    "optimizer.pt",
    "rng_state.pth",
    "rng_state_*.pth",
    "scaler.pt",
    "scheduler.pt",
    "train_results.json",
    "trainer_state.json",
    "training_args.*",
)
PICKLES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt")
MAX_NAME_CHARS = 100
_PRINTABLE = re.compile(r"[\x20-\x7e]+")

Verdict = Literal["kept", "passed over"]


def verdict_on(name: str) -> Verdict:
    """Say what becomes of a file.

    Args:
        name: Without folders.

    Raises:
        UploadRefused: If an adapter has no such file.
    """
    if name in KEPT:
        return "kept"
    if any(fnmatchcase(name, pattern) for pattern in PASSED_OVER):
        return "passed over"
    if name.lower().endswith(PICKLES):
        raise UploadRefused(
            f"{shown(name)} is a pickle, which can run code when it is read: convert the weights to "
            f"{WEIGHTS_FILE} (PEFT's save_pretrained does) and send that.",
            415,
        )
    raise UploadRefused(
        f"{shown(name)} is not a file of an adapter: send {CONFIG_FILE}, {WEIGHTS_FILE} and, if the "
        "adapter has its own, the tokenizer's files and chat_template.jinja.",
        415,
    )


def split_name(name: str) -> tuple[str, str]:
    """Check a file's path as somebody sent it, and return its folder ("" for none) and its name.

    Raises:
        UploadRefused: If the path is absolute, leaves the folder, is deeper than one folder, too
            long, or has characters that a path of ours never has.
    """
    if not _PRINTABLE.fullmatch(name) or "\\" in name or ":" in name:
        raise UploadRefused(
            f"the file name {shown(name)} has characters that no file of an adapter has: use "
            "letters, digits, '.', '_' and '-'."
        )
    if name.startswith("/"):
        raise UploadRefused(f"the file name {shown(name)} is absolute: send names without folders.")
    parts = [part for part in name.split("/") if part != "."]
    if ".." in parts or "" in parts[:-1]:
        raise UploadRefused(
            f"the file name {shown(name)} leaves its folder: send names without '..' and '//'."
        )
    parts = [part for part in parts if part]
    if any(len(part) > MAX_NAME_CHARS for part in parts):
        raise UploadRefused(
            f"the file name {shown(name)} is too long: {MAX_NAME_CHARS} characters at most."
        )
    if not 1 <= len(parts) <= 2:
        raise UploadRefused(
            f"{shown(name)} lies too deep: the adapter's files are at the root or in one folder."
        )
    return "/".join(parts[:-1]), parts[-1]


def shown(name: str) -> str:
    """Return a name as a message may repeat it: quoted, escaped, short."""
    return ascii(name[:120])
