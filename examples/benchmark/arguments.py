"""Types of the scripts' arguments."""

import argparse
import math


def positive(text: str) -> int:
    # through float, so that 1e6 is understood
    number = float(text)
    if not 1 <= number < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive number")
    return int(number)
