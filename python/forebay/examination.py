"""What works on this machine: :func:`forebay.doctor`, or ``python -m forebay``."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict, dataclass

from forebay._forebay import __version__, examine, redirected_allocations


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
    return [Check(*found) for found in examine()] + [_torch(), _allocations()]


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


def _allocations() -> Check:
    """Whether torch's own allocations press weights out, by what, and if not, why."""
    name = "torch's allocations"
    try:
        import torch
    except ImportError as error:
        return Check(name, "missing", str(error), "pip install torch")
    polled = (
        "weights follow the free memory by polling, and a forward that ran out of memory is run once more"
    )
    if torch.version.cuda is None:
        return Check(
            name, "limited", f"this build of torch has no CUDA; {polled}", "install a CUDA build of torch"
        )
    from forebay import allocations

    if not allocations.is_wanted():
        remedy = f"unset {allocations.SWITCH}, or call forebay.redirect_allocations()"
        return Check(name, "limited", f"redirection is switched off; {polled}", remedy)
    redirected = redirected_allocations()
    if redirected["functions"]:
        functions = ", ".join(redirected["functions"])
        detail = f"{functions} of {redirected['object']} press weights out (on)"
        if allocations.has_expandable_segments():
            return Check(
                name,
                "limited",
                f"{detail}, but torch has expandable segments, which call neither; {polled}",
                "unset expandable_segments in PYTORCH_CUDA_ALLOC_CONF for allocations that press weights out",
            )
        return Check(name, "works", detail, None)
    why = allocations.why_off() or allocations.why_not()
    if why is not None:
        return Check(name, "limited", f"{why}; {polled}", "use torch's own wheels for Linux on x86-64")
    return Check(name, "works", f"can be redirected in {allocations.LIBRARY} (off until a GPU is used)", None)


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
