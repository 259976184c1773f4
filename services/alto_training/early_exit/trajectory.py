"""The two rules that look at one trial's own curve: divergence and overfitting (arXiv 2604.05426)."""

from __future__ import annotations

from alto_common.tuning import EarlyExit

from alto_training.early_exit.policy import Decision, Observation, State, Verdict

SMALLEST_LOSS = 1e-12


def slope(values: list[float]) -> float:
    """Return the least-squares slope of `values` over 0, 1, 2, ...: loss per evaluation. Needs two values or more."""
    middle = (len(values) - 1) / 2
    spread = sum((index - middle) ** 2 for index in range(len(values)))
    return sum((index - middle) * value for index, value in enumerate(values)) / spread


class Trajectory:
    """The last evaluations of one trial, and for how many evaluations running each rule has agreed.

    Divergence: over the last `window` evaluations the slopes of smoothed train loss and of validation loss are both at
    least `slope_threshold`. Overfitting: validation over smoothed train loss, minus one, is above `gap_threshold`.
    Either stops the trial when it has held `patience` evaluations running; a single evaluation without it starts the
    count again.
    """

    def __init__(self, settings: EarlyExit) -> None:
        self._settings = settings
        self._train: list[float] = []
        self._validation: list[float] = []
        self._diverging = 0
        self._overfitting = 0

    def observe(self, trial_id: str, observation: Observation) -> Decision | None:
        """Take note of a finite evaluation; return the decision to stop, or None."""
        settings = self._settings
        train, validation = observation.train_loss_smoothed, observation.validation_loss
        self._train = [*self._train, train][-settings.window :]
        self._validation = [*self._validation, validation][-settings.window :]
        gap = (validation - train) / max(train, SMALLEST_LOSS)
        self._overfitting = self._overfitting + 1 if gap > settings.gap_threshold else 0
        train_slope = validation_slope = 0.0
        rising = False
        if len(self._train) == settings.window:
            train_slope, validation_slope = slope(self._train), slope(self._validation)
            rising = min(train_slope, validation_slope) >= settings.slope_threshold
        self._diverging = self._diverging + 1 if rising else 0

        if self._diverging >= settings.patience:
            return Decision(
                trial_id,
                Verdict.STOP,
                "divergence",
                f"Stopped as diverging: over windows of {settings.window} evaluations both losses rose by at least "
                f"{settings.slope_threshold:g} an evaluation, {self._diverging} evaluations running (train loss "
                f"{train_slope:+.4g}, validation loss {validation_slope:+.4g} in the last one).",
                {
                    "train_slope": train_slope,
                    "validation_slope": validation_slope,
                    "train_loss": train,
                    "validation_loss": validation,
                    "evaluations_running": float(self._diverging),
                },
                settings.slope_threshold,
            )
        if self._overfitting >= settings.patience:
            return Decision(
                trial_id,
                Verdict.STOP,
                "overfitting",
                f"Stopped as overfitting: the validation loss {validation:.4g} is {gap:.1%} above the train loss "
                f"{train:.4g}, more than {settings.gap_threshold:.1%} for {self._overfitting} evaluations running. Its "
                "best checkpoint by validation loss is kept.",
                {
                    "gap": gap,
                    "train_loss": train,
                    "validation_loss": validation,
                    "evaluations_running": float(self._overfitting),
                },
                settings.gap_threshold,
            )
        return None

    def state_dict(self) -> State:
        """Return the window and the counts."""
        return {
            "train": self._train,
            "validation": self._validation,
            "diverging": self._diverging,
            "overfitting": self._overfitting,
        }

    def load_state_dict(self, state: State) -> None:
        """Go on from a saved state."""
        self._train = list(state["train"])
        self._validation = list(state["validation"])
        self._diverging = state["diverging"]
        self._overfitting = state["overfitting"]
