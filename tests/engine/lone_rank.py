"""What a rank does whose rank 0 is killed. In a file of its own, so that its processes import little and start sooner."""

import multiprocessing
import time
from pathlib import Path


def start_looking(path: str) -> None:
    """As rank 0 starts another one, and then waits to be killed."""
    multiprocessing.get_context("forkserver").Process(
        target=look_for_rank_0, args=(path,), daemon=True
    ).start()
    time.sleep(60)


def look_for_rank_0(path: str) -> None:
    """What a rank does while it waits for others."""
    from orthrus.engine.rank_worker import _Rank0
    from orthrus.kernels.ranks import RankError

    rank_0 = _Rank0()
    Path(path, "begun").touch()
    try:
        while True:
            rank_0.check()
            time.sleep(0.05)
    except RankError as error:
        Path(path, "told").write_text(str(error))
