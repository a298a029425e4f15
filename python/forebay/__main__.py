"""``python -m forebay`` is the doctor."""

import sys

from forebay.doctor import main

if __name__ == "__main__":
    sys.exit(main())
