"""``python -m benchmarks``: sepconv_ext against torch on this machine (README.md here tells what is timed and how)."""

from __future__ import annotations

import argparse
import shlex
import signal
import sys
import time
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path

import torch

from . import (
    console,
    layer_runs,
    layers,
    machine,
    models,
    networks,
    overhead,
    pairs,
    peers,
    predict,
    products,
    report,
    sequences,
    sweep,
    views,
)
from . import record as records
from .timing import Clock, clock_for

LATEST = Path(__file__).parent / "results" / "latest"


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    what = parser.add_argument_group("what (default: all but --views, --sequences and --products)")
    what.add_argument(
        "--layers",
        nargs="?",
        const="bars",
        choices=layers.HALVES,
        help="single layers of layers.csv: of the 17 networks of the bars (default), or of sixty others",
    )
    what.add_argument(
        "--models",
        nargs="*",
        metavar="NAME",
        help=f"networks in inference, against other runtimes; of {', '.join(networks.NETWORKS)}, or NAME@SIZE",
    )
    what.add_argument(
        "--training",
        nargs="*",
        metavar="NAME",
        help="training steps of the twelve large ones (all), or of NAMEs; compiled, with --peers compile",
    )
    what.add_argument("--separable", action="store_true", help="pairs of depthwise and 1x1 layers, and their memory")
    what.add_argument("--products", action="store_true", help="1x1 layers with packed weights, against other runtimes")
    what.add_argument("--sequences", action="store_true", help="state-space models of transformers, on a CPU")
    what.add_argument("--overhead", action="store_true", help="host time a call")
    what.add_argument("--views", action="store_true", help="tensors that are not dense: op x map x view")
    parser.add_argument(
        "--quick", action="store_true", help="few repetitions; with --layers alone: every depthwise layer"
    )
    parser.add_argument("--all", action="store_true", help="every layer instead of the representative ones")
    parser.add_argument("--sample", type=int, metavar="N", help="N layers, drawn by a seed, of those that are chosen")
    parser.add_argument("--device", type=torch.device, help="cpu or cuda (default: cuda where there is one)")
    parser.add_argument(
        "--dtype",
        type=_list_of(machine.DTYPES),
        help="comma-separated (default: float32, on a GPU float16 too)",
    )
    parser.add_argument("--batch", type=int, help="N (default: 8, models 1 and 8, training 4; on a GPU 64)")
    parser.add_argument("--kinds", type=_list_of(layers.KINDS), help=f"of {','.join(layers.KINDS)}")
    parser.add_argument(
        "--maps", type=_list_of(layers.MAPS), default=list(layers.MAPS), help=f"of {','.join(layers.MAPS)}"
    )
    parser.add_argument(
        "--layouts",
        type=_list_of(tuple(peers.LAYOUTS)),
        default=list(peers.LAYOUTS),
        help=f"of training steps and of --predict: of {','.join(peers.LAYOUTS)}",
    )
    parser.add_argument("--threads", type=lambda text: [int(n) for n in text.split(",")], help="CPU threads, as 1,2")
    parser.add_argument(
        "--peers",
        type=_list_of((*peers.PEERS, *networks.PEERS)),
        help=f"of layers: {','.join(peers.PEERS)} (default: torch; on a GPU all); "
        f"of models: {','.join(networks.PEERS)} (default: all)",
    )
    parser.add_argument(
        "--budget", type=float, help="seconds for each layer, map and layout, beyond the least repetitions"
    )
    parser.add_argument("--tf32", action="store_true", help="let everybody use TF32 in float32 (default: nobody)")
    parser.add_argument("--out", type=Path, default=LATEST, help="folder for the record")
    parser.add_argument(
        "--predict",
        choices=predict.gpus(),
        metavar="GPU",
        help=f"measure nothing, predict layers on a GPU, of {', '.join(predict.gpus())}; --layers, --kinds, --maps, "
        "--dtype, --batch, --sample and --all choose them",
    )
    parser.add_argument(
        "--sweep",
        type=Path,
        nargs="?",
        const=LATEST / "sweep.jsonl",
        metavar="FILE",
        help="other kernels and cuts than the plan's for each layer: on a GPU by time, else as --predict (H100); goes "
        "on where the file ends",
    )
    parser.add_argument("--fit", type=Path, nargs="+", metavar="FILE", help="make the CUDA plan's table of sweeps")
    parser.add_argument("--layer", metavar="WORDS", help='with --predict: one layer, such as "C=96 H=56 R=7"')
    parser.add_argument("--read", type=Path, metavar="FOLDER", help="show a record again and measure nothing")
    options = parser.parse_args(arguments)
    for part, every in (("models", tuple(networks.NETWORKS)), ("training", models.MODELS)):
        if getattr(options, part) == ["all"]:
            setattr(options, part, list(every))
        unknown = {models.name_of(name) for name in getattr(options, part) or ()} - set(networks.NETWORKS)
        if unknown:
            known = ", ".join(networks.NETWORKS)
            parser.error(f"--{part}: unknown {', '.join(sorted(unknown))}; choose from {known}")
    if options.device is None:
        options.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if options.device.type == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no CUDA device on this machine")
    return _with_defaults(options)


def _list_of(known):
    def split(text: str) -> list[str]:
        names = text.split(",")
        for name in names:
            if name not in known:
                raise argparse.ArgumentTypeError(f"unknown '{name}'; choose from {', '.join(known)}")
        return names

    return split


def _with_defaults(options: argparse.Namespace) -> argparse.Namespace:
    cuda = options.device.type == "cuda" or options.predict is not None or options.sweep is not None
    whole = (options.models is not None, options.training is not None)
    single = (options.separable, options.products, options.sequences, options.overhead, options.views)
    parts = (bool(options.layers), *single, *whole)
    everything = not any(parts)
    bar_check = options.layers == "bars" and options.quick and not cuda
    options.sweep_batches = [options.batch] if options.batch else [1, 64]
    options.layers = "bars" if everything else options.layers
    options.separable |= everything
    options.overhead |= everything
    if everything:
        options.models, options.training = list(models.QUICK), list(models.QUICK if options.quick else models.DEFAULT)
        options.runtimes = ["torch", "onnxruntime", "openvino", "sepconv freeze"]  # what need not compile for minutes
    else:
        options.models = list(networks.NETWORKS) if options.models == [] else options.models or []
        options.training = list(models.MODELS) if options.training == [] else options.training or []
        chosen = [name for name in networks.PEERS if name in (options.peers or networks.PEERS)]
        # What is converted is compiled as well, for minutes: it runs beside what is compiled without.
        ours = [name for name in networks.OURS if name != "sepconv convert" or "compile" in chosen]
        options.runtimes = [*chosen, *ours]
    options.model_batches = [options.batch] if options.batch else [1, 8]
    options.all |= bar_check or options.layers in ("learnt", "held-out")
    options.kinds = options.kinds or (["depthwise"] if bar_check or options.sweep else list(layers.KINDS))
    only_views = sum(parts) == 1 and options.views
    options.dtype = options.dtype or (
        ["float32", "float16"] if cuda else ["float32", "bfloat16"] if only_views else ["float32"]
    )
    options.view_batch = options.batch or (64 if cuda else 4)
    options.model_batch = options.batch or (64 if cuda else 2 if options.quick else 4)
    options.batch = options.batch or (64 if cuda else 8)
    options.threads = options.threads or machine.default_threads(options.device)
    options.compiled_models = "compile" in (options.peers or ())  # minutes each: only when asked for
    of_layers = [name for name in options.peers or () if name in peers.PEERS]
    options.peers = of_layers or list(peers.DEFAULT_PEERS["cpu" if options.quick else options.device.type])
    options.budget = options.budget or (0.06 if options.quick else 0.1 if cuda else 0.2)
    return options


def measure(options: argparse.Namespace, record: dict) -> None:
    """Fills the record's lists, part by part, so that an interrupted run leaves what it has."""
    device, clock = options.device, clock_for(options.device)
    dtypes = [machine.DTYPES[name] for name in options.dtype]
    torch.backends.cudnn.benchmark = True
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = options.tf32
    record["machine"] = machine.describe(device)
    bandwidth = {n: machine.copy_bandwidth(device, clock, n) for n in options.threads}
    rate = {n: {name: _rate(device, clock, n, name) for name in options.dtype} for n in options.threads}
    record["copy_bandwidth"] = {str(n): {str(size): value for size, value in t.items()} for n, t in bandwidth.items()}
    record["matmul_rate"] = {str(n): rates for n, rates in rate.items()}

    if options.layers:
        chosen = layers.select(layers.load(half=options.layers), options.kinds, options.all)
        plan = layer_runs.Plan(
            layers=layers.drawn(chosen, options.sample) if options.sample else chosen,
            device=device,
            batch=options.batch,
            dtypes=dtypes,
            clock=clock,
            thread_counts=options.threads,
            bandwidth=bandwidth,
            rate=rate,
            maps=tuple(options.maps),
            peers=tuple(options.peers),
            budget=options.budget,
            rounds=3 if options.quick else 5,
        )
        with console.progress("layers", len(plan)) as advance:
            for row in layer_runs.run(plan, advance):
                record["layers"].append(row)
    if options.separable:
        found = pairs.load()
        plan = pairs.Plan(
            pairs=found if options.all else pairs.representative(found),
            device=device,
            batch=options.batch,
            dtypes=dtypes,
            clock=clock,
            thread_counts=options.threads[-1:],
            budget=options.budget,
            rounds=3 if options.quick else 5,
        )
        with console.progress("pairs", len(plan)) as advance:
            for row in pairs.run(plan, advance):
                record["pairs"].append(row)
    if options.models and device.type == "cpu":
        plan = networks.Plan(
            names=tuple(options.models),
            batches=tuple(options.model_batches),
            thread_counts=tuple(options.threads),
            runtimes=tuple(options.runtimes),
            turns=3 if options.quick else 7,
        )
        with console.progress("models", len(plan)) as advance:
            for row in networks.run(plan, advance, record["skipped"]):
                record["networks"].append(row)
    if options.products and device.type == "cpu":
        found = layers.select(layers.load(half=options.layers or "bars"), ["pointwise"], everything=True)
        chosen = layers.drawn(found, options.sample) if options.sample else found
        plan = products.plan_of(chosen, options.model_batches, options.threads, turns=3 if options.quick else 5)
        with console.progress("1x1 layers", len(plan)) as advance:
            for row in products.run(plan, advance, record["skipped"]):
                record["products"].append(row)
    modes = {"inference": options.models if device.type == "cuda" else [], "training": options.training}
    for mode, names in modes.items():
        if not names:
            continue
        plan = models.Plan(
            names=tuple(names),
            modes=(mode,),
            device=device,
            batch=options.model_batch,
            dtypes=dtypes,
            clock=clock,
            thread_counts=options.threads[-1:],
            compile=options.compiled_models,
            layouts=tuple(options.layouts),
            budget=10 * options.budget,
            rounds=1 if options.quick else 7 if options.compiled_models else 3,
        )
        with console.progress(mode, len(plan)) as advance:
            for row in models.run(plan, advance, record["skipped"]):
                record["models"].append(row)
    if options.sequences:
        count = len(sequences.MODELS) * len(sequences.MODES) * len(options.threads)
        with console.progress("state-space models", count) as advance:
            turns, scale = (1, 16) if options.quick else (9, 1)
            for row in sequences.run(advance, options.threads, turns, scale):
                record["sequences"].append(row)
    if options.overhead:
        with console.progress("host time", 2 * len(overhead.CASES)) as advance:
            for row in overhead.run(device, advance, 0.5 if options.quick else 1.5):
                record["overhead"].append(row)
    if options.views:
        plan = views.Plan(
            clock=clock,
            device=device,
            layers=views.LAYERS,
            dtypes=dtypes,
            thread_counts=options.threads,
            maps=tuple(options.maps),
            batch=options.view_batch,
            budget=options.budget / (4 if options.quick else 8),
        )
        with console.progress("views", len(plan)) as advance:
            for row in views.run(plan, advance):
                record["views"].append(row)


def _rate(device: torch.device, clock: Clock, thread_count: int, name: str) -> float:
    return machine.matmul_rate(device, clock, thread_count, machine.DTYPES[name])


def without_record(options: argparse.Namespace) -> int | None:
    """What is no measurement of this machine against torch; None: something else is asked for."""
    if options.read:
        report.show(records.read(options.read))
        return 0
    if options.fit:
        return sweep.fit_files(options.fit)
    if not options.predict and not options.sweep:
        return None
    found = layers.load(half=options.layers or "bars")
    chosen = layers.select(found, options.kinds, options.all)
    chosen = layers.drawn(chosen, options.sample) if options.sample else chosen
    chosen = [predict.layer_of(options.layer)] if options.layer else chosen
    if options.sweep:
        return run_sweep(options, chosen)
    return predict.show(options.predict, chosen, options.maps, options.dtype, options.layouts, options.batch)


def run_sweep(options: argparse.Namespace, chosen: Sequence[layers.Layer]) -> int:
    work = sweep.cells(chosen, options.maps, options.dtype, options.layouts, options.sweep_batches)
    if options.device.type == "cuda" and not options.predict:
        gpu = torch.cuda.get_device_properties(options.device)
        facts = (gpu.name, gpu.major * 10 + gpu.minor, gpu.multi_processor_count)
        sweep.run(options.sweep, *facts, "measured", work, sweep.by_time(options.budget))
    else:
        known = predict.gpus()[options.predict or "H100"]
        facts = (known.name, known.capability, known.multiprocessors)
        sweep.run(options.sweep, *facts, "predicted", work, sweep.by_prediction(known))
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    if (done := without_record(options)) is not None:
        return done
    began = time.monotonic()
    record = {
        "format": records.FORMAT,
        "started": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M:%S UTC"),
        "seconds": 0.0,
        "command": "python -m benchmarks " + shlex.join(sys.argv[1:] if arguments is None else arguments),
        "settings": {
            key: value if isinstance(value, (bool, int, float, list, type(None))) else str(value)
            for key, value in vars(options).items()
            if key not in ("read", "out")
        },
        "machine": {},
        "copy_bandwidth": {},
        "matmul_rate": {},
        "skipped": [],
        **{name: [] for name in records.LISTS},
    }
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a time limit from outside still leaves a record
    stopped = False
    try:
        measure(options, record)
    except KeyboardInterrupt:
        stopped = True
        record["skipped"].append("everything after the last row: the run was interrupted")
    if not record["matmul_rate"]:
        return 130
    record["seconds"] = time.monotonic() - began
    files = report.write(record, options.out)
    report.show(record)
    console.say(f"Record: {', '.join(str(path) for path in files)}")
    if stopped:
        return 130
    return 1 if records.disagreements(record) else 0


if __name__ == "__main__":
    sys.exit(main())
