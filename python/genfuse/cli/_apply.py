"""``genfuse score``, ``encode``, ``upscale``, ``compress``, ``export`` and others: what trained models are for."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from tyro.conf import arg

from genfuse._files import plain, writing
from genfuse.cli._arguments import AS_USUAL, Given, find_device, refuse_existing
from genfuse.errors import SettingsError

if TYPE_CHECKING:
    from genfuse.applications import Examples

RUN = Annotated[Path, arg(metavar="RUN")]
FILE = Annotated[str, arg(metavar="FILE")]
GIVEN = Annotated[Given, arg(name="")]
OUT = Annotated[Path, arg(metavar="FILE")]
ROOT = Annotated[Path | None, arg(metavar="DIR", help_behavior_hint="(default: $GENFUSE_DATA)")]
SPLIT = Literal["train", "validation", "test"]


def score(
    run: RUN,
    file: FILE,
    /,
    *,
    out: OUT,
    method: Literal["auto", "relative", "likelihood", "reconstruction", "denoising", "nearest", "critic"] = "auto",
    explain: int = 100,
    samples: int = 50,
    seed: int = 0,
    given: GIVEN = AS_USUAL,
) -> int:
    """Score examples by the model of a run: the higher, the odder.

    A .csv has the row, from 0, its score, of a picture its file and, for a table, in the oddest rows the three columns
    that weigh most: by how much the score falls where the best of 16 usual values, which the model draws, stands in
    that column alone. A .npy has the scores.

    example:
      genfuse score runs/people new.csv --out scores.csv

    Args:
        run: run folder
        file: .csv, .npy, .npz, picture or folder of pictures; or a data set by name
        out: file to write: .csv or .npy
        method: relative: what the model misses of a picture, as a share of all that there is; likelihood: -log p(x) in
            nats, exact or bounded; reconstruction: squared error of a cell; denoising: of diffusion models, the loss;
            nearest: of adversarial ones, the distance to what the generator draws; critic: minus the critic's output,
            no density; auto: the first of these that the model has
        explain: how many of the oddest rows of a table get the columns that weigh most
        samples: draws of a bound by importance sampling
        seed: of the draws
    """
    found, to = _begin(run, file, out, (".csv", ".npy"), given)
    from genfuse.applications import METHODS, find_method
    from genfuse.applications import score as scored

    frame = scored(found, method=method, explain=explain if out.suffix == ".csv" else 0, samples=samples, seed=seed)
    name = find_method(found.model, method)
    print(plain(f"score: {name}: {METHODS[name].about}; the higher, the odder"))
    for row in frame.sort_values("score", ascending=False, kind="stable").head(5).to_dict("records"):
        named = [f"{row[f'column_{i}']} {row[f'weight_{i}']:.3g}" for i in (1, 2, 3) if f"column_{i}" in row]
        where = row.get("file", f"row {row['row']}")
        print(plain(f"{where}: {row['score']:.5g}" + (f": {', '.join(named)}" if named else "")))
    return to(frame=frame, array=frame["score"].to_numpy())


def encode(
    run: RUN,
    file: FILE,
    /,
    *,
    out: OUT,
    given: GIVEN = AS_USUAL,
) -> int:
    """Write the code z of each example: of a VAE the posterior's mean, of a flow what it makes of it.

    A .csv has a column for each dimension, and of pictures the file, a .npy the array (N, D), a .png two dimensions as
    points.

    example:
      genfuse encode runs/vae digits --out codes.csv

    Args:
        run: run folder
        file: .csv, .npy, .npz, picture or folder of pictures; or a data set by name
        out: file to write: .csv, .npy or .png
    """
    found, to = _begin(run, file, out, (".csv", ".npy", ".png"), given)
    import pandas as pd

    from genfuse import plots
    from genfuse.applications import encode as encoded

    z = encoded(found)
    y = None if found.data.condition else found.data.splits[found.split].y
    frame = pd.DataFrame(z.numpy(), columns=[f"z{i + 1}" for i in range(z.shape[1])])
    if files := found.data.splits[found.split].files:
        frame.insert(0, "file", files)
    names = found.data.class_names
    draw = partial(plots.latent_space, z, y, out, "the examples, encoded", names)
    return to(frame=frame, array=z.numpy(), picture=draw)


def reconstruct(
    run: RUN,
    file: FILE,
    /,
    *,
    out: OUT,
    given: GIVEN = AS_USUAL,
) -> int:
    """Write of each example what its code keeps of it: rows of a table in their units, or images in [0, 1].

    A .png shows the first 64 images, each over its reconstruction.

    example:
      genfuse reconstruct runs/vae digits --out pairs.png

    Args:
        run: run folder
        file: .csv, .npy, .npz, picture or folder of pictures; or a data set by name
        out: file to write: .csv for tables, .png for images, or .npy
    """
    found, to = _begin(run, file, out, _kinds(run), given)
    from genfuse import plots
    from genfuse.applications import reconstruct as reconstructed

    made, x = reconstructed(found), found.batch.x.cpu()
    restored = found.restored(made)
    return to(frame=restored, array=restored, picture=lambda: plots.reconstructions(x[:64], made[:64], out))


def interpolate(
    run: RUN,
    file: FILE,
    /,
    *,
    out: OUT,
    steps: int = 10,
    pairs: int = 8,
    given: GIVEN = AS_USUAL,
) -> int:
    """Write what lies between examples: the first and the second, the third and the fourth, and so on.

    A .png has a row of images for each pair, or of frames for each step between two clips, a .csv the steps of a pair
    under each other, a .npy the array (pairs, steps, *shape).

    example:
      genfuse interpolate runs/vae digits --out between.png

    Args:
        run: run folder
        file: .csv, .npy, .npz, picture or folder of pictures; or a data set by name
        out: file to write: .csv for tables, .png for images, or .npy
        steps: from one example to the other, both included
        pairs: at most so many
    """
    found, to = _begin(run, file, out, _kinds(run), given)
    import numpy as np

    from genfuse import plots
    from genfuse.applications import interpolate as interpolated

    between = interpolated(found, steps, pairs)
    restored = found.restored(between.flatten(0, 1))
    array = np.asarray(restored).reshape(between.shape)
    return to(frame=restored, array=array, picture=lambda: plots.sample_grid(between.flatten(0, 1), out, steps))


def upscale(
    run: RUN,
    file: Annotated[Path, arg(metavar="PICTURE")],
    /,
    *,
    out: Annotated[Path, arg(metavar="FILE|DIR")],
    steps: Annotated[int | None, arg(metavar="N", help_behavior_hint="(default: the model's)")] = None,
    seed: int = 0,
    device: str = "auto",
    overwrite: bool = False,
) -> int:
    """Enlarge a picture, or all of a folder, by a model that was trained for super-resolution.

    Pictures may be of any size. They are read as grey or RGB, as the model was trained, turned as their EXIF data says,
    and on white where they are transparent.

    example:
      genfuse train wgan-gp --data photos --data.task super-resolution:4 --out runs/sr
      genfuse upscale runs/sr picture.png --out big.png

    Args:
        run: run folder
        file: picture, or folder of pictures
        out: .png to write; of a folder, the folder to write NAME.png into
        steps: diffusion models: steps of the sampler; 1: the mean of what may be, in place of a draw
        seed: of the draws
        device: auto, cpu, cuda, mps, or one of several: cuda:1
        overwrite: replace existing files
    """
    from genfuse.applications import pictures, read_picture, scale
    from genfuse.applications import upscale as upscaled
    from genfuse.training import Run

    sources = pictures(file)
    to = {out / f"{each.stem}.png" if file.is_dir() else out: each for each in sources}
    if len(to) < len(sources):
        raise SettingsError(f"pictures of {file} differ in their suffix alone: rename one of each such pair")
    if not file.is_dir() and out.suffix != ".png":
        raise SettingsError(f"--out must end in .png; got {out}")
    for target in to:
        refuse_existing(target, overwrite)
    if steps is not None and steps < 1:
        raise SettingsError(f"--steps must be at least 1; got {steps}")
    model = Run(run).model(find_device(device))
    channels, _ = scale(model)
    from rich.console import Console
    from rich.progress import Progress

    from genfuse.plots import write_picture

    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("", total=len(to))
        for done, (target, source) in enumerate(to.items()):
            x, mode = read_picture(source, channels)
            total = steps or getattr(model, "sampler", ("", 1))[1]

            def tell(step: int, *_: Any, done: int = done, total: int = total) -> None:
                progress.update(task, completed=done + step / total)

            big = upscaled(model, x, steps=steps, seed=seed, callback=tell)
            target.parent.mkdir(parents=True, exist_ok=True)
            write_picture(big, target)
            words = (
                ""
                if mode == ("L" if channels == 1 else "RGB")
                else f", read as {'grey' if channels == 1 else 'RGB'} from mode {mode}"
            )
            size = " to ".join(f"{each.shape[3]}x{each.shape[2]}" for each in (x, big))
            print(plain(f"written: {target}: {size}{words}"), flush=True)
            progress.update(task, completed=done + 1)
    return 0


def export(
    run: RUN,
    /,
    *,
    out: OUT,
    verbs: tuple[Literal["log_prob", "encode", "decode", "sample"], ...] = (),
    overwrite: bool = False,
) -> int:
    """Write a model as programs that run without genfuse, for any number of examples: OUT-VERB.pt2 or OUT-VERB.onnx.

    log_prob: x to nats; encode: x to z; decode: z to x; sample: noise z ~ N(0, I) to x. Tables are in their own units.
    A .pt2 is read by torch.export.load, a .onnx by onnxruntime and others.

    example:
      genfuse export runs/people --out people.onnx

    Args:
        run: run folder
        out: file to write, less the verb: .pt2 or .onnx
        verbs: those to write; left out, all that the model has
        overwrite: replace existing files
    """
    from genfuse.applications import export as exported

    for verb in verbs or ("log_prob", "encode", "decode", "sample"):
        refuse_existing(out.with_name(f"{out.stem}-{verb}{out.suffix}"), overwrite)
    exported(run, out, verbs, say=lambda line: print(plain(line), flush=True))
    return 0


def compress(
    run: RUN,
    file: Annotated[str, arg(metavar="FILES")],
    /,
    *,
    out: OUT,
    split: SPLIT = "test",
    limit: Annotated[int | None, arg(metavar="N", help_behavior_hint="(default: all)")] = None,
    data_root: ROOT = None,
    overwrite: bool = False,
) -> int:
    """Compress images, or a table of integers and categories, without loss: a vae by bits-back, idf, or of
    images realnvp, glow and nsf.

    The file is read again, on any machine, with the same run.

    example:
      genfuse compress runs/idf pictures --out pictures.gfz

    Args:
        run: run folder
        file: picture, folder of pictures, .npy, .npz or .csv; or a data set by name
        out: file to write
        split: of a data set that comes in splits
        limit: at most so many examples, the first ones
        data_root: folder with the data sets that are read from files
        overwrite: replace an existing file
    """
    refuse_existing(out, overwrite)
    from genfuse.applications import compress as compressed

    found = compressed(run, file, out, split=split, root=data_root, limit=limit)
    print(plain(f"written: {out}: {found.examples:,} examples in {found.bytes:,} bytes"))
    print(f"bits per dimension: {found.bits_per_dim:.4f}; without names and head: {found.message:.4f}, of which "
          f"{found.initial:,} bits to start with; the model's bound: {found.bound:.4f}")  # fmt: skip
    return 0


def decompress(
    file: Annotated[Path, arg(metavar="FILE")],
    /,
    *,
    out: Annotated[Path, arg(metavar="FILE|DIR")],
    run: Annotated[Path | None, arg(metavar="RUN", help_behavior_hint="(default: found by its digest)")] = None,
    overwrite: bool = False,
) -> int:
    """Write what `genfuse compress` was given: pictures under their names, as .png; arrays and tables as they were.

    The run whose model it was compressed by is looked for in runs, here and beside the file.

    example:
      genfuse decompress pictures.gfz --out pictures

    Args:
        file: file that `genfuse compress` wrote
        out: folder of pictures to make, or file: .npy or .npz for arrays, .csv for tables, .png for one picture
        run: run folder
        overwrite: replace an existing file; never a folder
    """
    refuse_existing(out, overwrite and not out.is_dir())
    from genfuse.applications import decompress as decompressed

    made, by = decompressed(file, out, run=run)
    print(plain(f"written: {out}: {len(made):,} examples, by the model of {by}"))
    return 0


def _kinds(run: Path) -> tuple[str, ...]:
    """The kinds of files that examples of a run's data can be written to."""
    from genfuse.training import Run

    return (".csv" if len(Run(run).config["data"]["shape"]) == 1 else ".png", ".npy")


def _begin(
    run: Path, file: str, out: Path, kinds: tuple[str, ...], given: Given
) -> tuple["Examples", Callable[..., int]]:
    """The examples, and what writes a DataFrame, an array or a picture to ``out`` by its suffix, and says so."""
    if out.suffix not in kinds:
        raise SettingsError(f"--out must end in {', '.join(kinds[:-1])} or {kinds[-1]}; got {out}")
    refuse_existing(out, given.overwrite)
    from genfuse.applications import examples

    found = examples(run, file, split=given.split, root=given.data_root, device=find_device(given.device))

    def to(frame: Any, array: Any, picture: Callable[[], None] | None = None) -> int:
        import numpy as np

        out.parent.mkdir(parents=True, exist_ok=True)
        if out.suffix == ".png" and picture is not None:
            picture()
        else:
            with writing(out) as written:
                if out.suffix == ".csv":
                    frame.to_csv(written, index=False)
                else:
                    np.save(written, np.asarray(array))
        print(plain(f"written: {out}"))
        return 0

    return found, to
