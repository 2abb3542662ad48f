"""The training program as a module: `deepspeed --module clex_train.train +experiment=tiny_clex`.

It runs `train.py` of the checkout or of the installed package, with the same arguments and exit codes.
"""

import runpy

from clex_train.utils.locations import TRAIN

if __name__ == "__main__":
    runpy.run_path(str(TRAIN), run_name="__main__")
