"""What a test makes fail."""


class Failing:
    """Raises at the `at`-th call and `times` in all; otherwise what it stands for."""

    def __init__(self, original, at: int, times: int = 1) -> None:
        self.original, self.raises = original, range(at, at + times)
        self.calls = 0

    def __call__(self, *args, **kwargs):
        self.calls += 1
        if self.calls in self.raises:
            raise OSError("forced failure")
        return self.original(*args, **kwargs)
