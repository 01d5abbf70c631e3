"""Random attacks with a fixed seed, short; ``FUZZ=20`` makes each 20 times as long.

    FUZZ=20 FUZZ_SEED=1 python -m pytest tests/fuzz -s -o faulthandler_timeout=0

With ``-s`` they print what they counted. On 2 cores this takes 13 minutes, and the attack on shared
SAEs half an hour more.
"""

import os
import random

LENGTH = int(os.environ.get("FUZZ", "1"))


def some_random() -> random.Random:
    return random.Random(int(os.environ.get("FUZZ_SEED", "0")))
