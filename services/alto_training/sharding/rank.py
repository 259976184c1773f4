"""The start of a worker rank: `python -m alto_training.sharding.rank FOLDER`, with RANK and LOCAL_RANK set.

It is tied to its parent before anything that takes seconds to import, so that none is ever left over.
"""

from __future__ import annotations

import sys
from pathlib import Path

from alto_training.parent_process import die_with
from alto_training.sharding.rank_order import RankOrder


def main() -> None:
    """Run one rank of the order in the folder that the command line names."""
    folder = Path(sys.argv[1])
    die_with(RankOrder.read(folder).parent_process_id)
    from alto_training.sharding.worker import run

    run(folder)


if __name__ == "__main__":
    main()
