"""`python -m lamina_jax.train`: makes the bundled model, or prints how well a model recalls.

    python -m lamina_jax.train --out DIR                   train (45 minutes) and write DIR
    python -m lamina_jax.train --out DIR --export          write DIR from the newest checkpoint
    python -m lamina_jax.train --evaluate DIR              print the recall of the model in DIR

Training text is this machine's Python standard library and the recall grammar of
`lamina_jax.training.recall`; nothing is downloaded. Started again with the same --run folder, it goes
on from its newest checkpoint; time that no process ran does not count.
"""

from __future__ import annotations

import argparse
import math
import time
from pathlib import Path

from rich.console import Console
from rich.progress import Progress

from lamina_jax.training.corpus import read_corpus
from lamina_jax.training.evaluation import evaluate_plain, load_plain
from lamina_jax.training.export import export
from lamina_jax.training.loop import Phase, Report, TrainState
from lamina_jax.training.recall import recall_prompts
from lamina_jax.training.run import BUNDLED, Run

HELD_OUT_SEED = 1_000_003
EVALUATED_LENGTHS = (128, 256, 512, 1024, 1536, 2040)
PRINT_SECONDS = 30.0


def parse_phases(text: str) -> list[Phase]:
    """`256:70,1024:25` as phases of (tokens, minutes)."""
    try:
        phases = [
            Phase(int(length), float(minutes))
            for length, minutes in (part.split(":") for part in text.split(","))
        ]
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not LENGTH:MINUTES,..., for example 256:70,1024:25"
        ) from None
    for phase in phases:
        if not 2 <= phase.length <= BUNDLED.max_position or not 0 < phase.minutes < math.inf:
            raise argparse.ArgumentTypeError(
                f"{text!r}: a length must be 2 to {BUNDLED.max_position} and its minutes positive"
            )
    return phases


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m lamina_jax.train",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", type=Path, metavar="DIR", help="the Hugging Face folder to write")
    parser.add_argument(
        "--run",
        type=Path,
        default=Path("runs/bundled"),
        metavar="DIR",
        help="checkpoints (default: %(default)s)",
    )
    parser.add_argument(
        "--minutes",
        type=parse_phases,
        default="128:3,256:23,1024:11,2048:8",
        metavar="LENGTH:MINUTES,...",
        help="the phases: minutes of training at each sequence length (default: %(default)s)",
    )
    parser.add_argument("--seed", type=int, default=0, help="of weights and documents (default: %(default)s)")
    parser.add_argument("--export", action="store_true", help="do not train: write --out from the checkpoint")
    parser.add_argument("--evaluate", type=Path, metavar="DIR", help="print the recall of the model in DIR")
    parser.add_argument("--prompts", type=int, default=200, help="prompts per length to evaluate")
    return parser


def main(argv: list[str] | None = None) -> None:
    parser = arguments()
    options = parser.parse_args(argv)
    console = Console()
    if options.evaluate is not None:
        print_recall(options.evaluate, options.prompts, console)
        return
    if options.out is None:
        parser.error("give --out DIR (or --evaluate DIR)")
    run = Run(options.run, BUNDLED, read_corpus(), seed=options.seed)
    state = run.state() if options.export else train_aloud(run, options.minutes, console)
    export(run.model(state), run.config, run.tokenizer, options.out)
    console.print(f"wrote {options.out} after {state.progress.step} steps, {state.progress.tokens} tokens")


def print_recall(folder: Path, num: int, console: Console) -> None:
    """Prints the held-out recall of a folder's model at growing lengths, a line each."""
    model, tokenizer = load_plain(folder)
    for length in EVALUATED_LENGTHS:
        prompts = recall_prompts(HELD_OUT_SEED, num, length, tokenizer)
        share = evaluate_plain(model, prompts)
        console.print(f"{length:5d} tokens: {share:6.1%} of {num} held-out facts recalled", highlight=False)


def train_aloud(run: Run, phases: list[Phase], console: Console) -> TrainState:
    """Trains; prints a line every half minute, below it a progress bar where that is a terminal, and the
    held-out recall at every checkpoint."""
    printed = -PRINT_SECONDS

    def on_step(report: Report) -> None:
        nonlocal printed
        bar.update(task, completed=report.share_done)
        if time.monotonic() - printed >= PRINT_SECONDS:
            printed = time.monotonic()
            console.print(f"{report.share_done:.1%} {describe(report)}", soft_wrap=True)

    def on_checkpoint(state: TrainState, report: Report) -> None:
        prompts = recall_prompts(HELD_OUT_SEED, 32, report.length, run.tokenizer)
        share = evaluate_plain(run.model(state), prompts)
        console.print(f"step {report.progress.step}: held-out recall at {report.length} tokens {share:.1%}")

    with Progress(console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task("training", total=1.0)
        return run.train(phases, on_step, on_checkpoint)


def describe(report: Report) -> str:
    done = report.progress
    recall = "none asked" if math.isnan(report.recall) else f"{report.recall:.0%}"
    return (
        f"step {done.step} length {report.length} loss {report.loss:.3f} recall {recall} "
        f"lr {report.learning_rate:.1e} {done.tokens / max(done.seconds, 1e-9):.0f} tokens/s"
    )


if __name__ == "__main__":
    main()
