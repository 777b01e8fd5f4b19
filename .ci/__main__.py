"""`python -m bgjob`: the wheel ships it beside the one file."""

import sys

from bgjob import main

sys.exit(main())
