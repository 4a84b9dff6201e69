"""The command ``genfuse``."""

import gc
import os
import sys
import traceback
import warnings
from collections.abc import Callable, Sequence
from typing import Any

from genfuse import plugins
from genfuse._files import plain
from genfuse._version import __version__
from genfuse.errors import DataWarning, GenfuseError, RunWarning, SettingsError, TrainingWarning, near

USAGE = """\
genfuse: train, sample and evaluate generative models

usage: genfuse COMMAND [options]

  list [KIND]                what can be trained, on what, and how it is measured
  data describe DATA         what the columns of a table are taken for, what pictures a folder holds, what data is
  train MODEL --data NAME    train a model and leave a run folder
  sample RUN --out FILE      draw from a trained model: .png, .csv, .npy or .npz
  evaluate RUN               likelihood, bounds, reconstruction error, and samples beside real examples
  score RUN FILE --out FILE  how odd each example is, and which columns make it so; also encode, reconstruct and
                             interpolate RUN FILE --out FILE
  upscale RUN FILE --out F  enlarge a picture or a folder of them by a model of super-resolution
  compress RUN FILES --out F images and tables of levels without loss; decompress F --out FILE|DIR reads them again
  export RUN --out FILE      programs for other runtimes: .onnx or .pt2
  train-features DATA        train the classifier that samples are compared by
  compare MODEL ...          train several models equally long, in one table and page
  plugins                    state of every plugin that a package brought
  new-plugin NAME            write a package with a model of your own, to start from
  doctor                     versions, hardware, kernels and plugins found here
  completion SHELL           what makes bash, zsh or fish complete all of these
  help [COMMAND]             as --help

  --help      of genfuse, of a command, and of `genfuse train MODEL`: its settings
  --version   print the version
  --debug     anywhere on the line: show the traceback of an error

example:
  genfuse train vae --data digits --out runs/vae
  genfuse sample runs/vae --n 64 --out grid.png
  genfuse evaluate runs/vae"""

TRAIN_USAGE = """\
Train a model and leave a run folder: settings, weights, metrics and pictures.

usage: genfuse train MODEL --data NAME [options]
       genfuse train --resume RUN [--epochs N | --steps N]
       genfuse train --from RUN --data NAME [options]

Each model has settings of its own: `genfuse train MODEL --help` shows them with all other options.
`genfuse list datasets` shows the data sets.

example:
  genfuse train vae --data digits --out runs/vae --epochs 20 --model.latent-dim 32
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code: 0; 2 for what the user can mend; 130 after Ctrl-C."""
    args = list(sys.argv[1:] if argv is None else argv)
    if "torch" not in sys.modules and not {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME"} & os.environ.keys():
        os.environ["OMP_WAIT_POLICY"] = "passive"  # threads that spin keep busy cores from those that they wait for
    debug = "--debug" in args
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _shown(warnings.showwarning)
            code = _dispatch([arg for arg in args if arg != "--debug"])
        sys.stdout.flush()
        return code
    except SystemExit as stop:  # of tyro, which has printed help or what it could not read
        return stop.code if isinstance(stop.code, int) else 1
    except BrokenPipeError:  # who read our output has left; without this Python complains again at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except (KeyboardInterrupt, GenfuseError, OSError) as error:
        if debug:
            traceback.print_exc()
        interrupted = isinstance(error, KeyboardInterrupt)
        print(plain(f"genfuse: {'interrupted' if interrupted else 'error: '}{error}"), file=sys.stderr)
        return 130 if interrupted else 2


def _shown(otherwise: Callable[..., None]) -> Callable[..., None]:
    """Shows a warning of ours as one line, without the place in the code that it comes from."""

    def show(message: Warning | str, category: type[Warning], *where: Any) -> None:
        if issubclass(category, (DataWarning, RunWarning, TrainingWarning)):
            print(plain(f"genfuse: warning: {message}"), file=sys.stderr)
        else:
            otherwise(message, category, *where)

    return show


def _dispatch(args: list[str]) -> int:
    if args[:1] == ["help"]:
        args = [*args[1:], "--help"]
    name, rest = (args[0], args[1:]) if args else ("", [])
    if name in ("", "-h", "--help"):
        print(USAGE, file=sys.stdout if name else sys.stderr)
        return 0 if name else 2
    if name == "--version":
        print(f"genfuse {__version__}")
        return 0
    if name == "train":
        if not rest or rest[0] in ("-h", "--help"):
            from genfuse.cli._families import FAMILIES

            lines = map(plain, plugins.table("models", FAMILIES["models"]))
            print(TRAIN_USAGE, *lines, sep="\n", file=sys.stdout if rest else sys.stderr)
            return 0 if rest else 2
        first = "torch" not in sys.modules
        if first:  # imports leave no garbage: to look for it takes a third of the time of `train MODEL --help`
            gc.disable()
        from genfuse.cli.train import train

        if first:
            gc.freeze()
            gc.enable()
        try:
            return train(rest)
        finally:
            if "triton" in sys.modules:  # nanobind, which Triton is bound by, calls leaked at exit what is frozen then
                gc.unfreeze()

    from genfuse.cli._commands import COMMANDS

    if name not in COMMANDS:
        known = ("train", *COMMANDS)
        raise SettingsError(f"there is no command {name!r}; commands: {', '.join(known)}{near(name, known)}")

    import tyro

    return tyro.cli(COMMANDS[name], prog=f"genfuse {name}", args=rest)
