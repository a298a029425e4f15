"""ComfyUI imports torchaudio for its models of sound, which no test runs."""

from __future__ import annotations

import sys
from unittest.mock import MagicMock


def import_or_stand_in() -> None:
    """torchaudio may be absent, or built for another CUDA."""
    import transformers  # noqa: F401  looks for torchaudio, and must find it absent

    try:
        import torchaudio  # noqa: F401
    except Exception:
        for name in ("torchaudio", "torchaudio.functional", "torchaudio.transforms"):
            sys.modules[name] = MagicMock()
