"""Everything that depends on whether the hosts of a run share the output folder.

In a shared folder, rank 0 makes, marks, and removes checkpoints. If every host has a folder of its own, the first rank
of each host does so for the files that the host's ranks write, and a checkpoint counts only if it is complete on all
hosts.
"""

from __future__ import annotations

import re
import uuid
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import torch.distributed as dist

from selfgen_ds.checkpoint.manifest import Checkpoint, complete_checkpoints
from selfgen_ds.errors import InputError
from selfgen_ds.ranks import process_group

_RANK_IN_NAME = re.compile(r"(?:zero_pp|generators)_rank_(\d+)")


@dataclass(frozen=True, kw_only=True)
class Storage:
    """The tasks of this rank in the output folder."""

    shared: bool
    """Whether all ranks see the same folder. Otherwise a host's folder holds the files that the host's ranks wrote."""
    writes: bool
    """Whether this rank makes, marks, and removes folders."""

    def wrote(self, name: str) -> bool:
        """Return whether this rank wrote a file of a checkpoint.

        DeepSpeed and `generators.py` name the rank in a file that every rank writes. Any other file is written by the
        ranks that make folders.
        """
        rank = _RANK_IN_NAME.search(name)
        return int(rank[1]) == dist.get_rank() if rank else self.writes

    def complete(self, folder: Path) -> list[Checkpoint]:
        """Return the checkpoints that are complete on every host, oldest first; on all ranks the same list.

        Collective: every rank must call this.
        """
        if self.shared:
            # Rank 0 looks for all ranks: over NFS another host may not see a new file yet.
            return process_group.from_rank_0(lambda: complete_checkpoints(folder))
        views = process_group.all_gather_object(complete_checkpoints(folder))
        everywhere = set.intersection(*({_identity(checkpoint) for checkpoint in view} for view in views))
        return [replace(c, path=folder / c.path.name) for c in views[0] if _identity(c) in everywhere]

    def check_world_size(self, checkpoint: Checkpoint) -> None:
        """Refuse a checkpoint that the present number of ranks cannot load; `universal.py` converts in a shared folder.

        Raises:
            InputError: Another number of ranks wrote the checkpoint, and hosts share no folder to convert it in.
        """
        if not self.shared and checkpoint.world_size != dist.get_world_size():
            raise InputError(
                f"resume: {checkpoint.path} was written by {checkpoint.world_size} ranks; converting it for "
                f"{dist.get_world_size()} ranks needs a folder that all hosts share, and these hosts do not share "
                f"{checkpoint.path.parent}"
            )

    def explain_nothing_intact(self, complete: list[Checkpoint], saved: list[str]) -> str:
        """Return why none of the checkpoints in a folder can be loaded, although something was saved there.

        Args:
            complete: The checkpoints that are complete on every host, oldest first.
            saved: The folders of all checkpoints that some host completed, oldest first.
        """
        if complete and not complete[-1].shared and complete[-1].world_size != dist.get_world_size():
            return (
                f"resume: {complete[-1].path} was written by {complete[-1].world_size} ranks, on hosts that share no "
                "folder; not all of its parts are here"
            )
        broken = "is broken" if self.shared else "is broken or, because the hosts share no folder, incomplete"
        return (
            f"resume: every checkpoint {broken}; the newest is {saved[-1]}; restore one, or choose another output_dir"
        )

    def verified_files(self, checkpoint: Checkpoint) -> dict[str, list[int]]:
        """Return the files of a checkpoint that this rank reads to verify them: name -> [bytes, CRC-32].

        The ranks together read every file on every host.
        """
        if not self.shared:
            return checkpoint.files[dist.get_rank()]
        shares = checkpoint.files[dist.get_rank() :: dist.get_world_size()]
        return {name: entry for files in shares for name, entry in files.items()}

    def bytes_per_host(self, size: int) -> int:
        """Return how many of the `size` bytes of a checkpoint one host writes."""
        return size if self.shared else size * process_group.local_world_size() // dist.get_world_size()


def _identity(checkpoint: Checkpoint) -> str:
    """Return the part of a manifest that is the same on every host; only one host may have recorded an evaluation."""
    return repr((checkpoint.step, checkpoint.step_size, checkpoint.data, checkpoint.files))


def detect_storage(folder: Path) -> Storage:
    """Find out whether all ranks see the same folder, by a file that rank 0 makes there.

    Collective: every rank must call this.
    """
    rank = dist.get_rank()
    probe = folder / process_group.from_rank_0(lambda: f".{uuid.uuid4().hex}.tmp")
    if rank == 0:
        probe.touch()
    dist.barrier()
    with suppress(OSError):  # a host that cannot make the folder does not share it
        # NFS caches that a folder does not exist; making the folder asks the server anew.
        folder.mkdir(parents=True, exist_ok=True)
    shared = all(process_group.all_gather_object(probe.exists()))
    if rank == 0:
        probe.unlink()
    return Storage(shared=shared, writes=(rank if shared else process_group.local_rank()) == 0)
