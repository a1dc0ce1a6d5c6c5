"""`unike-kernels`: info, inspect, edit, evaluate and tune on the command line."""

import json
import subprocess
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from .config import UnikeConfig

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    help="UniKE knowledge editing: correct what a multimodal model believes, without retraining.",
)


def _file(told: str) -> Any:
    """An option that takes a file; a short name for what it takes leaves its help room in a narrow terminal."""
    return typer.Option(metavar="FILE", exists=True, help=told)


def _number(told: str, *names: str, min: int | None = None) -> Any:
    """An option that takes a whole number."""
    return typer.Option(*names, metavar="N", help=told, min=min)


def _told_version(wanted: bool) -> None:
    if wanted:
        from . import __version__

        typer.echo(f"unike-kernels {__version__}")
        raise typer.Exit


@app.callback()
def _main(
    version: Annotated[  # a flag whose callback does it all
        bool, typer.Option("--version", callback=_told_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Options of no command."""


@app.command()
def info() -> None:
    """Which version this is, which torch, triton and GPUs it finds, and which backends and native modules can run here.

    Example: unike-kernels info
    """
    import torch

    from . import __version__, backends, native

    typer.echo(f"unike-kernels {__version__}, torch {torch.__version__}, CUDA {torch.version.cuda or 'none'}")
    typer.echo(f"triton {_version('triton') or 'is not installed'}")
    for line in _gpus() or ["no GPU that this torch can use"]:
        typer.echo(line)
    for backend in backends.available():
        typer.echo(f"backend {backend.name}: {backend.reason or 'usable'}")
    typer.echo(f"native CPU module: {native.no_cpu() or 'usable'}")
    typer.echo(f"native CUDA module: {native.no_cuda() or 'usable'}")


@app.command()
def inspect(path: Annotated[str, typer.Argument(help="Folder of saved edits, or a hub repository.")]) -> None:
    """What saved edits hold: the base they belong to, their settings, and every edit.

    Example: unike-kernels inspect my-edits
    """
    from .edits import Edits

    with _told():
        edits = Edits.from_pretrained(path)
    base, shift, routing = edits.base, edits.config.shift, edits.config.routing
    alpha = "adaptive" if shift.alpha is None else shift.alpha
    name = base.name_or_path or "of a model without a name"
    typer.echo(f"base: {base.family}, hidden size {base.hidden_size}, {base.num_layers} layers, {name}")
    typer.echo(f"shift: {shift.attention}, K = {shift.k}, alpha {alpha}" if shift.enabled else "shift: off")
    limits = f"false-accept rate {routing.false_accept_rate}, margin {routing.margin} over {routing.cohort} cases"
    typer.echo(f"routing: {routing.mode}, {limits}")
    typer.echo(edits.summary(limit=None))


@app.command()
def edit(
    model: Annotated[str, typer.Argument(help="Model folder or name that transformers can load.")],
    requests: Annotated[
        Path, typer.Argument(exists=True, help="JSON list of {prompt, target, image: path or null, id?}.")
    ],
    out: Annotated[Path, typer.Argument(help="Folder for the edits; new ones join those that are there.")],
    triplets: Annotated[
        Path,
        typer.Option(
            exists=True, help="JSON list of {prompt, target, image?, prediction?, question?}, training questions."
        ),
    ],
    probes: Annotated[
        Path | None,
        typer.Option(
            exists=True,
            help="JSON list of {kind, prompt, target, image?} to ask then; kind: rel, t_gen, m_gen, t_loc or m_loc.",
        ),
    ] = None,
    routed: Annotated[
        bool | None, typer.Option("--routed/--always", help="Routed edits, or the paper's; the config's if neither.")
    ] = None,
    config: Annotated[Path | None, typer.Option(exists=True, help="JSON of a UnikeConfig; defaults otherwise.")] = None,
    cache: Annotated[
        Path | None, typer.Option(help="Folder that keeps what the triplets give, for later runs.")
    ] = None,
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, ...")] = "auto",
) -> None:
    """Makes edits of a model and saves them as they are made; the same command goes on when stopped.

    Pictures are paths from the folder of the file that names them.

    A request with the picture and prompt of an edit that is there replaces it.

    Example: unike-kernels edit Salesforce/blip2-opt-2.7b requests.json my-edits --triplets train.json --cache cache
    """
    from .editing.making import Job, run

    with _told():
        run(
            Job(
                model,
                requests,
                out,
                triplets,
                probes=probes,
                routing=None if routed is None else "routed" if routed else "always",
                config=_config(config),
                cache=cache,
                dtype=dtype,
                device=device,
            ),
            typer.echo,
        )


@app.command()
def evaluate(
    model: Annotated[str, typer.Option(metavar="MODEL", help="Model folder or name that transformers can load.")],
    data: Annotated[list[Path], _file("File of MMEdit or VLKEB; two for cross-task.")],
    train_data: Annotated[list[Path], _file("Training file for the memory; repeatable.")],
    images: Annotated[Path, typer.Option(metavar="FOLDER", help="Folder that the files' picture names start from.")],
    out: Annotated[
        Path,
        typer.Option(metavar="FOLDER", help="For the results; the same command goes on there when stopped."),
    ],
    protocol: Annotated[str, typer.Option(metavar="NAME", help="one-step, sequential or cross-task.")] = "one-step",
    k: Annotated[int | None, _number("Edits on the model together; 10 unless one-step.", "-k", min=1)] = None,
    routed: Annotated[bool, typer.Option("--routed/--always", help="Routed edits, or the paper's.")] = False,
    prompts: Annotated[
        str,
        typer.Option(
            metavar="STYLE",
            help="auto (MMEdit's own, or the chat template where a model has one), raw, short-answer, caption, answer, "
            "answer-is, chat, or a template with {}.",
        ),
    ] = "auto",
    metrics: Annotated[
        str,
        typer.Option(
            metavar="NAMES",
            help="By comma, some of rel, t_gen, m_gen, t_loc, m_loc and port; all by default. Without m_gen, COCO is "
            "enough.",
            show_default=False,
        ),
    ] = "rel,t_gen,m_gen,t_loc,m_loc,port",
    limit: Annotated[int | None, _number("At most so many records, drawn by the seed.", min=1)] = None,
    seed: Annotated[list[int] | None, _number("Of the order; may be given again. Default: 0.")] = None,
    memory: Annotated[int, _number("Training records for the memory, at most.", min=1)] = 2000,
    config: Annotated[Path | None, _file("JSON of a UnikeConfig; defaults otherwise.")] = None,
    dtype: Annotated[str, typer.Option(metavar="NAME", help="auto, float32, bfloat16 or float16.")] = "auto",
    device: Annotated[str, typer.Option(metavar="NAME", help="auto, cpu, cuda, cuda:1, ...")] = "auto",
    batch_size: Annotated[int, _number("Questions asked together.", min=1)] = 16,
    generate: Annotated[bool, typer.Option(help="Also answer freely, for exact match.")] = True,
) -> None:
    """Edits a model with UniKE as a benchmark asks, and measures what changed: every sample to a file, then a table.

    Example: unike-kernels evaluate --model Salesforce/blip2-opt-2.7b --data vqa_eval.json --train-data vqa_train.json
    --images coco --out runs/vqa
    """
    from .evaluation.evaluate import Job, run
    from .evaluation.pictures import MissingPicturesError

    with _told():
        job = Job(
            model,
            data,
            train_data,
            images,
            out,
            protocol=protocol,
            k=k,
            routing="routed" if routed else "always",
            prompts=prompts,
            metrics=[m.strip() for m in metrics.split(",")],
            limit=limit,
            seeds=seed or [0],
            memory=memory,
            config=_config(config),
            dtype=dtype,
            device=device,
            batch_size=batch_size,
            generate=generate,
        )
        try:
            run(job, typer.echo)
        except MissingPicturesError as error:
            names = out.resolve().with_name(f"{out.resolve().name}-missing-pictures.txt")
            names.parent.mkdir(parents=True, exist_ok=True)
            names.write_text("\n".join(error.missing) + "\n", encoding="utf-8")
            typer.echo(f"{error}\nall names: {names}", err=True)
            raise typer.Exit(1) from None


@app.command()
def tune(
    out: Annotated[Path, typer.Option(help="JSON file for the launch choices; name it in UNIKE_TUNING.")],
    only: Annotated[
        list[str] | None,
        typer.Option(help="Cases whose name has all of these words: 'vicuna-7b bfloat16 T=1'. May be given again."),
    ] = None,
) -> None:
    """Measures launch choices of the kernels on this GPU and writes the best ones. Slow: it compiles many kernels.

    Example: unike-kernels tune --out h200.json --only "cosine_topk vicuna-7b bfloat16"
    """
    import os

    import torch

    from . import backends
    from .files import replacing
    from .triton_kernels import tuning

    reason = next(backend.reason for backend in backends.available() if backend.name == "triton")
    if reason is None and not torch.cuda.is_available():
        reason = "there is no CUDA device"
    if reason is None and os.environ.get("TRITON_INTERPRET") == "1":
        reason = "TRITON_INTERPRET=1 would run the kernels on the CPU"
    if reason is not None:
        typer.echo(f"nothing to tune here: {reason}", err=True)
        raise typer.Exit(1)
    if not out.resolve().parent.is_dir():
        raise typer.BadParameter(f"{out.resolve().parent} is not a folder")

    from .triton_kernels import tune as search

    device = torch.device("cuda", torch.cuda.current_device())
    try:
        cases = search.named(search.cases(device), only or [])
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    tuner = search.Tuner(cases, search.measure_on_gpu)
    with typer.progressbar(tuner.rows, label="rows", item_show_func=lambda row: row.kernel if row else "") as bar:
        for row in bar:
            tuner.improve(row)
            table = tuner.table(tuning.architecture(device))  # written after every row: a stopped run has its share
            with replacing(out) as half:
                half.write_text(json.dumps([r._asdict() for r in table], indent=1) + "\n", encoding="utf-8")
    typer.echo(f"{len(table)} rows in {out}; {len(tuner.refused)} choices could not run or gave other results")
    typer.echo(f"use them with: UNIKE_TUNING={out}")


def _version(package: str) -> str | None:
    """The version of an installed package, without importing it."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _gpus() -> list[str]:
    """One line for each GPU that torch can use: name, compute capability, driver."""
    import torch

    if not torch.cuda.is_available():
        return []
    lines = []
    for i in range(torch.cuda.device_count()):
        major, minor = torch.cuda.get_device_capability(i)
        name = torch.cuda.get_device_name(i)
        lines.append(f"GPU {i}: {name}, compute capability {major}.{minor}, driver {_driver() or 'unknown'}")
    return lines


def _driver() -> str | None:
    """The version of NVIDIA's driver, as nvidia-smi tells it."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        told = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    return told.split("\n")[0].strip() or None


def _config(path: Path | None) -> "UnikeConfig | None":
    """The config in a JSON file; None for none."""
    from .config import UnikeConfig
    from .files import read_json

    if path is None:
        return None
    data = read_json(path)
    if not isinstance(data, dict):
        raise ValueError(f"{path} must hold a JSON object, but holds {type(data).__name__}")
    try:
        return UnikeConfig.from_json(data)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from None


@contextmanager
def _told() -> Iterator[None]:
    """What a user can mend (a file, a folder, a model's name, a setting) is told without a traceback; exit status 1.

    Warnings are told as lines too, without the place in the source that they come from.
    """
    with warnings.catch_warnings():
        warnings.showwarning = lambda message, *_, **__: _say_aside(f"warning: {message}")
        try:
            yield
        except (OSError, ValueError) as error:
            _say_aside(str(error))
            raise typer.Exit(1) from None


def _say_aside(text: str) -> None:
    """To stderr, whatever halves of characters a file's text or name may hold."""
    typer.echo(text.encode("utf-8", "backslashreplace").decode(), err=True)


if __name__ == "__main__":
    app()
