"""What can go wrong with a black box, in words. Keys are scrubbed before anything gets here.

Each class's `args` equal its constructor's parameters, as in `metasepia.errors`. `kept` says what has been answered and
lies in the cache, so that whoever reads the error knows what running again costs.
"""

from metasepia.errors import MetasepiaError


class MissingKey(MetasepiaError, LookupError):
    """The environment variable that should hold an endpoint's key is not set, or holds what no header can carry."""

    def __init__(self, variable: str, endpoint: str, problem: str = "is not set") -> None:
        super().__init__(variable, endpoint, problem)
        self.variable, self.endpoint, self.problem = variable, endpoint, problem

    def __str__(self) -> str:
        return (
            f"the environment variable {self.variable}, which should hold the key for {self.endpoint}, {self.problem}; "
            f"set it in the environment of this program, or leave key_env out for an endpoint without keys"
        )


class EndpointRefused(MetasepiaError, RuntimeError):
    """An endpoint said no in a way that asking again does not change: 400, 401, 403, 404, 422, no quota left."""

    def __init__(self, endpoint: str, model: str, status: int, words: str, kept: str) -> None:
        super().__init__(endpoint, model, status, words, kept)
        self.endpoint, self.model, self.status, self.words, self.kept = endpoint, model, status, words, kept

    def __str__(self) -> str:
        hints = {
            401: "; is the right variable named in key_env?",
            403: "; may this key use the model?",
            404: "; is there such a model, and is base_url right (most end in /v1)?",
        }
        hint = hints.get(self.status, "")
        return f"{self.endpoint} refuses (status {self.status}) for {self.model}: {self.words!r}{hint}. {self.kept}"


class EndpointUnavailable(MetasepiaError, ConnectionError):
    """An endpoint did not answer, or answered "later", for longer than the patience of the settings."""

    def __init__(self, endpoint: str, model: str, problem: str, attempts: int, waited_s: float, kept: str) -> None:
        super().__init__(endpoint, model, problem, attempts, waited_s, kept)
        self.endpoint, self.model, self.problem, self.attempts = endpoint, model, problem, attempts
        self.waited_s, self.kept = waited_s, kept

    def __str__(self) -> str:
        return (
            f"{self.endpoint} gave no answer for {self.model} (attempts: {self.attempts}, over {self.waited_s:.1f} s); "
            f"last: {self.problem}. {self.kept}"
        )


class BadAnswer(MetasepiaError, ValueError):
    """An endpoint answered, again and again, with something that is no answer: HTML, torn JSON, wrong fields."""

    def __init__(self, endpoint: str, model: str, status: int, problem: str, excerpt: str, kept: str) -> None:
        super().__init__(endpoint, model, status, problem, excerpt, kept)
        self.endpoint, self.model, self.status, self.problem = endpoint, model, status, problem
        self.excerpt, self.kept = excerpt, kept

    def __str__(self) -> str:
        return (
            f"{self.endpoint} answered for {self.model} with status {self.status} and {self.problem}; "
            f"it begins {self.excerpt!r}. {self.kept}"
        )


class ModelChanged(MetasepiaError, RuntimeError):
    """An endpoint began to answer as another model, or another build of it. Answers of two models are never mixed."""

    def __init__(self, endpoint: str, model: str, before: str, after: str, num_before: int, num_after: int) -> None:
        super().__init__(endpoint, model, before, after, num_before, num_after)
        self.endpoint, self.model, self.before, self.after = endpoint, model, before, after
        self.num_before, self.num_after = num_before, num_after

    def __str__(self) -> str:
        return (
            f"{self.endpoint}, asked for {self.model}, answered as {self.before} at first ({self.num_before} texts "
            f"answered whole) and now answers as {self.after} ({self.num_after}). Answers of both are kept, apart, and "
            "never mixed. Set on_change = 'ask again' to have all texts answered by what answers now, wait until "
            "the first is back, or, where only the fingerprint differs and that is nothing to you, same = 'model'"
        )


class BudgetReached(MetasepiaError, RuntimeError):
    """The next request could go beyond a limit on cost or tokens, so it was not sent."""

    def __init__(self, limit: str, allowed: float, spent: float, needed: float, kept: str) -> None:
        super().__init__(limit, allowed, spent, needed, kept)
        self.limit, self.allowed, self.spent, self.needed, self.kept = limit, allowed, spent, needed, kept

    def __str__(self) -> str:
        return (
            f"stopped before {self.limit} = {self.allowed:g}: {self.spent:g} is spent and the next request may take "
            f"{self.needed:g}. {self.kept}; raise {self.limit} to go on"
        )


class NothingMatched(MetasepiaError, ValueError):
    """Hardly any reply names a label, so the answers say nothing of the task."""

    def __init__(self, name: str, share: float, words: tuple[str, ...], replies: tuple[str, ...]) -> None:
        super().__init__(name, share, words, replies)
        self.name, self.share, self.words, self.replies = name, share, words, replies

    def __str__(self) -> str:
        return (
            f"only {self.share:.1%} of the replies of {self.name} name one of {', '.join(map(repr, self.words))}; it "
            f"says, for instance, {', '.join(map(repr, self.replies))}. Name the labels in the template, give them the "
            "words that the model uses, or let it say more (max_tokens)"
        )


class CacheFailed(MetasepiaError, OSError):
    """Answers cannot be read or kept; nothing more is asked, since it would have to be paid for again."""

    def __init__(self, path: str, problem: str) -> None:
        super().__init__(path, problem)
        self.path, self.problem = path, problem

    def __str__(self) -> str:
        return f"the cache of answers {self.path} {self.problem}"
