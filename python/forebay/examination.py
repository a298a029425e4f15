"""What works on this machine: :func:`forebay.doctor`, or ``python -m forebay``."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict, dataclass

from forebay._forebay import __version__, examine


@dataclass(frozen=True)
class Check:
    """One thing that was tried.

    Attributes:
        name: What.
        status: ``works``, ``limited`` or ``missing``.
        detail: What was found.
        remedy: What would make it work, where it does not.
    """

    name: str
    status: str
    detail: str
    remedy: str | None


def doctor() -> list[Check]:
    """Tries what Forebay needs on this machine, torch included."""
    return [Check(*found) for found in examine()] + [_torch()]


def _torch() -> Check:
    try:
        import torch
    except ImportError as error:
        return Check("torch", "missing", str(error), "pip install torch")
    built = torch.version.cuda or "no CUDA"
    if torch.cuda.is_available():
        return Check("torch", "works", f"{torch.__version__} ({built}), {torch.cuda.get_device_name()}", None)
    return Check(
        "torch",
        "limited",
        f"{torch.__version__} ({built}) sees no GPU; models run on the host device",
        "on a machine with an NVIDIA GPU, install its driver and a CUDA build of torch",
    )


def main(argv: list[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m forebay", description="Tries what Forebay needs on this machine and says what to do."
    )
    parser.add_argument(
        "command", nargs="?", choices=["doctor"], default="doctor", help="the only one, so optional"
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument("--version", action="version", version=f"forebay {__version__}")
    options = parser.parse_args(argv)
    checks = doctor()
    if options.json:
        print(json.dumps([asdict(check) for check in checks], indent=1))
    else:
        width = max(len(check.name) for check in checks)
        for check in checks:
            print(f"{check.status:8} {check.name:{width}}  {check.detail}")
            if check.remedy:
                print(f"{'':8} {'':{width}}  -> {check.remedy}")
    return 0 if all(check.status != "missing" or "cuda" in check.name.lower() for check in checks) else 1


if __name__ == "__main__":
    sys.exit(main())
