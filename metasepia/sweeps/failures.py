"""What goes wrong in sweeps beyond the errors that every part of the project has."""

from metasepia.errors import MetasepiaError


class StorageFailed(MetasepiaError, OSError):
    """An object could not be written or read: disk full, no permission, no network. Whole objects stay as they were."""

    def __init__(self, path: str, problem: str) -> None:
        super().__init__(path, problem)
        self.path, self.problem = path, problem

    def __str__(self) -> str:
        return (
            f"{self.path}: {self.problem}; nothing that was whole is lost: mend that and run the same command again, "
            "it goes on from there"
        )


class PacksFailed(MetasepiaError, RuntimeError):
    """Some packs could not be finished; the others are stored. `problems` has one line a pack."""

    def __init__(self, uri: str, problems: tuple[str, ...], num_packs: int) -> None:
        super().__init__(uri, problems, num_packs)
        self.uri, self.problems, self.num_packs = uri, problems, num_packs

    def __str__(self) -> str:
        shown = "\n  ".join(self.problems[:8])
        more = f"\n  and {len(self.problems) - 8} more" if len(self.problems) > 8 else ""
        return (
            f"{len(self.problems)} of {self.num_packs} packs failed, the others are stored in {self.uri}; "
            f"the same command tries these again:\n  {shown}{more}"
        )
