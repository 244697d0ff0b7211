"""Whether bytes of a picture can end a process, or keep it for long: damaged images of every format are decoded.

    python tests/experiments/fuzz_images.py --images 10000

A child process decodes one after the other. One that ends it, or takes longer than ten seconds, is counted and written
to `--kept`, and another child goes on behind it. Prints a line per format.
"""

from __future__ import annotations

import argparse
import collections
import multiprocessing
import resource
import signal
import sys
from collections.abc import Sequence
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))
from pictures import damaged, of_every_format

from aimscale.harness.data.store.decoding import UndecodableImageError, decode, is_transparent

SECONDS, MEMORY = 10, 4 * 10**9


def answer(images: Sequence[bytes], first: int, to: Connection) -> None:
    """Decode the images from the first on, and say of each what became of it."""
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    for number in range(first, len(images)):
        signal.alarm(SECONDS)
        try:
            decode(images[number])
            is_transparent(images[number])
            to.send("decoded")
        except UndecodableImageError:
            to.send("refused")
        except Exception as error:
            to.send(f"raised {type(error).__name__}")
    to.close()


def outcomes(images: Sequence[bytes]) -> list[str]:
    """Return what became of each image."""
    found: list[str] = []
    while len(found) < len(images):
        ours, theirs = multiprocessing.Pipe(duplex=False)
        child = multiprocessing.get_context("fork").Process(target=answer, args=(images, len(found), theirs))
        child.start()
        theirs.close()
        try:
            while True:
                found.append(ours.recv())
        except EOFError:
            child.join()
        if len(found) < len(images):
            found.append("too slow" if child.exitcode == -signal.SIGALRM else f"ended the process ({child.exitcode})")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kept", type=Path, help="folder for images that were neither decoded nor refused")
    options = parser.parse_args()
    rng = np.random.default_rng(options.seed)
    formats = of_every_format(rng)
    for kind, data in formats.items():
        images = [damaged(rng, data) for _ in range(-(-options.images // len(formats)))]
        found = outcomes(images)
        print(f"{kind:<18}", dict(collections.Counter(found)), flush=True)
        for number, what in enumerate(found):
            if options.kept and what not in ("decoded", "refused"):
                options.kept.mkdir(parents=True, exist_ok=True)
                (options.kept / f"{kind}-{number}").write_bytes(images[number])


if __name__ == "__main__":
    main()
