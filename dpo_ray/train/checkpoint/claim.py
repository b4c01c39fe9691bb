"""The claim of a group of workers on the checkpoints of a run. Only the newest group may commit and prune checkpoints.

<place>/claims/000002.json      the second group; its files are in <place>/step-.../attempt-000002/

When a node or the driver of a group no longer answers, a new group is started. Processes of the old group may still be
alive and continue to write. But they write only to directories with the number of the old group, which newer groups
neither read nor write.
"""

from __future__ import annotations

import json
import re

from dpo_ray.artifacts.storage import Storage
from dpo_ray.errors import LeaseError

MAX_TRIES = 20
_FOLDER = "claims"
_CLAIM = re.compile(rf"{_FOLDER}/(\d{{6,}})\.json")
_DIRECTORY = re.compile(r"attempt-(\d{6,})")


class Claim:
    """The right of one group of workers to commit checkpoints, until a newer group claims this right."""

    def __init__(self, place: Storage, attempt: str) -> None:
        """Claim the next number in `place`. The name `attempt` of the training is written to the claim, for people.

        Raises:
            LeaseError: other groups repeatedly claimed the number first.
        """
        self._place = place
        for _ in range(MAX_TRIES):
            self.number = _newest(place) + 1
            try:
                place.create(f"{_FOLDER}/{self.number:06d}.json", json.dumps({"attempt": attempt}).encode())
            except FileExistsError:  # another group, or a request of ours that was sent twice: the next number is free
                continue
            return
        raise LeaseError("other groups of workers keep claiming the checkpoints", where=place.uri)

    @property
    def directory(self) -> str:
        """Return the name of this group's directory within the directory of each step. No other group writes there."""
        return f"attempt-{self.number:06d}"

    def check(self) -> None:
        """Raise LeaseError if a newer group of workers has claimed the checkpoints, or the claims were deleted."""
        newest = _newest(self._place)
        if newest < self.number:
            raise LeaseError(
                "these workers lost the training: their checkpoints' directory was deleted, or its disk is gone",
                where=self._place.uri,
                fix="if the training is not finished, mount or restore the storage, and run the same command again",
            )
        if newest > self.number:
            raise LeaseError(
                "these workers were replaced: a newer group of workers continues the training",
                where=self._place.uri,
                fix="let it continue; it resumed from the checkpoints that were committed before",
            )

    def covers(self, directory: str) -> bool:
        """Return whether a directory belongs to this group or an older one. Without a number, it counts as older."""
        found = _DIRECTORY.fullmatch(directory)
        return found is None or int(found[1]) <= self.number


def _newest(place: Storage) -> int:
    claims = (_CLAIM.fullmatch(name) for name in place.list_files(_FOLDER))
    return max((int(claim[1]) for claim in claims if claim), default=0)
