#!/usr/bin/env python
"""Convert a model between Hugging Face format and a Megatron distributed checkpoint: `megatron-gkd convert` by path.

    python tools/convert_hf.py --to megatron --model HF_DIR --save OUT [--check]
    torchrun --nproc-per-node 4 tools/convert_hf.py --to hf --model MEGATRON_DIR --save OUT \\
        --tensor_model_parallel_size 4

See docs/weights.md; `--help` lists the flags.
"""

import sys

from megatron_gkd.cli import main

if __name__ == "__main__":
    sys.exit(main(["convert", *sys.argv[1:]]))
