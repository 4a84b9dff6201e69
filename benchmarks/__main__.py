"""The command `python -m benchmarks`: operators, trainings and applications measured, and the report of records."""

import argparse
import sys
from pathlib import Path

import torch

from benchmarks import (
    _part,
    _peers,
    _record,
    _report,
    anomaly,
    compression,
    disentanglement,
    examples,
    flows,
    gans,
    integrations,
    ops,
    quality,
    steps,
    super_resolution,
)  # fmt: skip
from benchmarks.operators import OPERATORS

# Commands that print tables and draw pictures for docs/: each has its own `arguments(parser)` and `run(args)`.
APPLICATIONS = {
    "anomaly": anomaly,
    "compression": compression,
    "disentanglement": disentanglement,
    "integrations": integrations,
    "quality": quality,
    "super-resolution": super_resolution,
}


def _size(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split("x"))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)

    measure = argparse.ArgumentParser(add_help=False)
    measure.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    measure.add_argument("--quick", action="store_true", help="little work: a check that all runs, not a measurement")
    measure.add_argument("--json", type=Path, metavar="FILE", help="write the record here")

    command = commands.add_parser("ops", parents=[measure], help="operators beside eager PyTorch and torch.compile")
    command.add_argument("--op", action="append", choices=list(OPERATORS), help="only this one (may be repeated)")
    command.add_argument("--size", action="append", type=_size, metavar="NxD", help="only this one (may be repeated)")
    command.add_argument("--mode", action="append", choices=list(ops.MODES), help="only this one (may be repeated)")
    command.add_argument("--dtype", choices=["float32", "float64", "bfloat16", "float16"], default="float32")
    command.add_argument("--no-compile", dest="compile", action="store_false", help="leave torch.compile out")
    command.add_argument("--replay", action="store_true", help="time CUDA graphs of all sides: without launches")
    command.add_argument("--plot", type=Path, metavar="FOLDER", help="draw time against size here")

    command = commands.add_parser("steps", parents=[measure], help="training steps beside PyTorch, JAX and the others")
    command.add_argument("--only", nargs="+", metavar="TEXT", help="only the steps whose name has one of these")
    command.add_argument("--threads", choices=["one", "all"], help="one pinned thread, or all; default: both")
    command.add_argument("--compile", action="store_true", help="torch.compile too (minutes)")
    command.add_argument("--profile", action="store_true", help="also where the time of our step goes")
    command.add_argument("--chart", type=Path, metavar="FILE", help="draw the ratios here, .svg or .png")

    command = commands.add_parser("training", parents=[measure], help="seconds an epoch beside plain PyTorch's")
    command.add_argument("--data-root", type=Path, metavar="FOLDER", help="where MNIST lies (default: GENFUSE_DATA)")
    command.add_argument("--epochs", type=int, default=5, help="epochs that each side is timed for")
    command.add_argument("--quality", action="store_true", help="also train for 30 epochs and evaluate (minutes)")

    command = commands.add_parser(
        "flows", parents=[measure], help="normalizing flows beside nflows, normflows and zuko"
    )
    command.add_argument("--only", nargs="+", choices=list(flows.PARTS), metavar="PART", help=", ".join(flows.PARTS))
    command.add_argument("--quality", action="store_true", help=f"also {' and '.join(flows.QUALITY)} (half an hour)")
    command.add_argument("--data-root", type=Path, metavar="FOLDER", help="where the data lies (default: GENFUSE_DATA)")
    command.add_argument("--no-compile", dest="compile", action="store_false", help="leave torch.compile out")

    command = commands.add_parser("gans", parents=[measure], help="adversarial models beside plain PyTorch")
    command.add_argument("--only", nargs="+", choices=list(gans.PARTS), metavar="PART", help=", ".join(gans.PARTS))
    command.add_argument("--quality", action="store_true", help="also what they learn (minutes)")

    command = commands.add_parser("examples", parents=[measure], help="plain examples beside their fused twins")
    command.set_defaults(only=None, quality=False)

    for name, module in APPLICATIONS.items():
        about = (module.__doc__ or "").partition("`: ")[2]
        module.arguments(commands.add_parser(name, help=about.partition(".")[0], description=about))

    command = commands.add_parser("report", help="write the page of results from records")
    command.add_argument("records", type=Path, nargs="+", metavar="RECORD.json")
    command.add_argument("--out", type=Path, default=Path("docs/benchmarks.md"))
    command.add_argument("--plot", type=Path, metavar="FOLDER", help="draw the records here too")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run one command. Returns 1 where a result is wrong; a bar that is not met is printed and recorded as such."""
    parser = _parser()
    args = parser.parse_args(argv)
    if args.command in APPLICATIONS:
        APPLICATIONS[args.command].run(args)
        return 0
    if args.command == "report":
        try:
            records = [_record.load(path) for path in args.records]
        except ValueError as error:
            parser.error(str(error))
        args.out.parent.mkdir(parents=True, exist_ok=True)
        page = args.out.read_text(encoding="utf-8") if args.out.exists() else ""
        args.out.write_text(_report.report(records, page), encoding="utf-8")
    else:
        if args.device == "cuda" and not torch.cuda.is_available():
            parser.error("--device cuda: PyTorch finds no GPU here")
        if getattr(args, "replay", False) and (args.device == "cpu" or "backward" in (args.mode or ())):
            parser.error("--replay: only with --device cuda, of --mode forward and both")
        machine = _record.machine(args.device)
        if args.command in ("flows", "gans", "examples") and args.device == "cpu":
            machine["threads"] = "1, pinned; times are of the processor"
        if args.command in ("flows", "steps"):
            machine["peers"] = _peers.versions()
        for key, value in machine.items():
            print(f"{key + ':':<12} {value}")
        if args.command == "ops":
            record, bars = ops.run(args)
        elif args.command == "steps":
            record, bars = steps.run(args)
        elif args.command == "flows":
            record, bars = _part.run(args, flows.PARTS, flows.QUALITY)
        elif args.command == "gans":
            record, bars = _part.run(args, gans.PARTS, gans.QUALITY)
        elif args.command == "examples":
            record, bars = _part.run(args, examples.PARTS, ())
        else:
            from benchmarks import training  # all of genfuse, which the operators can do without

            record, bars = training.run(args)
        if getattr(args, "chart", None):
            _report.chart(record, args.chart)
            record["chart"] = args.chart.name
        records = [_record.record({"machine": machine, **record}, bars)]
        print(*bars, sep="\n")
        if args.json:
            _record.save(args.json, records[0])
    if getattr(args, "plot", None):
        for record in records:
            _report.plot(record, args.plot)
    wrong = {
        "steps": steps.wrong,
        "ops": ops.wrong,
        "flows": _part.wrong,
        "gans": _part.wrong,
        "examples": _part.wrong,
    }.get(args.command)
    return int(wrong is not None and wrong(records[0]))


if __name__ == "__main__":
    sys.exit(main())
