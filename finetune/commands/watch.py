"""`finetune watch`: follows a run from another terminal until it is finished or was stopped, or until Ctrl-C."""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from finetune.arguments import not_negative
from finetune.errors import EXIT_OK

# States that a run does not leave by itself, and what is said of them; `{step}` is the last one done.
_ENDS = {
    "finished": "the run is finished",
    "stopped": "the run was stopped at step {step:,}; the command that began it goes on from its newest checkpoint",
}


def configure(parser: argparse.ArgumentParser) -> None:
    """Arguments of the verb."""
    parser.add_argument("run", metavar="RUN", type=Path, help="a run's directory")
    parser.add_argument("--once", action="store_true", help="print the run as it stands and end")
    parser.add_argument("--every", type=_seconds, default=2.0, metavar="SECONDS", help="how often to look (default: 2)")


def run(arguments: argparse.Namespace) -> int:
    """Show the run until it has ended, and say how; where the output is no terminal, once."""
    from rich.live import Live

    from finetune.console import stdout
    from finetune.report.run_files import RunFiles, open_run
    from finetune.report.watch import frame

    def look() -> tuple[object, RunFiles]:
        # Only sizes of checkpoints are compared: hashes would be read again with every frame.
        found = open_run(arguments.run, hashes=False)
        return frame(found, width=min(stdout.width, 140), height=stdout.height), found

    shown, found = look()
    if arguments.once or not stdout.is_terminal:
        stdout.print(shown)
        return EXIT_OK
    try:
        with Live(shown, console=stdout, auto_refresh=False, vertical_overflow="crop") as live:  # type: ignore[arg-type]
            while found.state not in _ENDS:
                time.sleep(arguments.every)
                shown, found = look()
                live.update(shown, refresh=True)  # type: ignore[arg-type]
        stdout.print(_ENDS[found.state].format(step=found.step))
    except KeyboardInterrupt:
        pass  # the reader has seen enough; the run goes on
    return EXIT_OK


def _seconds(text: str) -> float:
    value = not_negative(text)
    if value < 0.1:
        raise argparse.ArgumentTypeError(f"{text}: must be 0.1 or more")
    return value
