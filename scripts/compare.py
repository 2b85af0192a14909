"""One model, all methods: perplexity, memory and time of 16 bit, int8, NF4, RTN, AWQ, GPTQ and AutoRound.

    python scripts/compare.py --pretrained_path <16-bit base> --text wiki.txt --dataset calib.txt --output compared
    python scripts/compare.py … --methods 16bit nf4 gptq-g64-asym --nsamples 32 --seqlen 512 --max_tokens 20000

Writes a folder for each int4 method, comparison.json, comparison.txt and comparison.png. The same command again reuses
the folders that are there, which must have been made with its settings; perplexity is always measured on what is read
back from the disk.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import _checkout  # noqa: F401

from accessory.cli import run_command
from accessory.compare import CANDIDATES, Comparison, compare
from accessory.config import Precision
from accessory.errors import UserError

PRECISION_HELP = (
    "type to compute in and to store what is left unquantized (default: bf16; a CPU without instructions for it is "
    "several times as fast in tf32)"
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pretrained_path", type=Path, required=True, help="16-bit base")
    parser.add_argument("--text", type=Path, required=True, help="plain text for the perplexity")
    parser.add_argument("--dataset", type=Path, help="calibration data of AWQ, GPTQ and AutoRound")
    parser.add_argument("--output", type=Path, required=True, help="folder for models, table, JSON and chart")
    parser.add_argument("--methods", nargs="+", default=list(CANDIDATES), metavar="METHOD", help=", ".join(CANDIDATES))
    parser.add_argument("--nsamples", type=int, help="calibration rows")
    parser.add_argument("--seqlen", type=int, help="tokens in a calibration row")
    parser.add_argument("--iters", type=int, help="AutoRound's tuning iterations a block")
    parser.add_argument("--max_tokens", type=int, default=-1, help="use only so many tokens of the text")
    parser.add_argument("--eval_seqlen", type=int, default=512, help="tokens in a window of the text")
    parser.add_argument("--batch_size", type=int, default=4, help="windows at a time")
    parser.add_argument("--device", help="cuda, cuda:1, cpu; unset: cuda where there is one")
    parser.add_argument("--precision", choices=[p.value for p in Precision], default="bf16", help=PRECISION_HELP)
    given = vars(parser.parse_args())
    base, precision = given.pop("pretrained_path"), Precision(given.pop("precision"))
    run_command(lambda: _compare(Comparison(base=base, precision=precision, **given)))


def _compare(what: Comparison) -> None:
    if all(row.ppl is None for row in compare(what)):
        raise UserError("no method gave a figure; the table says why")


if __name__ == "__main__":
    main()
