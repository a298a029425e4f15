"""``python -m forebay`` is the doctor."""

import sys

from forebay.examination import main

if __name__ == "__main__":
    sys.exit(main())
