"""Cast a bundle whose ranges are known, and nothing else: `surgery_cast.py SAMPLES OUT_FOLDER SOURCE_FOLDER`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from known_ranges import KnownRanges

from passes.cast_fp16 import CastFp16
from surgery import Pipeline

samples, target, source = map(Path, sys.argv[1:])
steps = [KnownRanges(folder=samples), CastFp16(keep_cache=True, refine=False)]
with Pipeline(steps, check=None).run(source) as result:
    result.save(target)
