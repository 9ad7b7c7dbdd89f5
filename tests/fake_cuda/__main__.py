"""Start `steps` in a process in which torch believes in a GPU: see there."""

import ctypes
import sys

ctypes.CDLL(sys.argv[1])  # before torch is imported: it looks for devices once, while it starts

if __name__ == "__main__":
    from tests.fake_cuda.steps import main

    main(sys.argv[2:])
